"""The checks of the exercises with kernels, which run in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from exercises.run import Check, Wrong, close


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The formula: q [T, H, D], k and v [T, D], mask [T, T], in float64."""
    q, k, v = q.double(), k.double(), v.double()
    scores = torch.einsum("thd,sd->ths", q, k) * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1) @ v


def inputs(tokens: int, heads: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k and v."""
    torch.manual_seed(0)
    return torch.randn(tokens, heads, dim), torch.randn(tokens, dim), torch.randn(tokens, dim)


def dense_kernel(my: Any) -> None:
    """Chapter 8: causality first, then small scores, then large ones."""
    q, k, v = inputs(40, 4, 16)  # 40 is no multiple of the 16 tokens of a step
    causal = torch.ones(40, 40, dtype=torch.bool).tril()
    got = my.attend(torch.zeros_like(q), k, v)
    if got.isnan().any():
        raise Wrong("with all scores 0 some outputs are NaN or were never written")
    equal = attention(torch.zeros_like(q), k, v, causal)
    if not torch.allclose(got.double(), equal, atol=1e-4):
        first = int((got - equal).abs().amax((1, 2)).gt(1e-4).nonzero()[0])
        raise Wrong(
            f"with all scores 0 query {first} must give the mean of values 0 to {first}. "
            "Which tokens does it read? (TODO 1)"
        )
    close("random scores", my.attend(q, k, v), attention(q, k, v, causal), 1e-4)
    ramp = torch.linspace(0, 40, 40)[:, None].expand_as(k).contiguous()
    rising = my.attend(torch.ones_like(q) * 10, ramp, v)
    if not torch.isfinite(rising).all():
        raise Wrong("large scores overflow: subtract the maximum of a row (TODO 2)")
    wanted = attention(torch.ones_like(q) * 10, ramp, v, causal)
    close("rising scores (TODO 3)", rising, wanted, 1e-3)


def row_mask(my: Any) -> None:
    """Chapter 9: a foreign block with large scores."""
    q, k, v = inputs(32, 4, 16)
    ids = torch.tensor([[0, 0], [0, 0], [0, 0], [0, 0], *[[0, 1]] * 4], dtype=torch.int32)
    masks = torch.tensor([[15, 0]] * 4 + [[5, 15]] * 4)
    counts = torch.tensor([1] * 4 + [2] * 4, dtype=torch.int32)
    selected = torch.ones(32, 2, dtype=torch.bool)
    selected[16:, 0] = torch.arange(16, 32) % 2 == 0  # even queries read block 0 as well
    mask = selected.repeat_interleave(16, 1).tril()
    mask[:16, 16:] = False
    for words, factor in (("random scores", 1.0), ("a foreign block with scores near 3000", 1e3)):
        loud = k.clone()
        loud[:16] *= factor
        got = my.attend(q, loud, v, ids, masks, counts, 16, 4)
        wanted = attention(q, loud, v, mask)
        wrong = ~((got - wanted).abs().amax((1, 2)) < 1e-3)
        if wrong.any():
            query = int(wrong.nonzero()[0])
            raise Wrong(f"{words}: query {query} differs, and it selected blocks "
                        f"{selected[query].nonzero().flatten().tolist()}")  # fmt: skip


CHECKS: dict[int, Check] = {8: dense_kernel, 9: row_mask}
"""The check of each chapter."""
