"""Index branch: the blocks that each query and group reads (eq. 7, R6-R8)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from msa.config import MSAConfig
from msa.ir import Array, BlockScores, Selection, Sequences
from msa.reference.index_scores import score_blocks


def choose_row(scores: Float[Array, " NB"], own_block: int, config: MSAConfig) -> list[int]:
    """The selected blocks of one query and group, ascending.

    >>> import math
    >>> choose_row(np.array([5.0, 7.0, 7.0, 1.0, -math.inf]), 3, MSAConfig(top_k=2))
    [1, 3]
    """
    visible = range(own_block + 1)
    forced = {*visible[: config.sink_blocks], *visible[-config.local_blocks :]}
    rest = [b for b in visible if b not in forced]
    rest.sort(key=lambda b: (-scores[b], b))  # R7: best first, ties to the lower id
    return sorted([*forced, *rest[: config.top_k - len(forced)]])


def select_blocks(scores: BlockScores, config: MSAConfig) -> Selection:
    """Forced blocks, then the best of the others, in canonical form (R6-R8)."""
    n_q, groups, _ = scores.values.shape
    indices = np.full((n_q, groups, config.top_k), -1, np.int32)
    for i, p in enumerate(scores.sequences.positions()):
        for r in range(groups):
            chosen = choose_row(scores.values[i, r], p // scores.block_size, config)
            indices[i, r, : len(chosen)] = chosen
    return Selection(indices, scores.sequences, scores.block_size)


def select_fused(
    q_idx: Float[Array, "Tq Hkv Di"], k_idx: Float[Array, "Tk Di"],
    sequences: Sequences, config: MSAConfig,
) -> Selection:  # fmt: skip
    """The two steps one after the other: the spec fuses nothing."""
    return select_blocks(score_blocks(q_idx, k_idx, sequences, config), config)
