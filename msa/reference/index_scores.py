"""Index branch: a score for every block (eq. 6, R4-R5)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from msa.config import MSAConfig
from msa.ir import Array, BlockScores, Sequences


def score_tokens(
    q_idx: Float[Array, "n_q Hkv Di"], k_idx: Float[Array, "n_k Di"], scale: float
) -> Float[Array, "n_q Hkv n_k"]:
    """S = scale * <q_idx, k_idx> for one sequence, future tokens and NaN at -inf (R4).

    >>> score_tokens(np.array([[[2.0]]]), np.array([[1.0], [np.nan], [3.0]]), scale=0.5)
    array([[[  1., -inf,   3.]]])
    """
    n_q, n_k = len(q_idx), len(k_idx)
    with np.errstate(invalid="ignore", over="ignore"):
        scores = scale * np.einsum(
            "irc,jc->irj", q_idx.astype(np.float64), k_idx.astype(np.float64)
        )
    scores[np.isnan(scores)] = -np.inf
    position = n_k - n_q + np.arange(n_q)  # R2: queries are the last tokens
    future = np.arange(n_k)[None, :] > position[:, None]
    scores[np.broadcast_to(future[:, None, :], scores.shape)] = -np.inf
    return scores


def score_blocks(
    q_idx: Float[Array, "Tq Hkv Di"], k_idx: Float[Array, "Tk Di"],
    sequences: Sequences, config: MSAConfig,
) -> BlockScores:  # fmt: skip
    """M = the highest visible token score of each block: raw maxima, no exp (R5)."""
    block = config.block_size
    values = np.full((*q_idx.shape[:2], sequences.max_blocks(block)), -np.inf)
    for qs, ks in sequences.spans():
        scores = score_tokens(q_idx[qs], k_idx[ks], config.index_scale_for(q_idx.shape[-1]))
        for b, start in enumerate(range(0, scores.shape[-1], block)):
            values[qs, :, b] = scores[..., start : start + block].max(axis=-1)
    return BlockScores(values, sequences, block)
