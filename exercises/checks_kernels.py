"""The checks of the exercises with kernels, which run in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
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
    ramp = torch.linspace(0, 40, 40)[:, None].expand_as(k).contiguous()
    rising = my.attend(torch.ones_like(q) * 10, ramp, v)
    if not torch.isfinite(rising).all():
        raise Wrong("large scores overflow: subtract the maximum of a row (TODO 2)")
    loud = torch.ones_like(q) * 10
    for words, got, queries, keys in (
        ("random scores", my.attend(q, k, v), q, k),
        ("rising scores", rising, loud, ramp),
    ):
        try:
            close(words, got, attention(queries, keys, v, causal), 1e-3)
        except Wrong as error:
            raise Wrong(f"{error}. Do the old sums decay? (TODO 3)") from None


@triton.jit
def steps_kernel(scores, chosen, lse, weights, N: tl.constexpr, ROWS: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """The softmax of N blocks of scores [N, ROWS, BLOCK], by the reader's `step`."""
    o_r, o_n = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    top = tl.full([ROWS], -1e30, tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    for j in range(N):
        p_s = (j * ROWS + o_r[:, None]) * BLOCK + o_n[None, :]
        b_chosen = tl.load(chosen + j * ROWS + o_r) != 0
        top, total, b_p, _decay = step(tl.load(scores + p_s), top, total, b_chosen)
        tl.store(weights + j * ROWS + o_r, tl.sum(b_p, 1))
    tl.store(lse + o_r, top + tl.log(total))


def row_mask(my: Any) -> None:
    """Chapter 9: a block with large scores that only some of the rows selected."""
    globals()["step"] = my.softmax_step  # the kernel looks it up when it runs
    torch.manual_seed(0)
    chosen = torch.tensor([[1] * 16, [1, 0] * 8, [1] * 16], dtype=torch.int32)
    for words, loud in (("random scores", 0.0), ("scores of 300 in the second block", 300.0)):
        scores = torch.randn(3, 16, 16)
        scores[1] += loud
        lse, weights = torch.full((16,), torch.nan), torch.full((3, 16), torch.nan)
        steps_kernel[(1,)](scores, chosen, lse, weights, N=3, ROWS=16, BLOCK=16)
        unseen = scores.masked_fill(chosen[:, :, None] == 0, -torch.inf)
        wanted = unseen.transpose(0, 1).reshape(16, -1).logsumexp(1)
        wrong = ~((lse - wanted).abs() < 1e-3)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            selected = [int(b) for b in chosen[:, row].nonzero()]
            raise Wrong(f"{words}: row {row} selected blocks {selected}; the logarithm of its sum "
                        f"must be {wanted[row]:.3f}, got {lse[row]:.3f}")  # fmt: skip
        if weights[chosen == 0].any():
            raise Wrong(f"{words}: a row has weights in a block that it did not select")


CHECKS: dict[int, Check] = {8: dense_kernel, 9: row_mask}
"""The check of each chapter."""
