"""R3-R6 for a function that only returns the selection, not the block scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from msa.conformance import strategies
from msa.conformance.backends import Domain, Subject
from msa.conformance.cases import Case, Fill, ScoresCase
from msa.conformance.properties import holds_for
from msa.conformance.properties.index import loop_over_blocks, visible_and_forced
from msa.conformance.run_stage import select_fused
from msa.conformance.strategies import Want
from msa.conformance.tolerances import AGREES, EXACT, Measure, require, same
from msa.ir import Array

FINITE = Want(planted=False)
finite = partial(strategies.cases, want=FINITE)
LONGER = Want(batch=(1, 2), tokens=48)


def forced_of(case: Case, i: int) -> tuple[range, set[int]]:
    """The visible blocks of query i, and those of them that R6 forces."""
    return visible_and_forced(ScoresCase(case.config, case.sequences, case.groups, case.q_idx), i)


def require_best(case: Case, ids: Array) -> Measure:
    """Check that no visible block with a higher score than a chosen block was left out.

    For equal scores see R7. The inputs are small integers, so scores compare alike in every dtype.
    """
    scores, _ = loop_over_blocks(case, EXACT)
    for i, rows in enumerate(ids.tolist()):
        visible, forced = forced_of(case, i)
        for r, row in enumerate(rows):
            chosen = set(row) & set(visible)
            worst = min((scores[i, r, b] for b in chosen - forced), default=-np.inf)
            better = [b for b in visible if b not in chosen and scores[i, r, b] > worst]
            free = len(chosen) < case.config.top_k or bool(chosen - forced)
            require(
                not (better and free),
                f"query {i}, group {r} must prefer blocks {better} of scores "
                f"{[float(scores[i, r, b]) for b in better]}, got {row}",
            )
    return AGREES


def without(fill: Fill, unwanted: Callable[[float], bool]) -> Fill:
    """The same fill without the unwanted planted numbers."""
    return replace(fill, planted=tuple(p for p in fill.planted if not unwanted(p[1])))


@st.composite
def contested(draw: DrawFn, domain: Domain, unwanted: Callable[[float], bool]) -> Case:
    """One place is left beside the forced blocks, and several blocks compete for it."""
    case = draw(strategies.cases(domain, LONGER))
    return replace(
        case,
        config=replace(case.config, top_k=case.config.forced_blocks + 1),
        q_idx=without(case.q_idx, unwanted),
        k_idx=without(case.k_idx, unwanted),
    )


with_nan = partial(contested, unwanted=math.isinf)
numbers = partial(contested, unwanted=lambda number: not math.isfinite(number))


@holds_for(with_nan, needs=("select_fused",))
def r4_a_nan_score_is_never_preferred(subject: Subject, case: Case) -> Measure:
    """NaN counts as -inf: a block whose scores are all NaN comes after every other block."""
    return require_best(case, select_fused(subject, case.inputs).indices)


@holds_for(numbers, needs=("select_fused",))
def r5_the_best_token_decides(subject: Subject, case: Case) -> Measure:
    """Blocks are chosen by the highest score of their visible tokens."""
    return require_best(case, select_fused(subject, case.inputs).indices)


@holds_for(strategies.cases, needs=("select_fused",))
def r6_nothing_outranks_a_forced_block(subject: Subject, case: Case) -> Measure:
    """Own, local and sink blocks are selected even if other scores are +inf or NaN."""
    for i, rows in enumerate(select_fused(subject, case.inputs).indices.tolist()):
        _, forced = forced_of(case, i)
        for r, ids in enumerate(rows):
            missing = sorted(forced - set(ids))
            require(not missing, f"query {i}, group {r} must have blocks {missing}, got {ids}")
    return AGREES


@holds_for(finite, needs=("select_fused", "left_padding"))
def r3_padding_on_the_left_shifts_no_block(subject: Subject, case: Case) -> Measure:
    """Padding before the first token changes no selection: blocks count from this token."""
    padded = select_fused(subject, case.inputs, left_padding=case.chunk_size)
    return same("selection", padded.indices, select_fused(subject, case.inputs).indices)
