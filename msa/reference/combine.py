"""Lowering, fourth arrow: weigh the partial results by their LSE and add up (R16)."""

from __future__ import annotations

from typing import Any

import numpy as np

from msa.ir import Output, Partials


def combine_partials(partials: Partials, dtype: Any = None) -> Output:
    """out = sum over slots of exp(LSE_s - LSE) * O_s with LSE = logsumexp of the LSE_s.

    Softmax over a disjoint union of supports is the LSE-weighted mean of the softmaxes over its
    parts. This is why a block may be attended to alone.
    """
    _, heads, top_k, _ = partials.out.shape
    group = heads // partials.counts.shape[1]
    valid = np.arange(top_k) < np.repeat(partials.counts, group, axis=1)[..., None]
    slot_lse = np.where(valid, partials.lse, -np.inf)
    top = slot_lse.max(axis=-1, keepdims=True)
    weights = np.exp(slot_lse - top)
    total = weights.sum(axis=-1, keepdims=True)
    slot_out = np.where(valid[..., None], partials.out, 0.0)
    out = np.einsum("ihs,ihse->ihe", weights / total, slot_out)
    lse = (top + np.log(total))[..., 0]
    return Output(out.astype(dtype or partials.out.dtype), lse.astype(np.float32))
