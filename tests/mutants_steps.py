"""Bugs of the main branch and of the lowering, around the reference: part of tests/mutants.py."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np

from msa import reference
from msa.conformance.yardstick import Attention, block_mask
from msa.ir import Output, Partials, Selection, Sequences


# -- attention ------------------------------------------------------------------------------------
def attend_with(mask_of_blocks):
    """attend_selection over a spoiled mask."""

    def attend_selection(q, k, v, selection, softmax_scale):
        mask = mask_of_blocks(selection)
        dense = Attention(*(x.astype(float) for x in (q, k, v)), mask, softmax_scale)
        return Output(dense.out.astype(q.dtype), dense.lse.astype(np.float32), selection)

    return attend_selection


def off_by_one(selection):
    """Each query sees the token after its own, if there is one in the packed keys."""
    ids, sequences = selection.indices, selection.sequences
    mask = block_mask(ids, sequences, selection.block_size)
    for i, p in enumerate(sequences.positions()):
        s = np.searchsorted(sequences.cu_seqlens_q, i, side="right") - 1
        mask[i, :, sequences.cu_seqlens_k[s] + p + 1 :][:, :1] = True
    return mask


def tail_block_in_full(selection):
    """A sequence's last block is read to its full length, into whatever comes after it."""
    ids, sequences = selection.indices, selection.sequences
    mask = block_mask(ids, sequences, selection.block_size)
    for qs, ks in sequences.spans():
        blocks = -(-(ks.stop - ks.start) // selection.block_size)
        if qs.stop > qs.start:
            mask[qs.stop - 1, :, ks.stop : ks.start + blocks * selection.block_size] = True
    return mask


def queries_are_the_first_tokens(q, k, v, q_idx, k_idx, sequences, config):
    """Alignment at the top left: right for a full prefill, wrong for a chunk."""
    if any(qs.stop - qs.start == ks.stop - ks.start for qs, ks in sequences.spans()):
        return reference.attend(q, k, v, q_idx, k_idx, sequences, config)
    keep = [
        j for qs, ks in sequences.spans() for j in range(ks.start, ks.start + qs.stop - qs.start)
    ]
    short = Sequences(sequences.cu_seqlens_q, sequences.cu_seqlens_q)
    output = reference.attend(q, k[keep], v[keep], q_idx, k_idx[keep], short, config)
    return replace(
        output, selection=Selection(output.selection.indices, sequences, config.block_size)
    )


def borders_forgotten(q, k, v, q_idx, k_idx, sequences, config):
    """All sequences as one, when all of them are whole prefills."""
    if sequences.cu_seqlens_q != sequences.cu_seqlens_k:
        return reference.attend(q, k, v, q_idx, k_idx, sequences, config)
    one = Sequences.one(len(q), len(k))
    return reference.attend(q, k, v, q_idx, k_idx, one, config)


def always_float32(*args):
    output = reference.attend(*args)
    return replace(output, out=output.out.astype(np.float32))


def binary_logarithm(*args):
    output = reference.attend_selection(*args)
    return replace(output, lse=(output.lse / np.log(2)).astype(np.float32))


def binary_logarithm_of_the_whole(*args):
    output = reference.attend(*args)
    return replace(output, lse=(output.lse / np.log(2)).astype(np.float32))


def one_place_too_few(q, k, v, q_idx, k_idx, sequences, config):
    small = replace(config, top_k=max(config.top_k - 1, config.forced_blocks))
    return reference.attend(q, k, v, q_idx, k_idx, sequences, small)


def stale_lengths(q, q_idx, cache, config, ids=None):
    """The lengths of the step before: the newest token of each sequence is not there yet."""
    n = q.shape[1]
    stale = np.where(cache.lengths > n, cache.lengths - 1, cache.lengths)
    return reference.decode_step(q, q_idx, replace(cache, lengths=stale), config, ids)


def blocks_of_its_own(q, q_idx, cache, config, ids=None):
    """Of the given ids only the last one is read, which is the own block."""
    if ids is not None:
        ids = np.where(ids == ids.max(-1, keepdims=True), ids, -1)
        ids = -np.sort(-ids, axis=-1)
    return reference.decode_step(q, q_idx, cache, config, ids)


def the_chunk_is_not_there_yet(q, q_idx, cache, sequences, config, loop_order="auto"):
    """The queries attend to the tokens before the last one only, where they can."""
    keys = np.diff(sequences.cu_seqlens_k)
    keys -= keys > np.diff(sequences.cu_seqlens_q)
    borders = (0, *np.cumsum(keys).tolist())
    older, fewer = replace(cache, lengths=keys), replace(sequences, cu_seqlens_k=borders)
    return reference.prefill_chunk(q, q_idx, older, fewer, config)


def pages_in_the_order_of_the_pool(q, q_idx, cache, sequences, config, loop_order="auto"):
    """The table is not read: block b of the first sequence is taken from page b."""
    table = cache.page_table.copy()
    blocks = sequences.cu_blocks(config.block_size)
    for s in range(sequences.batch):
        table[s, : blocks[s + 1] - blocks[s]] = range(blocks[s], blocks[s + 1])
    return reference.prefill_chunk(q, q_idx, replace(cache, page_table=table), sequences, config)


CALLS = itertools.count()


def nothing_twice_the_same(*args):
    output = reference.attend(*args)
    up_or_down = np.float32(np.inf if next(CALLS) % 2 else -np.inf)
    return replace(output, lse=np.nextafter(output.lse, up_or_down))


def no_selection_twice_the_same(*args):
    output = reference.attend_selection(*args)
    up_or_down = np.float32(np.inf if next(CALLS) % 2 else -np.inf)
    return replace(output, lse=np.nextafter(output.lse, up_or_down))


# -- the lowering ---------------------------------------------------------------------------------
def padding_dereferenced(selection):
    """-1 is taken for a block id."""
    ids = np.where(selection.indices < 0, 0, selection.indices)
    return reference.reverse_selection(replace(selection, indices=ids.astype(np.int32)))


def slots_from_the_end(selection):
    index = reference.reverse_selection(selection)
    return replace(index, slots=(selection.top_k - 1 - index.slots).astype(np.int32))


def last_edge_of_a_full_chunk_lost(reverse_index, chunk_size):
    schedule = reference.schedule_chunks(reverse_index, chunk_size)
    full = schedule.stops - schedule.starts == max(2, chunk_size)
    return replace(schedule, stops=schedule.stops - full)


def chunks_across_rows(reverse_index, chunk_size):
    edges = int(reverse_index.row_offsets[-1])
    schedule = reference.schedule_chunks(reverse_index, chunk_size)
    starts = np.arange(0, edges, chunk_size)
    stops = np.minimum(starts + chunk_size, edges)
    rows = np.searchsorted(reverse_index.row_offsets, starts, side="right") - 1
    return replace(schedule, rows=rows.astype(np.int32), starts=starts, stops=stops)


def slots_swapped(*args):
    partials = reference.attend_chunks(*args)
    return replace(partials, out=partials.out[:, :, ::-1], lse=partials.lse[:, :, ::-1])


def plain_mean(partials, dtype=None):
    """Combining without the LSE as weight."""
    output = reference.combine_partials(partials, dtype)
    flat = Partials(partials.out, np.zeros_like(partials.lse), partials.counts)
    return replace(output, out=reference.combine_partials(flat, dtype).out)


def unowned_slots_read(partials, dtype=None):
    everything = np.full_like(partials.counts, partials.out.shape[2])
    return reference.combine_partials(replace(partials, counts=everything), dtype)


def bit_of_the_wrong_row(selection, tile_size):
    union = reference.unite_tiles(selection, tile_size)
    masks = np.where(union.row_masks > 1, union.row_masks >> 1, union.row_masks)
    return replace(union, row_masks=masks.astype(np.int32))
