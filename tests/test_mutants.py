"""The properties can fail: known kinds of bugs are planted, and the named property sees each."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
from hypothesis import Phase, settings
from mutants import DOMAIN, HONEST_OPTIONS, MUTANTS, one_product_too_few

from msa.conformance import Subject, all_properties, as_module, subjects
from msa.conformance.tolerances import HOPPER
from msa.conformance.trial import Tally, search

PROPERTIES = {p.name: p for p in all_properties()}
SETTINGS = settings(derandomize=True, database=None, phases=(Phase.explicit, Phase.generate))


def attempt(name, subject, examples=25):
    """The tally of a search for a counterexample, without shrinking it."""
    tally, options = Tally(), settings(SETTINGS, max_examples=examples)
    try:
        search(PROPERTIES[name], subject, options, tally)
    except Exception as error:
        assert tally.error is not None, error
    return tally


@pytest.mark.parametrize(
    ("name", "functions"),
    MUTANTS,
    ids=[f"{f.__name__}-{name.partition('_')[0]}" for name, fs in MUTANTS for f in fs.values()],
)
def test_a_planted_bug_is_found(name, functions):
    mutant = Subject("mutant", as_module(HONEST_OPTIONS | functions), "numpy", DOMAIN)
    tally = attempt(name, mutant)
    print(f"found after {tally.tried} examples")
    assert isinstance(tally.error, AssertionError | ValueError), f"{name} let it pass"
    assert "(" in repr(tally.counterexample)


@pytest.mark.parametrize("name", sorted({name for name, _ in MUTANTS}))
def test_the_honest_backend_passes_the_same_search(name):
    honest = Subject("honest", as_module(HONEST_OPTIONS), "numpy", DOMAIN)
    assert attempt(name, honest, examples=5).error is None


def test_a_forgotten_product_is_found_within_the_budget_of_tensor_cores():
    hopper = replace(DOMAIN, dtypes=("float16",), units=HOPPER)
    mutant = Subject("mutant", as_module({"score_blocks": one_product_too_few}), "numpy", hopper)
    tally = attempt("r4_scores_are_scaled_products", mutant)
    assert isinstance(tally.error, AssertionError)


@pytest.mark.usefixtures("as_users_run_it")
def test_a_missing_check_is_found():
    (subject,) = subjects(("reference",))
    with mock.patch("msa.checks.check_heads", lambda *args: None):
        tally = attempt("r20_bad_input_is_refused_before_any_work", subject)
    assert tally.counterexample.name in ("Hq not a multiple of Hkv", "other heads of q in decode")
