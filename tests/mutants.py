"""Known kinds of bugs, each a few lines around the reference, and the property that must find it.

Most of them were found in implementations of sparse attention by others.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
from mutants_index import (
    forced_by_a_large_score,
    infinite_scores_left_out,
    least_token_decides,
    local_block_first,
    local_block_missing,
    mean_for_maximum,
    nan_ranks_first,
    nan_taken_for_infinity,
    one_product_too_few,
    ties_to_the_higher_id,
)

from msa import reference
from msa.config import MSAConfig
from msa.conformance import Domain
from msa.conformance.backends import OPTIONS as OPTION_NAMES
from msa.conformance.cases import Case, Fill, PagedCase, Picks, ScoresCase, round_to_e4m3
from msa.conformance.yardstick import Attention, block_mask
from msa.ir import Output, Partials, Selection, Sequences

DOMAIN = Domain(
    ("float64", "float32", "float16"), missing=frozenset({"api", "backward"}), options=OPTION_NAMES
)


# -- attention ------------------------------------------------------------------------------------
def attend_with(mask_of_blocks):
    """attend_selection over a wrong mask."""

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
    """The last block of a sequence is read to its full length, with the tokens behind it."""
    ids, sequences = selection.indices, selection.sequences
    mask = block_mask(ids, sequences, selection.block_size)
    for qs, ks in sequences.spans():
        blocks = -(-(ks.stop - ks.start) // selection.block_size)
        if qs.stop > qs.start:
            mask[qs.stop - 1, :, ks.stop : ks.start + blocks * selection.block_size] = True
    return mask


def queries_are_the_first_tokens(q, k, v, q_idx, k_idx, sequences, config):
    """The queries are the first tokens: right for a full prefill, wrong for a chunk."""
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
    """All sequences are treated as one, if all of them are whole prefills."""
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


def stale_lengths(q, q_idx, cache, config):
    """The lengths are those of the step before, without the newest token of each sequence."""
    n = q.shape[1]
    stale = np.where(cache.lengths > n, cache.lengths - 1, cache.lengths)
    return reference.decode_step(q, q_idx, replace(cache, lengths=stale), config)


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
    """-1 is used as a block id."""
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
    """Partial results are combined without the LSE as weight."""
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


# -- training (gradients: test_mutants_training.py) -----------------------------------------------
def logits_averaged(q, k, q_idx, k_idx, selection, sequences, config):
    """The teacher is made of the mean of the heads' logits instead of their probabilities."""
    mean = q.reshape(len(q), k.shape[1], -1, q.shape[-1]).mean(2)
    return reference.align_index(mean, k, q_idx, k_idx, selection, sequences, config)


def lse_in_bits(q, k, q_idx, k_idx, selection, sequences, config, lse=None):
    """A kernel with exp2 returns its LSE to the base 2, or takes a given LSE as such a one."""
    lse = None if lse is None else lse / np.log(2)
    return reference.align_index(q, k, q_idx, k_idx, selection, sequences, config, lse)


def dense_loss(q, k, v, q_idx, k_idx, sequences, config, align=False):
    """The loss is that of the warm-up form although blocks were selected."""
    output = reference.attend(q, k, v, q_idx, k_idx, sequences, config)
    kl = reference.align_index(q, k, q_idx, k_idx, None, sequences, config)
    return replace(output, kl=kl if align else None)


def no_warm_up(q, k, q_idx, k_idx, selection, sequences, config):
    """Without a selection, the loss uses the local blocks instead of all visible tokens."""
    if selection is None:
        own = np.array(sequences.positions()) // config.block_size
        ids = np.repeat(own[:, None, None], k.shape[1], axis=1).astype(np.int32)
        selection = Selection(ids, sequences, config.block_size)
    return reference.align_index(q, k, q_idx, k_idx, selection, sequences, config)


# -- options --------------------------------------------------------------------------------------
def in_every_order(q, k, v, selection, softmax_scale, loop_order="auto"):
    """A correct backend with loop orders and a split of unions."""
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
    """A correct backend with e4m3."""
    if index_dtype is not None:
        q_idx, k_idx = round_to_e4m3(q_idx), round_to_e4m3(k_idx)
    return reference.select_fused(q_idx, k_idx, sequences, config)


HONEST_OPTIONS = {"attend_selection": in_every_order, "select_fused": in_eight_bits}


def every_row_walks_every_block(q, k, v, selection, softmax_scale, loop_order="auto"):
    """A union without row masks: each query reads all blocks that a query of its tile selected."""
    if loop_order != "union":
        return in_every_order(q, k, v, selection, softmax_scale, loop_order)
    union = reference.unite_tiles(selection, 16)
    everyone = np.where(union.row_masks > 0, 2**16 - 1, 0).astype(np.int32)
    widest = replace(union, row_masks=everyone)
    return reference.attend_union(q, k, v, widest, softmax_scale)


