"""What is drawn, and in which order tests run, depends on nothing that happens to be so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import in_order
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


ITEMS = [
    SimpleNamespace(path=file, name=f"{name}-{backend}")
    for file in ("test_a.py", "test_b.py", "test_c.py")
    for backend in ("torch", "triton")
    for name in ("first", "second", "third")
]


@pytest.mark.parametrize("order", ["slowest", "reversed", "shuffled:0", "shuffled:7"])
def test_every_order_has_all_tests(order):
    found = in_order(ITEMS, order)
    assert found != ITEMS and sorted(map(id, found)) == sorted(map(id, ITEMS))
    assert found == in_order(list(ITEMS), order)  # for each worker the same


def test_the_interpreter_comes_first_and_files_stay_together_when_shuffled():
    assert all("triton" in item.name for item in in_order(ITEMS, "slowest")[:9])
    files = [item.path for item in in_order(ITEMS, "shuffled:3")]
    assert sum(one != other for one, other in zip(files, files[1:])) == 2


@pytest.mark.parametrize("order", ["shuffled", "shuffled:x", "backwards", "reversed:2"])
def test_an_order_that_is_none_is_refused(order):
    with pytest.raises(pytest.UsageError, match="must be slowest, reversed or shuffled:SEED, got"):
        in_order(ITEMS, order)


@pytest.mark.parametrize("workers", ["-n0", "-n2"])
def test_a_run_is_recorded_once(workers, tmp_path):
    file, root = tmp_path / "new" / "run.json", Path(__file__).parent.parent
    command = [sys.executable, "-m", "pytest", "-q", workers, "--order", "shuffled:5", "--record",
               str(file), "--record-commit", "abc", "tests/test_interface.py"]  # fmt: skip
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text())
    assert found["passed"] >= 1 and found["failed"] == found["errors"] == 0
    assert found["commit"] == "abc" and found["seconds"] > 0
    assert {"device", "driver", "torch", "triton", "python", "date", "skipped"} <= set(found)
