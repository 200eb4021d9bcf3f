"""Lowering, fourth arrow: weigh the partial results by their LSE and add up (R16)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from msa.ir import Output, Partials


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
    out, lse = weigh_slots(Slots(partials.out, partials.lse, None, partials.counts))
    return Output(out.to(dtype or partials.out.dtype), lse.float())


@dataclass(frozen=True)
class Slots:
    """Partials before the logarithm: the LSE of a slot is its top plus the logarithm of its total.

    In one float32 number the logarithm would be lost beside a large logit; two numbers keep both.
    """

    out: Float[Tensor, "Tq Hq k Dv"]
    top: Float[Tensor, "Tq Hq k"]
    """The highest logit."""
    total: Float[Tensor, "Tq Hq k"] | None
    """The sum of exp(logit - top); None: 1 everywhere."""
    counts: Int[Tensor, "Tq Hkv"]


def weigh_slots(slots: Slots) -> tuple[Float[Tensor, "Tq Hq Dv"], Float[Tensor, "Tq Hq"]]:
    """The combination, out in the precision of the slots' out, lse in that of their tops."""
    top, shares = row_shares(slots.top, slots.total, slots.counts)
    total = shares.sum(-1)
    weights = (shares / total[..., None]).to(slots.out.dtype)
    # A product of [1, k] by [k, Dv] for every head reads the slots once and writes no copy of them.
    out = torch.matmul(weights[..., None, :], slots.out)[..., 0, :]
    # 0 * NaN can occur only where slots are free: for the first few queries of a sequence.
    few = (slots.counts < slots.top.shape[2]).any(-1).nonzero()[:, 0]
    clean = torch.where(filled(slots.top[few], slots.counts[few])[..., None], slots.out[few], 0.0)
    out[few] = torch.matmul(weights[few][..., None, :], clean)[..., 0, :]
    return out, top + total.log()


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
