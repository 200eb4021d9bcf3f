"""Kernels for GPUs that are not here: the committed results, how they are checked and shown."""

from __future__ import annotations

import ast
import json
from importlib.metadata import version
from pathlib import Path

import pytest

import msa
from benchmarks import compiled
from docs.hooks import chips as page
from docs.hooks import measured
from msa import doctor
from msa.chips import FAMILIES

FOUND = json.loads(page.COMPILED.read_text())["versions"]
KERNELS = Path(msa.__file__).parent / "triton_impl"
GOOD = {"kernel": "combine_kernel", "shape": "x", "shared": 1024, "threads": 128, "registers": 200,
        "spilled": 0}  # fmt: skip


def test_the_pinned_triton_was_compiled_for_every_family():
    assert set(FOUND[version("triton")]["families"]) == set(FAMILIES)


@pytest.mark.parametrize("release", FOUND)
def test_every_committed_kernel_fits(release):
    for family, rows in FOUND[release]["families"].items():
        faults = [(row, what) for row in rows if (what := compiled.wrong(row, FAMILIES[family]))]
        assert not faults, family


def test_every_kernel_of_the_backend_was_compiled():
    trees = [ast.parse(path.read_text()) for path in KERNELS.rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    functions = [
        node.name for node in nodes if isinstance(node, ast.FunctionDef)
        and any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    ]  # fmt: skip
    names = {name for name in functions if name.endswith("_kernel")}
    rows = FOUND[version("triton")]["families"]["9.0"]
    assert names - {row["kernel"] for row in rows} <= NOT_COMPILED


NOT_COMPILED = {"long_union_kernel", "mark_pages_kernel"}
"""For more blocks than the compiled shapes have."""


@pytest.mark.parametrize(("change", "family", "says"), [
    ({"error": "CompilationError: e4m3"}, "9.0", "CompilationError"),
    ({"shared": 100 * 1024}, "8.9", "takes 100 KB of shared memory, there are 99"),
    ({"spilled": 4}, "9.0", "spills 4 bytes"),
    ({"registers": 255, "threads": 512}, "9.0", "takes 130560 registers"),
    ({"registers": 513}, "gfx942", "takes 513 registers, there are 512"),
    ({"threads": 2048, "registers": 9}, "gfx942", "has 2048 threads"),
])  # fmt: skip
def test_what_does_not_fit_is_told(change, family, says):
    assert compiled.wrong(GOOD, FAMILIES[family]) == ""
    assert says in compiled.wrong(GOOD | change, FAMILIES[family])


def test_every_family_and_portion_comes_in_turn():
    days = [compiled.todays(day) for day in range(366)]
    others = set(FAMILIES) - {"9.0"}
    assert all(families[0] == "9.0" for families, _ in days)
    assert {(f, part) for families, part in days for f in families[1:]} == {
        (f, f"{i}/{compiled.PORTIONS}") for f in others for i in range(compiled.PORTIONS)
    }


def test_results_are_merged_by_release_and_family(tmp_path, monkeypatch):
    path, row = tmp_path / "a.json", compiled.distinct([GOOD | {"seconds": 1}, GOOD])
    compiled.write(path, "8.0", row)
    compiled.write(path, "9.0", row)
    monkeypatch.setattr("triton.__version__", "99.0")
    compiled.write(path, "9.0", row)
    found = json.loads(path.read_text())["versions"]
    assert found["99.0"]["families"] == {"9.0": [GOOD]}
    assert set(found[version("triton")]["families"]) == {"8.0", "9.0"}


def test_the_page_shows_every_kernel_and_family():
    shown = page.compiled_table(version("triton"))
    assert all(name in shown for name in FAMILIES) and "| walk |" in shown
    assert "counted, not measured" in page.families()


def test_a_report_appears_on_the_page(tmp_path, monkeypatch, capsys):
    """What the command writes is what the page takes; text of strangers is no HTML."""
    assert page.contributed(tmp_path / "none") == "Nobody has sent a report yet."
    path = tmp_path / "mine.json"
    monkeypatch.setattr(doctor, "findings", lambda versions, devices: [
        doctor.Finding("triton on cuda:0", True),
        doctor.Finding("triton on cuda:0, pages in 8 bits", False, "no <b>e4m3</b> | here"),
        doctor.Finding("extra demo", False, "sklearn not installed"),
    ])  # fmt: skip
    monkeypatch.setattr(doctor, "devices_of", lambda torch: [
        doctor.Device("cpu", "x86_64"),
        doctor.Device("cuda:0", "NVIDIA L4", "8.9", 22.0, 58, 99.0, 48.0),
    ])  # fmt: skip
    assert doctor.run(doctor.DoctorOptions(json=True, report=path)) == 0
    assert json.loads(capsys.readouterr().out)["devices"][1]["multiprocessors"] == 58
    shown = page.contributed(tmp_path)
    assert "NVIDIA L4 (8.9)" in shown and "1 of 2" in shown
    assert "no &lt;b&gt;e4m3&lt;/b&gt; &#124; here" in shown


def test_a_file_that_is_no_report_fails_the_build(tmp_path):
    (tmp_path / "bad.json").write_text('{"date": 3}')
    with pytest.raises(measured.BadResults, match=r"bad\.json\.date must be str"):
        page.contributed(tmp_path)
