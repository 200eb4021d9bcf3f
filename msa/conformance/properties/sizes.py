"""R2, R7, R9, R17, R18 if one size is large: k, heads, sequences or blocks."""

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
from msa.conformance.properties import holds_for, prefill, sequences, training
from msa.conformance.properties.not_finite import attend_some_way
from msa.conformance.run_stage import attend, compare_output, dense, select_fused, selected, spec
from msa.conformance.strategies import MILD
from msa.conformance.tolerances import Measure, same
from msa.ir import Sequences

LARGE = strategies.large_cases
large_reals = partial(LARGE, want=MILD)


def many(n_q: int, blocks: int, top_k: int) -> Case:
    """A few queries of one head over many blocks of 16 tokens, more blocks than k."""
    return Case(
        config=MSAConfig(16, top_k),
        sequences=Sequences.one(n_q, 16 * blocks),
        groups=1,
        group=1,
        dims=(1, 1, 2),
        dtype="float32",
        q=Fill("normal", 2),  # with this seed attend_some_way uses attend_union, if there is one
        k=Fill("normal", 1),
        v=Fill("normal", 3),
        q_idx=Fill("ties", 4),
        k_idx=Fill("integers", 5),
        picks=Picks("spread", 6),
    )


PLACES = tuple(many(2, k + 40, k) for k in (256, 257))
"""Values of k at which a count of 8 bits overflows."""
LONG_UNION = many(16, 2100, 128)
"""Sixteen neighbours with 128 blocks each, nearly all of them different."""


@holds_for(LARGE, needs=("select_fused",), seeds=PLACES, cost=2)
def r7_large_sizes_select_the_same(subject: Subject, case: Case) -> Measure:
    """With large k or many blocks, heads or sequences the selection equals that of the spec."""
    got, want = (select_fused(s, case.inputs) for s in (subject, spec(subject)))
    return same("selection", got.indices, want.indices)


@holds_for(LARGE, needs=("attend_selection",), seeds=(LONG_UNION,), cost=2)
def r9_large_sizes_are_the_definition(subject: Subject, case: Case) -> Measure:
    """Attention over large selections is the definition, in each loop order of the backend."""
    output = attend_some_way(subject, case, case.inputs)
    return compare_output(subject, case.inputs, output, dense(case.inputs, case.selection.indices))


@holds_for(LARGE, needs=("attend",), cost=2)
def r9_large_sizes_of_the_whole_path(subject: Subject, case: Case) -> Measure:
    """For large sizes the whole path is the selection of the spec and the softmax over it."""
    output, want = attend(subject, case.inputs), select_fused(spec(subject), case.inputs)
    same("selection", selected(output), want.indices)
    return compare_output(subject, case.inputs, output, dense(case.inputs, want.indices))


@st.composite
def large_pages(draw: DrawFn, domain: Domain) -> PagedCase:
    """A decoding step in which one size is large and every slot of the batch holds a sequence."""
    case = draw(LARGE(domain))
    lengths = np.diff(case.sequences.cu_seqlens_k)
    lengths = np.maximum(lengths, 1)
    n = 1 + (case.sequences.batch == 1 and len(lengths) == 1 and bool(lengths[0] > 1))
    queries = tuple(n * s for s in range(len(lengths) + 1))
    keys = tuple(int(x) for x in np.concatenate([[0], np.cumsum(lengths)]))
    case = replace(case, sequences=Sequences(queries, keys))
    return PagedCase(case, (True,) * len(lengths), draw(st.integers(0, 9999)), 1, 1)


@holds_for(large_pages, needs=("decode_step",), cost=2)
def r2_large_sizes_decode_by_the_same_rule(subject: Subject, paged: PagedCase) -> Measure:
    """For large sizes decoding from shuffled pages equals attention over packed keys."""
    return sequences.r2_decoding_is_the_same_rule.check(subject, paged)


@st.composite
def large_prefills(draw: DrawFn, domain: Domain) -> PagedCase:
    """A prefill over pages in which one size is large."""
    case = draw(LARGE(domain))
    return PagedCase(case, (True,) * case.sequences.batch, draw(st.integers(0, 9999)), 1, 1)


@holds_for(large_prefills, needs=("prefill_chunk",), cost=2)
def r2_large_sizes_prefill_by_the_same_rule(subject: Subject, paged: PagedCase) -> Measure:
    """For large sizes prefill over shuffled pages equals attention over packed keys."""
    return prefill.r2_prefilling_is_the_same_rule.check(subject, paged)


@holds_for(large_reals, needs=("attend_selection", "backward"), cost=2)
def r18_large_sizes_have_gradients(subject: Subject, case: Case) -> Measure:
    """For large sizes dq, dk and dv lie within their error bounds."""
    return training.r18_gradients_in_every_dtype.check(subject, case)


@holds_for(large_reals, needs=("align_index", "backward"), cost=2)
def r17_large_sizes_have_gradients(subject: Subject, case: Case) -> Measure:
    """For large sizes the gradients of the loss in q_idx and k_idx lie within their bounds."""
    return training.r17_gradients_reach_the_index_branch_only.check(subject, case)
