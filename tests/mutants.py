"""Known kinds of bugs, each a few lines around the reference, and the property that must see it.

Most of them were found in other people's implementations of sparse attention.
"""

from __future__ import annotations

import itertools

import mutants_index as index
import mutants_options as options
import mutants_steps as steps
import numpy as np

from msa.config import MSAConfig
from msa.conformance import Domain
from msa.conformance.backends import OPTIONS as OPTION_NAMES
from msa.conformance.cases import Case, Fill, PagedCase, Picks, ScoresCase
from msa.ir import Sequences

DOMAIN = Domain(
    ("float64", "float32", "float16"), missing=frozenset({"api", "backward"}), options=OPTION_NAMES
)


# -- cases that show them -------------------------------------------------------------------------
def case(*keys, queries=None, block=1, top_k=1, local=1, group=1, **more):
    """Sequences of so many keys, all of them queries or the last few; the rest as small as it goes.

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
MUTANTS = [  # the property that sees it, the functions that are spoiled, a case that shows it
    ("r1_a_packed_sequence_is_as_if_alone", {"attend": steps.borders_forgotten}, case(1, 1)),
    (
        "r2_decoding_is_the_same_rule",
        {"decode_step": steps.stale_lengths},
        PagedCase(case(2, queries=(1,)), live=(True,), seed=0, spare_pages=0, spare_columns=0),
    ),
    (
        "r2_decoding_takes_given_blocks",
        {"decode_step": steps.blocks_of_its_own},
        PagedCase(case(3, queries=(1,), top_k=3), (True,), 0, 0, 0),
    ),
    (
        "r2_prefilling_is_the_same_rule",
        {"prefill_chunk": steps.the_chunk_is_not_there_yet},
        PagedCase(case(2, queries=(1,), v=Fill("normal")), (True,), 0, 0, 0),
    ),
    (
        "r2_prefilling_is_the_same_rule",
        {"prefill_chunk": steps.pages_in_the_order_of_the_pool},
        PagedCase(case(3, v=Fill("normal")), (True,), 0, 0, 0),
    ),
    (
        "r2_a_chunk_is_the_tail_of_the_whole",
        {"attend": steps.queries_are_the_first_tokens},
        case(3, v=Fill("normal"), tile_size=1),
    ),
    (
        "r4_integer_scores_are_exact_and_nan_is_minus_infinity",
        {"score_blocks": index.nan_ranks_first},
        case(1, k_idx=Fill(planted=((0, np.nan),))),
    ),
    (
        "r4_scores_are_scaled_products",
        {"score_blocks": index.one_product_too_few},
        case(1, q_idx=Fill("normal"), k_idx=Fill("normal")),
    ),
    (
        "r4_a_nan_score_is_never_preferred",
        {"select_fused": index.nan_taken_for_infinity},
        case(3, top_k=2, q_idx=Fill("ties"), k_idx=Fill(planted=((0, np.nan),))),
    ),
    (
        "r5_the_best_token_decides",
        {"select_fused": index.least_token_decides},
        case(3, queries=(1,), top_k=2, q_idx=Fill("ties"), k_idx=Fill("ties")),
    ),
    (
        "r6_nothing_outranks_a_forced_block",
        {"select_fused": index.forced_by_a_large_score},
        case(3, top_k=2, local=2),
    ),
    (
        "r5_block_scores_are_raw_maxima_of_visible_tokens",
        {"score_blocks": index.mean_for_maximum},
        case(1, q_idx=Fill("ties"), k_idx=Fill("ties")),
    ),
    (
        "r6_local_and_sink_blocks_are_always_in",
        {"select_blocks": index.local_block_missing},
        scores(2),
    ),
    (
        "r7_ties_go_to_the_lower_id",
        {"select_blocks": index.ties_to_the_higher_id},
        scores(3, top_k=2),
    ),
    (
        "r7_all_visible_blocks_when_they_are_few",
        {"select_blocks": index.infinite_scores_left_out},
        scores(2, top_k=2, fill=Fill(planted=((0, -np.inf), (2, -np.inf)))),
    ),
    ("r8_a_selection_is_canonical", {"select_fused": index.local_block_first}, case(2, top_k=2)),
    (
        "r9_attention_over_a_selection_is_the_definition",
        {"attend_selection": steps.attend_with(steps.off_by_one)},
        case(2, v=Fill("normal")),
    ),
    (
        "r9_attention_over_a_selection_is_the_definition",
        {"attend_selection": steps.attend_with(steps.tail_block_in_full)},
        case(1, 1, block=2, v=Fill("normal")),
    ),
    (
        "r9_the_union_of_a_tile_means_the_selection",
        {"unite_tiles": steps.bit_of_the_wrong_row},
        case(2, tile_size=2),
    ),
    (
        "r10_lse_is_the_natural_logarithm_in_float32",
        {"attend_selection": steps.binary_logarithm},
        case(1, q=Fill("ties"), k=Fill("ties")),
    ),
    (
        "r10_lse_of_the_whole_path_too",
        {"attend": steps.binary_logarithm_of_the_whole},
        case(2, block=2),
    ),
    (
        "r11_with_many_places_it_is_causal_attention",
        {"attend": steps.one_place_too_few},
        case(2, v=Fill("normal")),
    ),
    ("r12_out_has_the_dtype_of_q", {"attend": steps.always_float32}, case(0)),
    (
        "r13_the_reverse_index_means_the_selection",
        {"reverse_selection": steps.padding_dereferenced},
        case(1, top_k=2),
    ),
    (
        "r13_slots_are_ranks_and_queries_ascend",
        {"reverse_selection": steps.slots_from_the_end},
        case(1, top_k=2),
    ),
    (
        "r14_the_schedule_means_the_reverse_index",
        {"schedule_chunks": steps.last_edge_of_a_full_chunk_lost},
        case(2, block=2, chunk_size=2),
    ),
    (
        "r14_items_are_bounded_and_cover_each_edge_once",
        {"schedule_chunks": steps.chunks_across_rows},
        case(2, chunk_size=2),
    ),
    (
        "r15_partials_are_softmaxes_over_one_block",
        {"attend_chunks": steps.slots_swapped},
        case(1, top_k=2, v=Fill("normal")),
    ),
    (
        "r16_combining_is_the_definition",
        {"combine_partials": steps.plain_mean},
        case(2, top_k=2, q=WHOLE, k=WHOLE, v=WHOLE, picks=Picks("sink")),
    ),
    (
        "r16_combining_is_the_definition",
        {"combine_partials": steps.unowned_slots_read},
        case(1, top_k=2, v=Fill("normal")),
    ),
    (
        "r17_the_loss_is_the_kl_over_selected_tokens",
        {"align_index": options.logits_averaged},
        case(3, block=4, group=2, q=WHOLE, k=WHOLE),
    ),
    (
        "r17_the_warm_up_form_is_dense",
        {"align_index": options.no_warm_up},
        case(2, q_idx=Fill("ties", 2), k_idx=Fill("ties")),
    ),
    ("r17_a_known_lse_changes_nothing", {"align_index": options.lse_in_bits}, case(2)),
    (
        "r17_one_call_gives_the_loss_too",
        {"attend": options.dense_loss},
        case(2, q_idx=Fill("ties", 2), k_idx=Fill("ties")),
    ),
    (
        "r19_the_same_call_gives_the_same_bits",
        {"attend": steps.nothing_twice_the_same},
        case(1, q=WHOLE, k=WHOLE, v=WHOLE, q_idx=WHOLE, k_idx=WHOLE),
    ),
    (
        "r19_the_same_selection_gives_the_same_bits",
        {"attend_selection": steps.no_selection_twice_the_same},
        case(1, q=WHOLE, k=WHOLE, v=WHOLE),
    ),
    (
        "r9_every_loop_order_is_the_definition",
        {"attend_selection": options.every_row_walks_every_block},
        LONG_UNION,
    ),
    (
        "r9_every_loop_order_is_the_definition",
        {"attend_selection": options.remote_edges_forgotten},
        LONG_UNION,
    ),
    (
        "r19_every_loop_order_gives_the_same_bits",
        {"attend_selection": options.one_order_twice_the_same},
        LONG_UNION,
    ),
    (
        "r7_eight_bits_differ_only_within_rounding",
        {"select_fused": options.stretch_forgotten},
        case(4, top_k=2, q_idx=Fill("normal"), k_idx=Fill("tiny")),
    ),
    (
        "r7_eight_bits_select_by_the_rounded_tensors",
        {"select_fused": options.infinity_sets_the_stretch},
        case(
            4,
            top_k=3,
            q_idx=Fill(planted=((3, -np.inf),)),
            k_idx=Fill("ties", planted=((1, -np.inf),)),
        ),
    ),
]
