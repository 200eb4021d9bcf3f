"""Neither the drawn cases nor the order of the tests depend on chance or on the environment."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from conftest import in_order
from hypothesis.internal.conjecture import providers
from recording import commit_of, record

from docs.hooks import measured

DRAW = """
import sys
if len(sys.argv) > 1:
    sys.path.insert(0, sys.argv[1])
    import numbers_of_its_own
from hypothesis import settings
from msa.conformance import all_properties, subjects
from msa.conformance.properties import holds_for
from msa.conformance.tolerances import AGREES
from msa.conformance.search import Tally, search
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
    """`conftest` keeps Hypothesis's list of numbers from imported modules empty."""
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


def test_a_run_with_a_worker_is_recorded(tmp_path):
    file, root = tmp_path / "new" / "run.json", Path(__file__).parent.parent
    command = [sys.executable, "-m", "pytest", "-q", "-n1", "--order", "shuffled:5", "--record",
               str(file), "--record-commit", "abc", "tests/test_interface.py"]  # fmt: skip
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text())
    assert found["passed"] >= 1 and found["failed"] == found["errors"] == 0
    assert found["commit"] == "abc" and found["seconds"] > 0
    measured.check(found, measured.SCHEMAS["tests"], "tests_gpu")  # as the site reads it


def test_the_site_tells_what_is_recorded(tmp_path):
    with mock.patch.object(measured, "RESULTS", tmp_path):
        assert "No run" in measured.tests()
        counts = {"passed": 90, "failed": 2, "errors": 1, "skipped": 4}
        record(tmp_path / "tests_gpu.json", counts, 300.0, "0123456789ab dirty")
        said = measured.tests()
    assert (
        "commit 0123456789ab dirty: 90 tests passed, 3 failed and 4 were skipped in 5 min" in said
    )


def test_a_commit_is_asked_of_git(tmp_path):
    assert commit_of(tmp_path) == "unknown"
    for words in ("init -q", "add .", "-c user.name=a -c user.email=a@b commit -qm one"):
        (tmp_path / "file").touch()
        subprocess.run(["git", *words.split()], cwd=tmp_path, check=True)
    assert re.fullmatch("[0-9a-f]{12}", commit_of(tmp_path))
    (tmp_path / "file").write_text("changed")
    assert re.fullmatch("[0-9a-f]{12} dirty", commit_of(tmp_path))
