"""R2, R7, R9, R17, R18 where one size is large: k, heads, sequences, blocks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from msa.config import MSAConfig
from msa.conformance import strategies
from msa.conformance.backends import Domain, Subject
from msa.conformance.cases import Case, Fill, PagedCase, Picks
from msa.conformance.properties import holds_for, sequences, training
from msa.conformance.properties.not_finite import attend_some_way
from msa.conformance.run_stage import attend, compare_output, dense, select_fused, selected, spec
from msa.conformance.strategies import MILD
from msa.conformance.tolerances import Measure, same
from msa.ir import Sequences

LARGE = strategies.large_cases
large_reals = partial(LARGE, want=MILD)


def many(n_q: int, blocks: int, top_k: int) -> Case:
    """A few queries of one head over many blocks of 16 tokens; more of them than places."""
    return Case(
        config=MSAConfig(16, top_k),
        sequences=Sequences.one(n_q, 16 * blocks),
        groups=1,
        group=1,
        dims=(1, 1, 2),
        dtype="float32",
        q=Fill("normal", 2),  # of the ways to attend that a backend has, the one by unions
        k=Fill("normal", 1),
        v=Fill("normal", 3),
        q_idx=Fill("ties", 4),
        k_idx=Fill("integers", 5),
        picks=Picks("spread", 6),
    )


PLACES = tuple(many(2, k + 40, k) for k in (256, 257))
"""Where a count of 8 bits would begin again."""
LONG_UNION = many(16, 2100, 128)
"""Sixteen neighbours whose 128 blocks each are nearly all different ones."""


@holds_for(LARGE, needs=("select_fused",), seeds=PLACES)
def r7_large_sizes_select_the_same(subject: Subject, case: Case) -> Measure:
    """Many places, blocks, heads or sequences: the spec's selection, bit for bit."""
    got, want = (select_fused(s, case.inputs) for s in (subject, spec(subject)))
    return same("selection", got.indices, want.indices)


@holds_for(LARGE, needs=("attend_selection",), seeds=(LONG_UNION,))
def r9_large_sizes_are_the_definition(subject: Subject, case: Case) -> Measure:
    """Over any canonical selection, by any order of the loops that the backend has."""
    output = attend_some_way(subject, case, case.inputs)
    return compare_output(subject, case.inputs, output, dense(case.inputs, case.selection.indices))


@holds_for(LARGE, needs=("attend",))
def r9_large_sizes_of_the_whole_path(subject: Subject, case: Case) -> Measure:
    """The spec's selection, then softmax over its visible tokens."""
    output, want = attend(subject, case.inputs), select_fused(spec(subject), case.inputs)
    same("selection", selected(output), want.indices)
    return compare_output(subject, case.inputs, output, dense(case.inputs, want.indices))


@st.composite
def large_pages(draw: DrawFn, domain: Domain) -> PagedCase:
    """A decoding step in which one size is large; every slot of the batch is live."""
    case = draw(LARGE(domain))
    lengths = np.diff(case.sequences.cu_seqlens_k)
    lengths = np.maximum(lengths, 1)
    n = 1 + (case.sequences.batch == 1 and len(lengths) == 1 and bool(lengths[0] > 1))
    queries = tuple(n * s for s in range(len(lengths) + 1))
    keys = tuple(int(x) for x in np.concatenate([[0], np.cumsum(lengths)]))
    case = replace(case, sequences=Sequences(queries, keys))
    return PagedCase(case, (True,) * len(lengths), draw(st.integers(0, 9999)), 1, 1)


@holds_for(large_pages, needs=("decode_step",))
def r2_large_sizes_decode_by_the_same_rule(subject: Subject, paged: PagedCase) -> Measure:
    """Decoding from shuffled pages equals attention over packed keys."""
    return sequences.r2_decoding_is_the_same_rule.check(subject, paged)


@holds_for(large_reals, needs=("attend_selection", "backward"))
def r18_large_sizes_have_gradients(subject: Subject, case: Case) -> Measure:
    """dq, dk, dv of out and lse together, within the budget carried through the chain rule."""
    return training.r18_gradients_in_every_dtype.check(subject, case)


@holds_for(large_reals, needs=("align_index", "backward"))
def r17_large_sizes_have_gradients(subject: Subject, case: Case) -> Measure:
    """The loss's gradients in q_idx and k_idx, by a selection and in the warm-up form."""
    return training.r17_gradients_reach_the_index_branch_only.check(subject, case)
