"""Lowering, fourth arrow: weigh the partial results by their LSE and add up (R16)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from msa.ir import Output, Partials

SUMS = 2**17
"""Numbers of one sum of slots on a CPU, which then stays in the cache."""


def combine_partials(partials: Partials, dtype: Any = None) -> Output:
    """Weigh each slot by exp(its LSE - the total LSE) and add up (R16).

    Args:
        partials: out [Tq, Hq, k, Dv], lse [Tq, Hq, k]; unowned slots may hold NaN.
        dtype: that of `out`; None means that of the partials.

    Returns:
        out [Tq, Hq, Dv] in dtype, lse float32 [Tq, Hq].

    >>> slots = torch.tensor([1.0, 4.0, torch.nan]).view(1, 1, 3, 1)
    >>> lse = torch.tensor([1.0, 3.0, torch.nan]).log().view(1, 1, 3)
    >>> combine_partials(Partials(slots, lse, torch.tensor([[2]]))).out  # (1 + 3 * 4) / 4
    tensor([[[3.2500]]])
    """
    groups = partials.counts.shape[1]
    by_edge, lse = (
        x.unflatten(1, (groups, -1)).transpose(2, 3) for x in (partials.out, partials.lse)
    )  # fmt: skip
    out, lse = weigh_slots(Slots(by_edge, lse, None, partials.counts))
    return Output(out.to(dtype or partials.out.dtype), lse.float())


@dataclass(frozen=True)
class Slots:
    """Partials before the logarithm: the LSE of a slot is its top plus the logarithm of its total.

    In one float32 number the logarithm would be lost beside a large logit; two numbers keep both.
    """

    out: Float[Tensor, "Tq Hkv k G Dv"]
    top: Float[Tensor, "Tq Hkv k G"]
    """The highest logit."""
    total: Float[Tensor, "Tq Hkv k G"] | None
    """The sum of exp(logit - top); None: 1 everywhere."""
    counts: Int[Tensor, "Tq Hkv"]


def weigh_slots(slots: Slots) -> tuple[Float[Tensor, "Tq Hq Dv"], Float[Tensor, "Tq Hq"]]:
    """The combination, out in the precision of the slots' out, lse in that of their tops."""
    totals = None if slots.total is None else by_head(slots.total)
    top, shares = row_shares(by_head(slots.top), totals, slots.counts)
    total = shares.sum(-1)
    weights = (shares / total[..., None]).to(slots.out.dtype)
    weights = weights.unflatten(1, (slots.counts.shape[1], -1)).transpose(2, 3)
    out = slots.out.new_zeros(slots.out[:, :, 0].shape)
    # A few queries at a time, so that their sum stays in the cache: the slots are read once.
    step = max(1, SUMS // max(1, out[:1].numel()))
    parts = (x.split(step) for x in (out, weights[..., None], slots.out, slots.counts))
    for some, b_w, b_x, counts in zip(*parts):
        few = bool((counts < b_x.shape[2]).any())
        for j in range(b_x.shape[2]):
            # 0 * NaN can occur only where slots are free: for the first queries of a sequence
            x = (
                torch.where((j < counts)[..., None, None], b_x[:, :, j], 0.0)
                if few
                else b_x[:, :, j]
            )
            some.addcmul_(b_w[:, :, j], x)
    return out.flatten(1, 2), top + total.log()


def by_head(x: Float[Tensor, "Tq Hkv k G"]) -> Float[Tensor, "Tq Hq k"]:
    """Numbers of edges and their heads with the heads before the slots."""
    return x.transpose(2, 3).flatten(1, 2)


def row_shares(
    tops: Float[Tensor, "Tq Hq k"],
    totals: Float[Tensor, "Tq Hq k"] | None,
    counts: Int[Tensor, "Tq Hkv"],
) -> tuple[Float[Tensor, "Tq Hq"], Float[Tensor, "Tq Hq k"]]:
    """The highest logit of each row, and each slot's part of the sum of exp(logit - that)."""
    valid = filled(tops, counts)
    tops = torch.where(valid, tops, -torch.inf)
    top = tops.amax(-1)
    shares = (tops - top[..., None]).exp()
    return top, shares if totals is None else torch.where(valid, shares * totals, 0.0)


def filled(
    tops: Float[Tensor, "Tq Hq k"], counts: Int[Tensor, "Tq Hkv"]
) -> Bool[Tensor, "Tq Hq k"]:
    """The slots that belong to an edge; all others may hold anything."""
    counts = counts.repeat_interleave(tops.shape[1] // counts.shape[1], dim=1)
    return torch.arange(tops.shape[2], device=counts.device) < counts[..., None]
