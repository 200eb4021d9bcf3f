"""What is drawn, and in which order tests run, depends on nothing that happens to be so."""

from __future__ import annotations

import subprocess
import sys

from hypothesis.internal.conjecture import providers

DRAW = """
import sys
if len(sys.argv) > 1:
    sys.path.insert(0, sys.argv[1])
    import numbers_of_its_own
from hypothesis import settings
from msa.conformance import all_properties, subjects
from msa.conformance.properties import holds_for
from msa.conformance.tolerances import AGREES
from msa.conformance.trial import Tally, search
(prop,) = (p for p in all_properties() if p.name == "r8_a_selection_is_canonical")
def r7_prints(subject, case):
    print(case)
    return AGREES
options = settings(derandomize=True, database=None, max_examples=40)
search(holds_for(prop.cases, needs=())(r7_prints), subjects(("reference",))[0], options, Tally())
"""


def test_the_same_cases_are_drawn_whatever_is_imported(tmp_path):
    module = tmp_path / "own" / "numbers_of_its_own.py"
    module.parent.mkdir()
    module.write_text(f"NUMBERS = {list(range(200, 9000, 100))}\n")
    with_and_without = [
        subprocess.run([sys.executable, "-c", DRAW, *more], capture_output=True, text=True,
                       check=True).stdout
        for more in ([], [str(module.parent)])
    ]  # fmt: skip
    assert with_and_without[0] == with_and_without[1]
    assert with_and_without[0].count("Case(") > 30


def test_no_test_draws_numbers_of_modules():
    """Hypothesis's own list of them, which `conftest` keeps empty."""
    if hasattr(providers, "_get_local_constants"):
        assert not set(providers._get_local_constants())
