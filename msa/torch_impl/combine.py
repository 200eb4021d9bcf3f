"""Lowering, fourth arrow: weigh the partial results by their LSE and add up (R16)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
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
    out, lse = weigh_slots(partials)
    return Output(out.to(dtype or partials.out.dtype), lse.float())


def weigh_slots(
    partials: Partials,
) -> tuple[Float[Tensor, "Tq Hq Dv"], Float[Tensor, "Tq Hq"]]:
    """The combination in the precision of the partials."""
    _, heads, top_k, _ = partials.out.shape
    group = heads // partials.counts.shape[1]
    counts = partials.counts.repeat_interleave(group, dim=1)
    valid = torch.arange(top_k, device=counts.device) < counts[..., None]
    slot_lse = torch.where(valid, partials.lse, -torch.inf)
    lse = slot_lse.logsumexp(-1)
    weights = (slot_lse - lse[..., None]).exp()
    # A product of [1, k] by [k, Dv] for every head reads the slots once and writes no copy of them.
    out = torch.matmul(weights[..., None, :], partials.out)[..., 0, :]
    # Only where slots are free may 0 * NaN have crept in: the first few queries of a sequence.
    few = (counts < top_k).any(-1).nonzero()[:, 0]
    clean = torch.where(valid[few, ..., None], partials.out[few], 0.0)
    out[few] = torch.matmul(weights[few][..., None, :], clean)[..., 0, :]
    return out, lse
