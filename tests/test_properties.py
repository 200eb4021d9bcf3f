"""R1-R21: every property of msa.conformance on every backend that runs here."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings

from msa.conformance import Domain, Property, all_properties, strategies, subjects
from msa.conformance.search import Tally, search
from msa.conformance.tolerances import AGREES

TWO_GPUS = pytest.mark.skip(reason="there is one GPU here, and this needs two")


def pairs():
    """Each property with each backend that claims it; those for two GPUs are shown as skipped."""
    for p in all_properties():
        for s in subjects():
            claimed = s.domain.has(*p.needs)
            others = [need for need in p.needs if need != "devices"]
            if claimed or (s.device != "cpu" and s.domain.has(*others)):
                marks = [pytest.mark.gpu] * (s.device != "cpu") + [TWO_GPUS] * (not claimed)
                yield pytest.param(p, s, id=f"{p.name}-{s.label}", marks=marks)


PAIRS = list(pairs())

DIFFERENTIABLE = [p for p in all_properties() if {"backward", "align_index"} & set(p.needs) and
                  "float64" not in p.needs]  # fmt: skip


@pytest.mark.parametrize(("prop", "subject"), PAIRS)
def test_property(prop, subject, record_property, request):
    """The cases are the same every time, or others with --hypothesis-seed=NUMBER."""
    if prop.rule == "R20":
        request.getfixturevalue("as_users_run_it")
    tally, seed = Tally(), request.config.getoption("--hypothesis-seed")
    try:
        search(prop, subject, settings(), tally, seed=None if seed is None else int(seed))
    finally:
        closest = f" ({tally.measure.ratio:.0%})" if tally.measure.error else ""
        record_property("examples", (prop.name, subject.label, tally.tried, closest))


@pytest.mark.parametrize("prop", DIFFERENTIABLE, ids=lambda p: p.name)
def test_a_backend_without_float64_can_be_tried(prop):
    """A subject with the dtypes and block sizes of the kernels, which lacks nothing."""
    (subject, *_) = subjects(("torch",))
    like_kernels = Domain(dtypes=("float32", "float16", "bfloat16"), block_sizes=(16, 32), cost=5)
    tally = Tally()
    search(prop, replace(subject, domain=like_kernels), settings(), tally)
    assert tally.tried >= 10 // prop.cost


def test_only_finite_differences_need_float64():
    assert {p.name for p in all_properties() if "float64" in p.needs} == {
        "r17_gradients_are_those_of_the_spec",
        "r18_gradients_are_those_of_the_spec",
    }


def test_every_rule_has_a_property():
    assert {p.rule for p in all_properties()} == {f"R{n}" for n in range(1, 22)}


def test_names_are_unique_and_say_something():
    names = [p.name for p in all_properties()]
    assert len(set(names)) == len(names)
    assert all(p.statement for p in all_properties())


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_every_rule_is_claimed(name):
    (subject, *_) = subjects((name,))
    assert {p.rule for p in all_properties() if subject.domain.has(*p.needs)} >= {
        f"R{n}" for n in range(1, 22) if not (n == 18 and name == "reference")
    }


def test_each_seed_draws_its_own_cases():
    def drawn(seed):
        cases = []
        prop = Property(
            lambda _, case: cases.append(repr(case)) or AGREES, strategies.cases, (), ()
        )
        search(prop, subjects(("reference",))[0], settings(max_examples=9), Tally(), seed=seed)
        return cases

    assert drawn(1) == drawn(1) != drawn(2)
    assert drawn(None) == drawn(None) != drawn(1)
