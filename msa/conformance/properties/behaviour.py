"""R19, R20: every call gives the same bits, and bad input is refused before any work."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from hypothesis import strategies as st

from msa.conformance import strategies
from msa.conformance.backends import Domain, Subject
from msa.conformance.bad_input import BadInput
from msa.conformance.bad_input.collect import BAD_INPUTS
from msa.conformance.bad_input.run import try_bad_input
from msa.conformance.cases import Case, PagedCase
from msa.conformance.gradients import (
    alignment_gradients,
    attention_and_alignment,
    attention_gradients,
)
from msa.conformance.properties import holds_for
from msa.conformance.properties.training import upstream
from msa.conformance.run_stage import attend, attend_selection, selected
from msa.conformance.strategies import Want
from msa.conformance.tolerances import AGREES, Measure, require, same
from msa.ir import Array

LARGER = Want(
    main=("normal", "zeros"), values=("normal", "zeros"), index=("normal", "ties"), tokens=96
)
larger = partial(strategies.cases, want=LARGER)


@holds_for(larger, needs=("attend",))
def r19_the_same_call_gives_the_same_bits(subject: Subject, case: Case) -> Measure:
    """Two calls of the whole path give the same bits."""
    one, two = attend(subject, case.inputs), attend(subject, case.inputs)
    same("selection", selected(one), selected(two))
    same("out", one.out, two.out)
    return same("lse", one.lse, two.lse)


@holds_for(larger, needs=("attend_selection",))
def r19_the_same_selection_gives_the_same_bits(subject: Subject, case: Case) -> Measure:
    """Two calls of attention over one selection give the same bits."""
    one, two = (attend_selection(subject, case.inputs, case.selection) for _ in range(2))
    same("out", one.out, two.out)
    return same("lse", one.lse, two.lse)


@holds_for(strategies.paged_cases, needs=("decode_step",))
def r19_decoding_gives_the_same_bits(subject: Subject, paged: PagedCase) -> Measure:
    """Two decoding steps on the same cache give the same bits."""
    args = (*paged.queries, paged.cache, paged.case.config)
    one, two = (subject.run("decode_step", *args, cast=paged.case.dtype) for _ in range(2))
    same("selection", selected(one), selected(two))
    same("lse", one.lse, two.lse)
    return same("out", one.out, two.out)


@holds_for(larger, needs=("attend_selection", "backward"))
def r19_gradients_have_the_same_bits(subject: Subject, case: Case) -> Measure:
    """Two backward passes of attention over one selection give the same bits."""
    args = (subject, case.inputs, case.selection, *upstream(case))
    same_gradients(*(attention_gradients(*args) for _ in range(2)))
    return AGREES


@holds_for(larger, needs=("attend", "align_index", "backward"))
def r19_alignment_has_the_same_bits(subject: Subject, case: Case) -> Measure:
    """Two backward passes give the same bits: of the loss, its warm-up form, and align=True."""
    for selection in (case.selection, None):
        args = (subject, case.inputs, selection)
        (loss, one), (again, two) = (alignment_gradients(*args) for _ in range(2))
        require(repr(loss) == repr(again), f"loss must be {loss!r}, got {again!r}")
        same_gradients(one, two)
    args = (subject, case.inputs, *upstream(case), 1.0)
    same_gradients(*(attention_and_alignment(*args)[1] for _ in range(2)))
    return AGREES


def same_gradients(one: Mapping[str, Array | None], two: Mapping[str, Array | None]) -> None:
    """Check that both gradients are None, or equal to the last bit."""
    for name, grad in one.items():
        require((grad is None) == (two[name] is None), f"d{name} must come every time or never")
        if grad is not None:
            same(f"d{name}", grad, two[name])


def bad_inputs(domain: Domain) -> st.SearchStrategy[BadInput]:
    """Any case of bad input. The seeds already try all of them."""
    return st.sampled_from(BAD_INPUTS)


@holds_for(bad_inputs, needs=("api", "decode_step"), seeds=BAD_INPUTS)
def r20_bad_input_is_refused_before_any_work(subject: Subject, bad: BadInput) -> Measure:
    """The error names the argument, what was wanted and what was given, before any work."""
    try_bad_input(subject, bad)
    return AGREES
