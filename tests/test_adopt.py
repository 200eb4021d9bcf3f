"""New results in the place of older ones, and the page that shows what they replaced."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks.reading import committed, device
from docs.hooks import adopt, history, measured, standing, standing_steps


@pytest.fixture
def run(tmp_path):
    """Return a function that writes the committed results as those of a run on another GPU."""

    def write(kind, name="NVIDIA A100-SXM4-80GB"):
        found = json.loads(committed(kind).read_text()) | {"device": name}
        path = tmp_path / "run" / f"{kind}_{device(found).lower()}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(found))
        return path

    return write


@pytest.fixture
def house(tmp_path):
    """Folders for results and figures, with the committed results of decoding and an old figure."""
    results, docs = tmp_path / "results", tmp_path / "docs"
    results.mkdir()
    docs.mkdir()
    old = committed("decode")
    (results / old.name).write_bytes(old.read_bytes())
    (docs / f"{old.stem}.svg").write_text("old")
    return results, docs


def test_results_of_another_gpu_move_to_the_history(run, house):
    results, docs = house
    old, path = committed("decode"), run("decode")
    adopt.adopt(path, results, docs)
    assert committed("decode", results).read_bytes() == path.read_bytes()
    assert (results / "history" / old.name).read_bytes() == old.read_bytes()
    assert [figure.name for figure in docs.iterdir()] == ["decode_a100.svg"]


def test_results_of_the_same_gpu_are_replaced(run, house):
    results, docs = house
    path = run("decode", measured.read("decode")["device"])
    adopt.adopt(path, results, docs)
    assert [p.name for p in results.iterdir()] == [path.name]
    assert committed("decode", results).read_bytes() == path.read_bytes()
    assert "old" not in (docs / f"{path.stem}.svg").read_text()[:10]


def test_a_run_is_checked_before_anything_changes(run, tmp_path, monkeypatch, capsys):
    run("train")
    bad = run("decode")
    rest = {k: v for k, v in json.loads(bad.read_text()).items() if k != "quality"}
    bad.write_text(json.dumps(rest))
    monkeypatch.setattr(adopt, "adopt", lambda path: pytest.fail("changed something"))
    monkeypatch.setattr(sys, "argv", ["adopt", str(tmp_path / "run")])
    assert adopt.main() == 2
    assert "decode_a100.json must have 'quality'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["decode_h900.json", "findings_a100.json"])
def test_a_file_with_another_name_is_refused(run, name):
    path = run("decode")
    path.rename(path.with_name(name))
    with pytest.raises(ValueError, match=f"BENCHMARK_DEVICE.json, .* got {name}"):
        adopt.checked(path.parent)


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got none in"):
        adopt.checked(tmp_path)


def test_two_files_of_a_benchmark_are_one_too_many(house):
    results, _ = house
    (results / "decode_x.json").write_text("{}")
    with pytest.raises(LookupError, match="must hold one file of decode, got "):
        committed("decode", results)


@pytest.mark.parametrize("kind", ["prefill", "train", "decode", "integrations"])
def test_every_kind_of_older_results_has_tables(kind):
    """The committed results stand for older ones: their form is the same."""
    tables = "\n".join(history.tables_of(kind))
    assert "| --- |" in tables and measured.path_of(kind).name in tables
    assert (history.figure_of(kind) == "") == (kind == "train")


def test_the_page_of_older_results_shows_each_file():
    text = history.figures() + history.tables()
    assert measured.older()
    for name in measured.older():
        assert f"{name}.json" in text and f"## {history.words_of(name)}" in text
    assert "changed since" not in text


def test_selections_have_both_kinds_of_kernels_or_a_dash(monkeypatch):
    found = measured.read("prefill")
    rows = [row["select"] for row in (*found["lengths"], *found["million"]["chunks"])]
    for row in rows:
        row["kernels"] = "portable"
    monkeypatch.setattr(standing, "read", lambda name: found)
    assert standing.selection().splitlines()[2].count("–") == 2
    for row in rows:
        row |= {"kernels": "hopper", "portable_bf16": {"ms": 7.0}, "portable_fp8_e4m3": {"ms": 6.0}}
        row["bf16"]["ms"], row["fp8_e4m3"]["ms"] = 5.0, 4.0
    assert standing.selection().splitlines()[2].endswith("| 7.00 | 5.00 | 6.00 | 4.00 |")


def test_the_rates_of_a_table_are_those_of_the_run():
    """Useful TFLOP/s are computed from operations and times; the benchmark wrote the same."""
    for row in standing.prompts():
        for stage in row["attention"]:
            for order in ("auto", "union", "kv_outer"):
                assert standing.useful(stage, order) == pytest.approx(stage[order]["tflops"])


def test_a_step_faster_than_reading_its_keys_would_be_seen():
    """No score kernel reads faster than the memory of any Hopper GPU, 4.8 TB/s."""
    for row in measured.read("decode")["steps"]:
        assert 0.5 < standing_steps.rate(row, "bf16") < 4.8
