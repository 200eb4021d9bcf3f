"""R4-R8: scores, forced blocks, top-k, canonical form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from msa.conformance import strategies
from msa.conformance.backends import REFERENCE, Subject
from msa.conformance.cases import Case, ScoresCase
from msa.conformance.properties import holds_for
from msa.conformance.run_stage import score_blocks, select_fused, spec
from msa.conformance.tolerances import (
    AGREES,
    EXACT,
    Measure,
    Precision,
    compare,
    require,
    same,
)
from msa.conformance.yardstick import product_sizes
from msa.ir import Array, BlockScores, Selection, Sequences

REAL = strategies.REAL_INDEX


def select(subject: Subject, scores: BlockScores, case: Case | ScoresCase) -> Selection:
    """Call select_blocks on scores that are exact in float32."""
    return subject.run("select_blocks", scores, case.config, cast="float32")


def token_scores(case: Case, precision: Precision) -> tuple[Array, Array]:
    """The token scores S [Tq, Hkv, Tk] and their error bounds, from the sum and the scale."""
    q, k = case.inputs.index
    keys, scale = np.repeat(k[:, None], q.shape[1], axis=1), case.inputs.index_scale
    with np.errstate(invalid="ignore", over="ignore"):
        scores = scale * np.einsum("irc,jc->irj", q, k)
        bounds = np.zeros_like(scores)
        for p in (precision, EXACT):
            sizes, errors = product_sizes(q, keys, p)
            bounds += scale * (errors + 4 * p.work * sizes)
    scores = np.where(np.isnan(scores), -np.inf, scores)
    return scores, np.where(np.isfinite(bounds), bounds, 0.0)


def loop_over_blocks(case: Case, precision: Precision) -> tuple[Array, Array]:
    """The block scores M [Tq, Hkv, NB] by definition (eq. 6), and their error bounds.

    The bound of a block is the largest bound of its tokens.
    """
    block = case.config.block_size
    blocks = case.sequences.max_blocks(block)
    scores, bounds = token_scores(case, precision)
    found = np.full((*scores.shape[:2], blocks), -np.inf)
    bound = np.zeros_like(found)
    for qs, ks in case.sequences.spans():
        for i in range(qs.start, qs.stop):
            visible = range(ks.stop - ks.start - (qs.stop - i) + 1)
            for j in visible:
                b = j // block
                found[i, :, b] = np.maximum(found[i, :, b], scores[i, :, ks.start + j])
                bound[i, :, b] = np.maximum(bound[i, :, b], bounds[i, :, ks.start + j])
    return found, bound


@holds_for(partial(strategies.cases, want=REAL), needs=("score_blocks",))
def r4_scores_are_scaled_products(subject: Subject, case: Case) -> Measure:
    """Scores of real numbers lie within their error bound around float64."""
    want, bound = loop_over_blocks(case, subject.domain.precision(case.dtype))
    got = score_blocks(subject, case.inputs)
    return compare("scores", got.values, want, bound + 2.0**-126)


@holds_for(strategies.cases, needs=("score_blocks",))
def r4_integer_scores_are_exact_and_nan_is_minus_infinity(subject: Subject, case: Case) -> Measure:
    """Scores of small integers are exact if the scale is a power of two; NaN counts as -inf."""
    case = replace(case, config=replace(case.config, index_scale=0.5))
    want, _ = loop_over_blocks(case, EXACT)
    return same("scores", score_blocks(subject, case.inputs).values.astype(np.float64), want)


@holds_for(strategies.cases, needs=("score_blocks",))
def r5_block_scores_are_raw_maxima_of_visible_tokens(subject: Subject, case: Case) -> Measure:
    """A block has the highest score of its visible tokens, or -inf if none is visible."""
    got = score_blocks(subject, case.inputs)
    want, bound = loop_over_blocks(case, subject.domain.precision(case.dtype))
    same("block_size", got.block_size, case.config.block_size)
    own = np.array(case.sequences.positions(), int) // case.config.block_size
    hidden = np.arange(want.shape[-1]) > own[:, None]
    require(
        bool(np.isneginf(got.values.transpose(0, 2, 1)[hidden]).all()),
        "a block that is not visible must score -inf",
    )
    return compare("scores", got.values, want, bound)


def visible_and_forced(case: ScoresCase, i: int) -> tuple[range, set[int]]:
    """The visible blocks of query i, and those of them that R6 forces."""
    config = case.config
    visible = range(case.sequences.positions()[i] // config.block_size + 1)
    return visible, {*visible[: config.sink_blocks], *visible[-config.local_blocks :]}


@dataclass(frozen=True)
class Row:
    """What one query selected for one group, and what it chose from."""

    name: str
    """The query and the group, for messages."""
    ids: list[int]
    scores: Array
    visible: range
    forced: set[int]


def rows_of(selection: Selection, case: ScoresCase) -> Iterator[Row]:
    """One row for each query and group."""
    for i, groups in enumerate(selection.indices.tolist()):
        choice = visible_and_forced(case, i)
        for r, ids in enumerate(groups):
            yield Row(f"query {i}, group {r}", ids, case.scores.values[i, r], *choice)


@holds_for(strategies.scores_cases, needs=("select_blocks",))
def r6_local_and_sink_blocks_are_always_in(subject: Subject, case: ScoresCase) -> Measure:
    """The first and the last visible blocks are selected, whatever the scores are."""
    selection = select(subject, case.scores, case)
    for row in rows_of(selection, case):
        missing = sorted(row.forced - set(row.ids))
        require(not missing, f"{row.name} must have blocks {missing}, got {row.ids}")
    return AGREES


@holds_for(strategies.scores_cases, needs=("select_blocks",))
def r7_ties_go_to_the_lower_id(subject: Subject, case: ScoresCase) -> Measure:
    """Blocks are chosen by the highest score, and among equal scores by the lower id."""
    selection = select(subject, case.scores, case)
    for row in rows_of(selection, case):
        chosen = {b for b in row.ids if b >= 0}
        want = min(case.config.top_k, len(row.visible))
        require(len(chosen) == want, f"{row.name} must have {want} blocks, got {row.ids}")
        rank = {b: (-row.scores[b], b) for b in row.visible}
        last = max((rank[b] for b in chosen - row.forced), default=None)
        better = [b for b in set(row.visible) - chosen if last is not None and rank[b] < last]
        require(not better, f"{row.name} must prefer blocks {better}, got {row.ids}")
    return same("selection", selection.indices, spec_selection(case).indices)


def spec_selection(case: ScoresCase) -> Selection:
    """The selection of the reference for the same scores."""
    return REFERENCE.select_blocks(case.scores, case.config)


@holds_for(strategies.scores_cases, needs=("select_blocks",))
def r7_all_visible_blocks_when_they_are_few(subject: Subject, case: ScoresCase) -> Measure:
    """If at most k blocks are visible, all are selected, even with a score of -inf."""
    selection = select(subject, case.scores, case)
    for row in rows_of(selection, case):
        if len(row.visible) <= case.config.top_k:
            want = [*row.visible] + [-1] * (case.config.top_k - len(row.visible))
            require(row.ids == want, f"{row.name} must have {want}, got {row.ids}")
    return AGREES


@holds_for(strategies.scores_cases, needs=("select_blocks",))
def r7_a_selection_depends_on_its_scores_alone(subject: Subject, case: ScoresCase) -> Measure:
    """A query selects the same blocks alone as among other queries."""
    everyone = select(subject, case.scores, case)
    last = [qs.stop - 1 for qs, _ in case.sequences.spans() if qs.stop > qs.start]
    counts = [min(1, qs.stop - qs.start) for qs, _ in case.sequences.spans()]
    cu_q = np.cumsum([0, *counts]).tolist()
    few = Sequences(tuple(cu_q), case.sequences.cu_seqlens_k)
    scores = BlockScores(case.scores.values[last], few, case.config.block_size)
    return same("selection", select(subject, scores, case).indices, everyone.indices[last])


@holds_for(strategies.cases, needs=("select_fused",))
def r7_integer_scores_select_the_same_everywhere(subject: Subject, case: Case) -> Measure:
    """For small integers, NaN and infinities the selection equals that of the spec."""
    want = select_fused(spec(subject), case.inputs)
    return same("selection", select_fused(subject, case.inputs).indices, want.indices)


@holds_for(strategies.cases, needs=("score_blocks", "select_blocks", "select_fused"))
def r7_fused_selection_is_the_two_steps(subject: Subject, case: Case) -> Measure:
    """select_fused gives the same as score_blocks and then select_blocks."""
    fused = select_fused(subject, case.inputs)
    scores = score_blocks(subject, case.inputs)
    stepped = subject.run("select_blocks", scores, case.config, cast=str(scores.values.dtype))
    return same("selection", fused.indices, stepped.indices)


@holds_for(partial(strategies.cases, want=REAL), needs=("select_fused",))
def r7_real_scores_differ_only_within_rounding(subject: Subject, case: Case) -> Measure:
    """A block differs from the choice in float64 only if its score is close to the k-th score."""
    got = select_fused(subject, case.inputs)
    precision = subject.domain.precision(case.dtype)
    return require_equal_up_to_rounding(subject, case, got, precision)


def require_equal_up_to_rounding(
    subject: Subject, case: Case, selection: Selection, precision: Precision
) -> Measure:
    """Check that a selection differs from that of the spec only by rounding.

    Blocks may differ if rounding can move their scores past the k-th score.
    """
    got, want = selection.indices, select_fused(spec(subject), case.inputs).indices
    scores, bounds = loop_over_blocks(case, precision)
    bounds = bounds + 2.0**-126
    scores_case = ScoresCase(case.config, case.sequences, case.groups, case.q_idx)
    for i, r in np.argwhere((got != want).any(-1)).tolist():
        ours, theirs = ({b for b in ids[i, r].tolist() if b >= 0} for ids in (got, want))
        _, forced = visible_and_forced(scores_case, i)
        chosen = [scores[i, r, b] for b in theirs - forced]
        slack = 2 * bounds[i, r].max()
        far = [b for b in ours ^ theirs if not chosen or abs(scores[i, r, b] - min(chosen)) > slack]
        require(
            not far and len(ours) == len(theirs),
            f"query {i}, group {r} must have {sorted(theirs)} up to rounding, got {sorted(ours)}",
        )
    return AGREES


@holds_for(strategies.cases, needs=("select_fused",))
def r8_a_selection_is_canonical(subject: Subject, case: Case) -> Measure:
    """Ids are int32 [Tq, Hkv, k]: ascending, unique, then -1; the last one is the own block."""
    selection = select_fused(subject, case.inputs)
    ids = selection.indices
    require(ids.dtype == np.int32, f"indices must be int32, got {ids.dtype}")
    same("shape", ids.shape, (case.sequences.total_q, case.groups, case.config.top_k))
    for i, p in enumerate(case.sequences.positions()):
        for r, row in enumerate(ids[i].tolist()):
            valid = [b for b in row if b != -1]
            ascending = valid == sorted(set(valid)) and row[: len(valid)] == valid
            require(
                ascending and valid[-1:] == [p // case.config.block_size],
                f"query {i}, group {r} must be ascending, end with its own block "
                f"{p // case.config.block_size} and then hold -1, got {row}",
            )
    selection.validate()
    return AGREES
