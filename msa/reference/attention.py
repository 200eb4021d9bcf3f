"""Main branch: the definition of MSA, by a dense mask (eq. 8, R9-R12)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from msa.config import MSAConfig
from msa.ir import Array, Output, Selection, Sequences
from msa.reference.alignment import align_index
from msa.reference.denote import mask_of
from msa.reference.selection import select_fused
from msa.reference.softmax import head_logits, masked_softmax


def attend_selection(
    q: Float[Array, "Tq Hq D"], k: Float[Array, "Tk Hkv D"], v: Float[Array, "Tk Hkv Dv"],
    selection: Selection, softmax_scale: float,
) -> Output:  # fmt: skip
    """Softmax over the selected visible tokens, times v; out in q's dtype, lse float32 (R12)."""
    group = q.shape[1] // k.shape[1]
    n_q, heads = q.shape[:2]
    mask = np.repeat(mask_of(selection), group, axis=1)
    probabilities, lse = masked_softmax(head_logits(q, k, softmax_scale), mask)
    out = np.empty((n_q, heads, v.shape[-1]))
    for i, h in np.ndindex(
        n_q, heads
    ):  # tokens outside the support are not read, so NaN there does no harm
        read = mask[i, h]
        out[i, h] = probabilities[i, h, read] @ v[read, h // group].astype(np.float64)
    return Output(out.astype(q.dtype), lse.astype(np.float32), selection)


def attend(
    q: Float[Array, "Tq Hq D"], k: Float[Array, "Tk Hkv D"], v: Float[Array, "Tk Hkv Dv"],
    q_idx: Float[Array, "Tq Hkv Di"], k_idx: Float[Array, "Tk Di"],
    sequences: Sequences, config: MSAConfig, align: bool = False,
) -> Output:  # fmt: skip
    """MSA: the index branch selects, the main branch attends (R4-R12); align adds a loss (R17)."""
    selection = select_fused(q_idx, k_idx, sequences, config)
    output = attend_selection(q, k, v, selection, config.softmax_scale_for(q.shape[-1]))
    kl = align_index(q, k, q_idx, k_idx, selection, sequences, config) if align else None
    return Output(output.out, output.lse, selection, kl)
