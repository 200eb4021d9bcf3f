"""Main branch: the definition of MSA, by a dense mask (eq. 8, R9-R12)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

from msa.config import MSAConfig
from msa.ir import Array, Output, Selection, Sequences
from msa.reference.denote import mask_of
from msa.reference.selection import select_fused


def masked_softmax(
    logits: Float[Array, "*rows Tk"], mask: Bool[Array, "*rows Tk"]
) -> tuple[Float[Array, "*rows Tk"], Float[Array, "*rows"]]:
    """Softmax over the True entries of each row, 0 elsewhere, and its natural-log LSE (R10).

    >>> p, lse = masked_softmax(np.log([[1.0, 3.0, 9.0]]), np.array([[True, True, False]]))
    >>> p.round(3), np.exp(lse).round(3)
    (array([[0.25, 0.75, 0.  ]]), array([4.]))
    """
    logits = np.where(mask, logits, -np.inf)
    top = logits.max(axis=-1, keepdims=True, initial=-np.inf)
    weights = np.exp(logits - top)
    total = weights.sum(axis=-1, keepdims=True)
    return weights / total, (top + np.log(total))[..., 0]


def head_logits(
    q: Float[Array, "Tq Hq D"], k: Float[Array, "Tk Hkv D"], scale: float
) -> Float[Array, "Tq Hq Tk"]:
    """scale * <q, k> for every query head and the key head of its group."""
    keys = np.repeat(k.astype(np.float64), q.shape[1] // k.shape[1], axis=1)
    return scale * np.einsum("ihd,jhd->ihj", q.astype(np.float64), keys)


def attend_selection(
    q: Float[Array, "Tq Hq D"],
    k: Float[Array, "Tk Hkv D"],
    v: Float[Array, "Tk Hkv Dv"],
    selection: Selection,
    softmax_scale: float,
) -> Output:
    """Softmax over the selected visible tokens, times v; out in q's dtype, lse float32 (R12)."""
    group = q.shape[1] // k.shape[1]
    n_q, heads = q.shape[:2]
    mask = np.repeat(mask_of(selection), group, axis=1)
    probabilities, lse = masked_softmax(head_logits(q, k, softmax_scale), mask)
    out = np.empty((n_q, heads, v.shape[-1]))
    for i, h in np.ndindex(n_q, heads):  # what is not in the support is not read, be it NaN
        read = mask[i, h]
        out[i, h] = probabilities[i, h, read] @ v[read, h // group].astype(np.float64)
    return Output(out.astype(q.dtype), lse.astype(np.float32), selection)


def attend(
    q: Float[Array, "Tq Hq D"],
    k: Float[Array, "Tk Hkv D"],
    v: Float[Array, "Tk Hkv Dv"],
    q_idx: Float[Array, "Tq Hkv Di"],
    k_idx: Float[Array, "Tk Di"],
    sequences: Sequences,
    config: MSAConfig,
) -> Output:
    """MSA: the index branch selects, the main branch attends (R4-R12)."""
    selection = select_fused(q_idx, k_idx, sequences, config)
    return attend_selection(q, k, v, selection, config.softmax_scale_for(q.shape[-1]))
