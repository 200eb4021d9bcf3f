"""Bugs of the index branch, each a few lines around the reference: part of tests/mutants.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from msa import reference
from msa.ir import BlockScores, Selection


def nan_ranks_first(q_idx, k_idx, sequences, config):
    scores = reference.score_blocks(q_idx, k_idx, sequences, config)
    values = scores.values.copy()
    for qs, ks in sequences.spans():
        own = np.array(sequences.positions())[qs] // config.block_size
        for b, start in enumerate(range(ks.start, ks.stop, config.block_size)):
            stop = min(start + config.block_size, ks.stop)
            rotten = np.isnan(k_idx[start:stop]).any()
            values[qs, :, b] = np.where(rotten & (own >= b)[:, None], np.inf, values[qs, :, b])
    return BlockScores(values, sequences, config.block_size)


def mean_for_maximum(q_idx, k_idx, sequences, config):
    scores = reference.score_blocks(q_idx, k_idx, sequences, config)
    return replace(scores, values=np.where(np.isfinite(scores.values), scores.values / 2, -np.inf))


def one_product_too_few(q_idx, k_idx, sequences, config):
    return reference.score_blocks(q_idx[..., 1:], k_idx[..., 1:], sequences, replace(
        config, index_scale=config.index_scale_for(q_idx.shape[-1])))  # fmt: skip


def ties_to_the_higher_id(scores, config):
    """Selects by scores that rise a little along the row. This changes only ties."""
    order = np.arange(scores.values.shape[-1])
    rank = np.zeros_like(scores.values)
    for i, r in np.ndindex(scores.values.shape[:2]):
        rank[i, r, np.lexsort((order, scores.values[i, r]))] = order
    return reference.select_blocks(replace(scores, values=rank), config)


def local_block_missing(scores, config):
    """The local block is selected by its score, like any other block."""
    ids = reference.select_blocks(scores, config).indices.copy()
    for i, p in enumerate(scores.sequences.positions()):
        own = p // scores.block_size
        for r in range(ids.shape[1]):
            best = sorted(range(own + 1), key=lambda b: (-scores.values[i, r, b], b))
            ids[i, r] = -1
            kept = sorted(best[: config.top_k])
            ids[i, r, : len(kept)] = kept
    return Selection(ids, scores.sequences, scores.block_size)


def infinite_scores_left_out(scores, config):
    """-inf counts as "not visible", even if all visible blocks fit."""
    ids = reference.select_blocks(scores, config).indices.copy()
    for i, r, s in np.argwhere(ids >= 0).tolist():
        own = scores.sequences.positions()[i] // scores.block_size
        if np.isneginf(scores.values[i, r, ids[i, r, s]]) and ids[i, r, s] != own:
            ids[i, r, s] = own
    for i, r in np.ndindex(ids.shape[:2]):
        kept = np.unique(ids[i, r][ids[i, r] >= 0])
        ids[i, r] = np.pad(kept, (0, config.top_k - len(kept)), constant_values=-1)
    return Selection(ids, scores.sequences, scores.block_size)


def local_block_first(q_idx, k_idx, sequences, config):
    """The ids are in the order of a top-k call: own block first, then the others."""
    selection = reference.select_fused(q_idx, k_idx, sequences, config)
    ids = selection.indices.copy()
    for i, r in np.ndindex(ids.shape[:2]):
        count = (ids[i, r] >= 0).sum()
        ids[i, r, :count] = np.roll(ids[i, r, :count], 1)
    return replace(selection, indices=ids)


def nan_taken_for_infinity(q_idx, k_idx, sequences, config):
    return reference.select_fused(q_idx, np.nan_to_num(k_idx, nan=8.0), sequences, config)


def least_token_decides(q_idx, k_idx, sequences, config):
    return reference.select_fused(-q_idx, k_idx, sequences, config)


def forced_by_a_large_score(q_idx, k_idx, sequences, config):
    """The own block gets the score 1e29, which is lower than +inf."""
    scores = reference.score_blocks(q_idx, k_idx, sequences, config)
    values, ids = scores.values.copy(), np.full((*q_idx.shape[:2], config.top_k), -1, np.int32)
    for i, p in enumerate(sequences.positions()):
        own = p // config.block_size
        values[i, :, own] = 1e29
        for r in range(q_idx.shape[1]):
            best = sorted(range(own + 1), key=lambda b: (-values[i, r, b], b))[: config.top_k]
            ids[i, r, : len(best)] = sorted(best)
    return Selection(ids, sequences, config.block_size)