def remote_edges_forgotten(q, k, v, selection, softmax_scale, loop_order="auto"):
    """The split of a long union loses the blocks that only one query selected."""
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
    """Numbers are rounded to e4m3 without a scale: large ones become 448, small ones 0."""
    if index_dtype is not None:
        spread = [np.concatenate([x.ravel(), [448.0]]) for x in (q_idx, k_idx)]  # no stretch then
        q_idx, k_idx = (
            round_to_e4m3(np.clip(s, -448, 448))[:-1].reshape(x.shape)
            for s, x in zip(spread, (q_idx, k_idx))
        )
    return reference.select_fused(q_idx, k_idx, sequences, config)


def infinity_sets_the_stretch(q_idx, k_idx, sequences, config, index_dtype=None):
    """If one number is infinite, the scale is too, and all finite numbers become 0."""
    if index_dtype is not None:
        q_idx, k_idx = (
            np.where(np.isfinite(x), 0.0, x) if np.isinf(x).any() else x for x in (q_idx, k_idx)
        )
    return in_eight_bits(q_idx, k_idx, sequences, config, index_dtype)


# -- cases that show the bugs ---------------------------------------------------------------------
def case(*keys, queries=None, block=1, top_k=1, local=1, group=1, **more):
    """A case with these numbers of keys. All tokens are queries, or the last few. It is small.

    Tensors are zeros unless they are given.
    """
    borders = (tuple(itertools.accumulate(n, initial=0)) for n in (queries or keys, keys))
    config = MSAConfig(block_size=block, top_k=top_k, local_blocks=local)
    more = {"picks": Picks()} | more
    return Case(config, Sequences(*borders), 1, group, (1, 1, 1), "float64", **more)


def scores(n, top_k=1, fill=Fill()):  # noqa: B008
    """Block scores of one prefill of n tokens in blocks of one."""
    return ScoresCase(MSAConfig(block_size=1, top_k=top_k), Sequences.one(n, n), 1, fill)


