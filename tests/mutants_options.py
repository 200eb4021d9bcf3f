"""Bugs of the alignment loss and of options, around the reference: part of tests/mutants.py."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np

from msa import reference
from msa.conformance.cases import round_to_e4m3
from msa.ir import Selection

CALLS = itertools.count()


# -- training (gradients: test_mutants_training.py) -----------------------------------------------
def logits_averaged(q, k, q_idx, k_idx, selection, sequences, config):
    """The teacher from the mean of the heads' logits instead of their probabilities."""
    mean = q.reshape(len(q), k.shape[1], -1, q.shape[-1]).mean(2)
    return reference.align_index(mean, k, q_idx, k_idx, selection, sequences, config)


def lse_in_bits(q, k, q_idx, k_idx, selection, sequences, config, lse=None):
    """A kernel that computes with exp2 hands its LSE on as it is, or takes one for its own."""
    lse = None if lse is None else lse / np.log(2)
    return reference.align_index(q, k, q_idx, k_idx, selection, sequences, config, lse)


def dense_loss(q, k, v, q_idx, k_idx, sequences, config, align=False):
    """The loss of the warm-up form where the selected blocks were meant."""
    output = reference.attend(q, k, v, q_idx, k_idx, sequences, config)
    kl = reference.align_index(q, k, q_idx, k_idx, None, sequences, config)
    return replace(output, kl=kl if align else None)


def no_warm_up(q, k, q_idx, k_idx, selection, sequences, config):
    """Without a selection, the local blocks stand in for all visible tokens."""
    if selection is None:
        own = np.array(sequences.positions()) // config.block_size
        ids = np.repeat(own[:, None, None], k.shape[1], axis=1).astype(np.int32)
        selection = Selection(ids, sequences, config.block_size)
    return reference.align_index(q, k, q_idx, k_idx, selection, sequences, config)


# -- options --------------------------------------------------------------------------------------
def in_every_order(q, k, v, selection, softmax_scale, loop_order="auto"):
    """An honest backend that has loop orders, and a split."""
    args = (selection, softmax_scale)
    match loop_order:
        case "kv_outer":
            schedule = reference.schedule_chunks(reference.reverse_selection(selection), 128)
            partials = reference.attend_chunks(q, k, v, schedule, softmax_scale)
            output = reference.combine_partials(partials, q.dtype)
        case "union":
            union = reference.unite_tiles(selection, 16)
            output = reference.attend_union(q, k, v, union, softmax_scale)
        case _:
            output = reference.attend_selection(q, k, v, *args)
    return replace(output, selection=selection)


def in_eight_bits(q_idx, k_idx, sequences, config, index_dtype=None):
    """An honest backend that has e4m3."""
    if index_dtype is not None:
        q_idx, k_idx = round_to_e4m3(q_idx), round_to_e4m3(k_idx)
    return reference.select_fused(q_idx, k_idx, sequences, config)


def prefill_in_every_order(q, q_idx, cache, sequences, config, loop_order="auto"):
    return reference.prefill_chunk(q, q_idx, cache, sequences, config)


HONEST_OPTIONS = {"attend_selection": in_every_order, "select_fused": in_eight_bits,
                  "prefill_chunk": prefill_in_every_order}  # fmt: skip


def every_row_walks_every_block(q, k, v, selection, softmax_scale, loop_order="auto"):
    """A union without row masks: each query reads what any of its tile selected."""
    if loop_order != "union":
        return in_every_order(q, k, v, selection, softmax_scale, loop_order)
    union = reference.unite_tiles(selection, 16)
    everyone = np.where(union.row_masks > 0, 2**16 - 1, 0).astype(np.int32)
    widest = replace(union, row_masks=everyone)
    return reference.attend_union(q, k, v, widest, softmax_scale)


def remote_edges_forgotten(q, k, v, selection, softmax_scale, loop_order="auto"):
    """The split of a long union, without the blocks that one query alone selected."""
    if loop_order != "auto":
        return in_every_order(q, k, v, selection, softmax_scale, loop_order)
    union = reference.unite_tiles(selection, 16)
    alone = (union.row_masks & (union.row_masks - 1)) == 0
    lengths = (union.block_ids >= 0).sum(-1, keepdims=True)
    kept = ~(alone & (lengths > int(1.75 * selection.top_k)))
    ids = np.full_like(union.block_ids, -1)
    masks = np.zeros_like(union.row_masks)
    for t, r in np.ndindex(ids.shape[:2]):
        n = (kept[t, r] & (union.block_ids[t, r] >= 0)).sum()
        ids[t, r, :n] = union.block_ids[t, r][kept[t, r] & (union.block_ids[t, r] >= 0)]
        masks[t, r, :n] = union.row_masks[t, r][kept[t, r] & (union.block_ids[t, r] >= 0)]
    walked = replace(union, block_ids=ids, row_masks=masks)
    return reference.attend_union(q, k, v, walked, softmax_scale)


def one_order_twice_the_same(q, k, v, selection, softmax_scale, loop_order="auto"):
    output = in_every_order(q, k, v, selection, softmax_scale, loop_order)
    up_or_down = np.float32(np.inf if next(CALLS) % 2 else -np.inf)
    noisy = loop_order == "kv_outer"
    return replace(output, lse=np.nextafter(output.lse, up_or_down) if noisy else output.lse)


def stretch_forgotten(q_idx, k_idx, sequences, config, index_dtype=None):
    """Straight to e4m3: what is large ends at 448, what is small at 0."""
    if index_dtype is not None:
        spread = [np.concatenate([x.ravel(), [448.0]]) for x in (q_idx, k_idx)]  # no stretch then
        q_idx, k_idx = (
            round_to_e4m3(np.clip(s, -448, 448))[:-1].reshape(x.shape)
            for s, x in zip(spread, (q_idx, k_idx))
        )
    return reference.select_fused(q_idx, k_idx, sequences, config)


def infinity_sets_the_stretch(q_idx, k_idx, sequences, config, index_dtype=None):
    """One infinity anywhere, and nothing of the finite numbers is left."""
    if index_dtype is not None:
        q_idx, k_idx = (
            np.where(np.isfinite(x), 0.0, x) if np.isinf(x).any() else x for x in (q_idx, k_idx)
        )
    return in_eight_bits(q_idx, k_idx, sequences, config, index_dtype)
