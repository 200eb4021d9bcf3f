"""Logits of the main branch, and a softmax over some of them (eq. 8)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

from msa.ir import Array


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
