"""Training: how far the index branch is from the main branch (eq. 9-10, R17)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from msa.config import MSAConfig
from msa.ir import Array, Selection, Sequences
from msa.reference.denote import mask_of
from msa.reference.index_scores import score_tokens
from msa.reference.softmax import head_logits, masked_softmax


def align_index(
    q: Float[Array, "Tq Hq D"], k: Float[Array, "Tk Hkv D"],
    q_idx: Float[Array, "Tq Hkv Di"], k_idx: Float[Array, "Tk Di"],
    selection: Selection | None, sequences: Sequences, config: MSAConfig,
    lse: Float[Array, "Tq Hq"] | None = None,
) -> Float[Array, ""]:  # fmt: skip
    """KL(P || P_idx), summed over tokens, mean over queries and groups.

    The teacher P is the mean of the softmax *probabilities* of the group's heads; the student is
    the softmax of the index scores over the same support: the selected visible tokens, or all
    visible ones in the warm-up form (selection=None). lse: the LSE of the main branch over the same
    tokens, if it is known; None computes it here.

    >>> q, k = np.ones((1, 1, 1)), np.log([[[1.0]], [[3.0]]])  # P = 1/4, 3/4; P_idx = 1/2, 1/2
    >>> args = q, k, q, 0 * k[:, 0], None, Sequences.one(1, 2), MSAConfig()
    >>> align_index(*args).round(4), align_index(*args, lse=np.log([[4.0]])).round(4)
    (np.float64(0.1308), np.float64(0.1308))
    """
    n_q, groups = q_idx.shape[:2]
    loss, dtype = np.float64(0.0), np.result_type(q, q_idx, np.float32)
    if n_q == 0:
        return loss.astype(dtype)
    selected = mask_of(selection) if selection is not None else None
    for qs, ks in sequences.spans():
        n, n_keys = qs.stop - qs.start, ks.stop - ks.start
        support = np.arange(n_keys) <= (n_keys - n + np.arange(n))[:, None]
        support = np.repeat(support[:, None], groups, axis=1)
        if selected is not None:
            support = selected[qs, :, ks]
        group = q.shape[1] // groups
        logits = head_logits(q[qs], k[ks], config.softmax_scale_for(q.shape[-1]))
        mask = np.repeat(support, group, axis=1)
        if lse is None:
            per_head, _ = masked_softmax(logits, mask)
        else:
            per_head = np.exp(np.where(mask, logits, -np.inf) - lse[qs, :, None])
        teacher = per_head.reshape(n, groups, group, n_keys).mean(axis=2)
        scores = score_tokens(q_idx[qs], k_idx[ks], config.index_scale_for(q_idx.shape[-1]))
        loss += kl_divergence(teacher, log_softmax(scores, support)).sum()
    return (loss / (n_q * groups)).astype(dtype)


def log_softmax(scores: Array, support: Array) -> Array:
    """Logarithm of the student; -inf outside the support.

    Scores of +inf share all the mass; if every score is -inf, the whole support shares it.
    """
    scores = np.where(support, scores, -np.inf)
    top = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    tied_at_infinity = np.where(support & (scores == top), 0.0, -np.inf)
    finite = np.isfinite(top)
    shifted = np.where(finite, scores - np.where(finite, top, 0.0), tied_at_infinity)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def kl_divergence(teacher: Array, log_student: Array) -> Array:
    """sum P (log P - log P_idx) over the last axis; terms with P = 0 are 0.

    >>> kl_divergence(np.array([0.5, 0.5, 0.0]), np.log([0.25, 0.75, 1e-9])).round(6)
    np.float64(0.143841)
    """
    some = teacher > 0
    log_teacher = np.log(np.where(some, teacher, 1.0))
    gap = np.where(some, log_teacher - np.where(some, log_student, 0.0), 0.0)
    return (teacher * gap).sum(axis=-1)
