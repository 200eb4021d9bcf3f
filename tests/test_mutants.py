"""The properties can fail: each planted bug of a known kind is found by the named property."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
from hypothesis import Phase, settings
from mutants import DOMAIN, MUTANTS
from mutants_index import nan_taken_for_infinity, one_product_too_few
from mutants_options import HONEST_OPTIONS

from msa.conformance import Subject, all_properties, as_module, subjects
from msa.conformance.search import Tally, search
from msa.conformance.tolerances import HOPPER

PROPERTIES = {p.name: p for p in all_properties()}
RARE = [{"select_fused": nan_taken_for_infinity}]
SETTINGS = settings(derandomize=True, database=None)


def attempt(name, subject, examples=200, phases=(Phase.generate,)):
    """The tally of a search for a counterexample, without shrinking it."""
    tally, options = Tally(), settings(SETTINGS, max_examples=examples, phases=phases)
    try:
        search(PROPERTIES[name], subject, options, tally)
    except Exception as error:
        assert tally.error is not None, error
    return tally


def mutant(functions):
    return Subject("mutant", as_module(HONEST_OPTIONS | functions), "numpy", DOMAIN)


EACH = pytest.mark.parametrize(
    ("name", "functions", "seed"),
    MUTANTS,
    ids=[f"{f.__name__}-{name.partition('_')[0]}" for name, fs, _ in MUTANTS for f in fs.values()],
)


@EACH
def test_a_planted_bug_is_shown_by_its_seed(name, functions, seed):
    """The bug is found in one fixed case, which the correct backend passes."""
    with pytest.raises((AssertionError, ValueError)):
        PROPERTIES[name].check(mutant(functions), seed)
    PROPERTIES[name].check(mutant({}), seed)


@EACH
def test_a_planted_bug_is_found(name, functions, seed):
    """The bug is found without seeds, with so many examples that chance does not matter."""
    if functions in RARE:
        pytest.skip("search finds it in one of several hundred examples: its seed is what counts")
    tally = attempt(name, mutant(functions))
    print(f"found after {tally.tried} examples")
    assert isinstance(tally.error, AssertionError | ValueError), f"{name} let it pass"
    assert "(" in repr(tally.counterexample)


@pytest.mark.parametrize("name", sorted({name for name, *_ in MUTANTS}))
def test_the_honest_backend_passes_the_same_search(name):
    assert attempt(name, mutant({}), examples=5).error is None


def test_a_forgotten_product_is_found_within_the_budget_of_tensor_cores():
    hopper = replace(DOMAIN, dtypes=("float16",), units=HOPPER)
    forgetful = as_module({"score_blocks": one_product_too_few})
    tally = attempt("r4_scores_are_scaled_products", Subject("mutant", forgetful, "numpy", hopper))
    assert isinstance(tally.error, AssertionError)


@pytest.mark.usefixtures("as_users_run_it")
def test_a_missing_check_is_found():
    (subject,) = subjects(("reference",))
    with mock.patch("msa.checks.check_heads", lambda *args: None):
        tally = attempt("r20_bad_input_is_refused_before_any_work", subject)
    assert tally.counterexample.name in ("Hq not a multiple of Hkv", "other heads of q in decode")