LONG_UNION = case(48, queries=(28,), block=4, top_k=2, picks=Picks("spread", 1), v=Fill("normal"))
WHOLE = Fill("normal", 1)
MUTANTS = [  # the property that finds the bug, the functions with the bug, a case that shows it
    ("r1_a_packed_sequence_is_as_if_alone", {"attend": borders_forgotten}, case(1, 1)),
    (
        "r2_decoding_is_the_same_rule",
        {"decode_step": stale_lengths},
        PagedCase(case(2, queries=(1,)), live=(True,), seed=0, spare_pages=0, spare_columns=0),
    ),
    (
        "r2_a_chunk_is_the_tail_of_the_whole",
        {"attend": queries_are_the_first_tokens},
        case(3, v=Fill("normal"), tile_size=1),
    ),
    (
        "r4_integer_scores_are_exact_and_nan_is_minus_infinity",
        {"score_blocks": nan_ranks_first},
        case(1, k_idx=Fill(planted=((0, np.nan),))),
    ),
    (
        "r4_scores_are_scaled_products",
        {"score_blocks": one_product_too_few},
        case(1, q_idx=Fill("normal"), k_idx=Fill("normal")),
    ),
    (
        "r4_a_nan_score_is_never_preferred",
        {"select_fused": nan_taken_for_infinity},
        case(3, top_k=2, q_idx=Fill("ties"), k_idx=Fill(planted=((0, np.nan),))),
    ),
    (
        "r5_the_best_token_decides",
        {"select_fused": least_token_decides},
        case(3, queries=(1,), top_k=2, q_idx=Fill("ties"), k_idx=Fill("ties")),
    ),
    (
        "r6_nothing_outranks_a_forced_block",
        {"select_fused": forced_by_a_large_score},
        case(3, top_k=2, local=2),
    ),
    (
        "r5_block_scores_are_raw_maxima_of_visible_tokens",
        {"score_blocks": mean_for_maximum},
        case(1, q_idx=Fill("ties"), k_idx=Fill("ties")),
    ),
    (
        "r6_local_and_sink_blocks_are_always_in",
        {"select_blocks": local_block_missing},
        scores(2),
    ),
    ("r7_ties_go_to_the_lower_id", {"select_blocks": ties_to_the_higher_id}, scores(3, top_k=2)),
    (
        "r7_all_visible_blocks_when_they_are_few",
        {"select_blocks": infinite_scores_left_out},
        scores(2, top_k=2, fill=Fill(planted=((0, -np.inf), (2, -np.inf)))),
    ),
    ("r8_a_selection_is_canonical", {"select_fused": local_block_first}, case(2, top_k=2)),
    (
        "r9_attention_over_a_selection_is_the_definition",
        {"attend_selection": attend_with(off_by_one)},
        case(2, v=Fill("normal")),
    ),
    (
        "r9_attention_over_a_selection_is_the_definition",
        {"attend_selection": attend_with(tail_block_in_full)},
        case(1, 1, block=2, v=Fill("normal")),
    ),
    (
        "r9_the_union_of_a_tile_means_the_selection",
        {"unite_tiles": bit_of_the_wrong_row},
        case(2, tile_size=2),
    ),
    (
        "r10_lse_is_the_natural_logarithm_in_float32",
        {"attend_selection": binary_logarithm},
        case(1, q=Fill("ties"), k=Fill("ties")),
    ),
    (
        "r10_lse_of_the_whole_path_too",
        {"attend": binary_logarithm_of_the_whole},
        case(2, block=2),
    ),
    (
        "r11_with_many_places_it_is_causal_attention",
        {"attend": one_place_too_few},
        case(2, v=Fill("normal")),
    ),
    ("r12_out_has_the_dtype_of_q", {"attend": always_float32}, case(0)),
    (
        "r13_the_reverse_index_means_the_selection",
        {"reverse_selection": padding_dereferenced},
        case(1, top_k=2),
    ),
    (
        "r13_slots_are_ranks_and_queries_ascend",
        {"reverse_selection": slots_from_the_end},
        case(1, top_k=2),
    ),
    (
        "r14_the_schedule_means_the_reverse_index",
        {"schedule_chunks": last_edge_of_a_full_chunk_lost},
        case(2, block=2, chunk_size=2),
    ),
    (
        "r14_items_are_bounded_and_cover_each_edge_once",
        {"schedule_chunks": chunks_across_rows},
        case(2, chunk_size=2),
    ),
    (
        "r15_partials_are_softmaxes_over_one_block",
        {"attend_chunks": slots_swapped},
        case(1, top_k=2, v=Fill("normal")),
    ),
    (
        "r16_combining_is_the_definition",
        {"combine_partials": plain_mean},
        case(2, top_k=2, q=WHOLE, k=WHOLE, v=WHOLE, picks=Picks("sink")),
    ),
    (
        "r16_combining_is_the_definition",
        {"combine_partials": unowned_slots_read},
        case(1, top_k=2, v=Fill("normal")),
    ),
    (
        "r17_the_loss_is_the_kl_over_selected_tokens",
        {"align_index": logits_averaged},
        case(3, block=4, group=2, q=WHOLE, k=WHOLE),
    ),
    (
        "r17_the_warm_up_form_is_dense",
        {"align_index": no_warm_up},
        case(2, q_idx=Fill("ties", 2), k_idx=Fill("ties")),
    ),
    ("r17_a_known_lse_changes_nothing", {"align_index": lse_in_bits}, case(2)),
    (
        "r17_one_call_gives_the_loss_too",
        {"attend": dense_loss},
        case(2, q_idx=Fill("ties", 2), k_idx=Fill("ties")),
    ),
    (
        "r19_the_same_call_gives_the_same_bits",
        {"attend": nothing_twice_the_same},
        case(1, q=WHOLE, k=WHOLE, v=WHOLE, q_idx=WHOLE, k_idx=WHOLE),
    ),
    (
        "r19_the_same_selection_gives_the_same_bits",
        {"attend_selection": no_selection_twice_the_same},
        case(1, q=WHOLE, k=WHOLE, v=WHOLE),
    ),
    (
        "r9_every_loop_order_is_the_definition",
        {"attend_selection": every_row_walks_every_block},
        LONG_UNION,
    ),
    (
        "r9_every_loop_order_is_the_definition",
        {"attend_selection": remote_edges_forgotten},
        LONG_UNION,
    ),
    (
        "r19_every_loop_order_gives_the_same_bits",
        {"attend_selection": one_order_twice_the_same},
        LONG_UNION,
    ),
    (
        "r7_eight_bits_differ_only_within_rounding",
        {"select_fused": stretch_forgotten},
        case(4, top_k=2, q_idx=Fill("normal"), k_idx=Fill("tiny")),
    ),
    (
        "r7_eight_bits_select_by_the_rounded_tensors",
        {"select_fused": infinity_sets_the_stretch},
        case(
            4,
            top_k=3,
            q_idx=Fill(planted=((3, -np.inf),)),
            k_idx=Fill("ties", planted=((1, -np.inf),)),
        ),
    ),
]
