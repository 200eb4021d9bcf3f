"""R20 case by case: the error, its message, and that no backend was called."""

from __future__ import annotations

import pytest

import msa
from msa.conformance import subjects
from msa.conformance.bad_input import BadInput
from msa.conformance.bad_input.collect import BAD_INPUTS
from msa.conformance.bad_input.kit import Kit
from msa.conformance.bad_input.run import try_bad_input
from msa.conformance.tolerances import Disagreement

pytestmark = pytest.mark.usefixtures("as_users_run_it")
BACKENDS = [s for s in subjects() if s.device == "cpu"]
ANY_BLOCK_SIZE = [s for s in BACKENDS if s.domain.block_sizes is None]  # the kit has blocks of 4


@pytest.mark.parametrize("bad", BAD_INPUTS, ids=lambda bad: bad.name)
@pytest.mark.parametrize("subject", BACKENDS, ids=lambda s: s.label)
def test_bad_input_is_refused(subject, bad):
    try_bad_input(subject, bad)


def test_each_case_has_its_own_name():
    assert len({bad.name for bad in BAD_INPUTS}) == len(BAD_INPUTS)


@pytest.mark.parametrize("subject", ANY_BLOCK_SIZE, ids=lambda s: s.label)
def test_the_unspoiled_arguments_are_good(subject):
    """Good arguments are accepted, so cases are refused for the reason that they name."""
    kit = Kit(subject)
    kit.selection().validate()
    for call in (kit.attention, kit.select, kit.sparse, kit.align, kit.decode, kit.lower):
        call()


def test_a_late_check_is_caught():
    """The replacement of the backend raises an error when a function is called."""
    (subject,) = subjects(("reference",))
    late = BadInput("nothing wrong", ValueError, (), lambda kit: kit.attention())
    with pytest.raises(AssertionError, match="work began"):
        try_bad_input(subject, late)


def test_a_message_that_says_less_is_caught():
    (subject,) = subjects(("reference",))
    vague = BadInput("k = 0", ValueError, ("top_k", "a poem"), lambda kit: msa.MSAConfig(top_k=0))
    with pytest.raises(Disagreement, match="a poem"):
        try_bad_input(subject, vague)
