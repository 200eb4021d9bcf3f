"""`msa findings`: its rows, interrupted runs, the file of results, the tables and the figure."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import test_model_train
import torch

from benchmarks import plots
from docs.hooks import measured
from msa import cli, files
from msa.ablations import readings, run, tables
from msa.ablations.readings import attending, measure_index, unseen, with_config
from msa.ablations.results import RESULTS, SHIPPED, lengths_of, runs_of
from msa.ablations.rows import ROWS
from msa.ablations.run import Job, RunOptions, missing, options_of, trained
from msa.ablations.tables import mean_of
from msa.model import checkpoint
from msa.training import train
from msa.training.evaluate import read_documents, unseen_documents
from msa.training.options import TrainOptions, read_preset
from msa.training.train import METRICS

ROOT = Path(__file__).parent.parent
micro = test_model_train.micro


@pytest.fixture
def short(monkeypatch):
    """Documents that the smallest model reads quickly."""
    monkeypatch.setattr(readings, "LENGTHS", (128, 256))
    monkeypatch.setattr(readings, "LONG", 1)
    monkeypatch.setattr(readings, "BUDGETS", (1, 8))


def results(folder):
    return json.loads((folder / RESULTS).read_text())


def start(tmp_path, *words):
    return cli.main(
        ["findings", "run", "--steps", "2", "--documents", "1", "--out", str(tmp_path), *words]
    )


# -- rows -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_row_is_one_command_of_the_same_budget(row):
    plan = options_of(row, 300, 1, Path("out"))
    preset = read_preset(plan)
    assert (plan.seed, preset.schedule.steps) == (1, 100 if row.name == "cpt" else 300)
    assert preset.model.msa.block_size * preset.model.msa.top_k == readings.NEAR == 80
    words = row.command(300, 1).rpartition("msa train ")[2].split()
    if row.after is not None:
        assert words[:2] == ["--start", "START"]
        words = words[2:]
    import tyro

    assert replace(tyro.cli(TrainOptions, args=words), out=Path("out")) == plan


def test_no_two_rows_are_the_same():
    presets = [repr(read_preset(options_of(row, 300, 0, Path()))) for row in ROWS.values()]
    assert len(set(presets)) == len(presets) == 12


def test_the_longest_run_is_taken_first_and_one_that_follows_goes_with_the_other():
    options = RunOptions(seeds=(0, 1))
    jobs = missing({"runs": []}, options, math.inf)
    assert sum(len(job.rows) for job in jobs) == 2 * len(ROWS)
    costs = [job.cost for job in jobs]
    assert costs == sorted(costs, reverse=True) and costs[0] > costs[-1]
    pairs = [[row.name for row in job.rows] for job in jobs if len(job.rows) > 1]
    assert pairs == [["dense", "cpt"]] * 2
    there = [{"row": name, "seed": 0} for name in ROWS if name != "cpt"]
    left = missing({"runs": there}, replace(options, seeds=(0,)), math.inf)
    assert [[row.name for row in job.rows] for job in left] == [["cpt"]]


# -- from the command to the table ----------------------------------------------------------------
def test_two_rows_end_to_end(tmp_path, short, micro, capsys):
    """Two rows with one seed: results are shown and drawn, and have the form for the site."""
    assert start(tmp_path, "--rows", "base", "cpt", "dense", "--seeds", "3") == 0
    said = capsys.readouterr().out
    assert "base, seed 3: answers" in said and "3 of 3 runs" in said
    found = results(tmp_path)
    measured.check(found, measured.SCHEMAS["findings"], "findings_tiny")
    runs = {run["row"]: run for run in found["runs"]}
    assert {name: run["steps"] for name, run in runs.items()} == {"base": 2, "dense": 2, "cpt": 1}
    assert [r["k"] for r in runs["base"]["budgets"]] == [1, 8]
    assert [(r["how"], r["tokens"]) for r in runs["base"]["lengths"]] == [
        (how, n) for how in ("dense", "msa", "window") for n in (128, 256)
    ]
    assert runs["dense"]["kl"] is runs["dense"]["block_recall"] is None
    assert runs["cpt"]["kl"] > 0 and 0 <= runs["cpt"]["block_recall"] <= 1
    assert {len(run["budgets"]) for run in (runs["dense"], runs["cpt"])} == {0}

    path = tmp_path / RESULTS
    assert cli.main(["findings", "--results", str(path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "MSA from scratch (MSA-PT)" in said and "seeds 3" in said
    assert cli.main(["bench", "plots", "--results", str(path), "--to", str(tmp_path)]) == 0
    assert (tmp_path / "findings_tiny.svg").read_text().count("MSA") >= 3
    del found["runs"]
    (tmp_path / "findings_less.json").write_text(json.dumps(found | {"runs": []}))
    (reason,) = plots.draw(tmp_path / "findings_less.json", tmp_path).values()
    assert reason == "the results have no run of 'base'"


def test_what_is_there_is_not_run_again(tmp_path, short, micro, monkeypatch, capsys):
    assert start(tmp_path, "--rows", "no-kl", "--seeds", "0") == 0
    before = results(tmp_path)["runs"]
    calls = []
    monkeypatch.setattr(run, "train", lambda *args: calls.append(args[0]) or train.train(*args))
    assert start(tmp_path, "--rows", "no-kl", "forced", "--seeds", "0") == 0
    assert [options.sink_blocks for options in calls] == [1]
    assert results(tmp_path)["runs"][:1] == before
    assert "2 of 2 runs" in capsys.readouterr().out
    assert cli.main(["findings", "run", "--steps", "3", "--out", str(tmp_path)]) == 2
    assert "must be of steps 3, got 2" in capsys.readouterr().err


def test_a_run_that_time_cut_off_goes_on(tmp_path, short, micro, monkeypatch):
    """The time is over at the third question for it, which comes during the run."""
    job = Job((ROWS["cpt"],), 0, RunOptions(steps=3, documents=1, out=tmp_path), until=100.0)
    assert run.is_over(job) and not run.is_over(replace(job, until=math.inf))
    answers = iter([False, False, True])
    monkeypatch.setattr(run, "is_over", lambda _: next(answers))
    assert run.work(job) == []
    lines = (tmp_path / "dense-0" / METRICS).read_text().splitlines()
    assert len(lines) == 2
    assert not (tmp_path / "cpt-0").exists()
    monkeypatch.setattr(run, "is_over", lambda _: False)
    (found,) = run.work(job)
    assert found["row"] == "cpt"
    assert (tmp_path / "dense-0" / METRICS).read_text().splitlines()[:2] == lines
    assert run.work(job) == [found]  # no run is left, and the results are the same
    monkeypatch.setattr(run, "is_over", lambda _: True)
    assert trained(ROWS["base"], job, None) is None
    assert not (tmp_path / "base-0").exists()


def test_a_run_that_fails_leaves_the_others_alone(tmp_path, short, micro, monkeypatch, capsys):
    def fail(model, documents):
        if model.config.index_gradient:
            raise RuntimeError("all is NaN")
        return measure_index(model, documents)

    monkeypatch.setattr(readings, "measure_index", fail)
    assert start(tmp_path, "--rows", "gradient", "no-kl", "--seeds", "0") == 1
    said = capsys.readouterr()
    assert "gradient, seed 0: RuntimeError('all is NaN')" in said.err
    assert [run["row"] for run in results(tmp_path)["runs"]] == ["no-kl"]


def test_ctrl_c_saves_what_there_is_and_the_command_goes_on(
    tmp_path, short, micro, monkeypatch, capsys
):
    words = ["--rows", "no-kl", "forced", "--seeds", "0"]
    with pytest.MonkeyPatch.context() as patch:
        test_model_train.interrupted(patch, step=0, times=1)
        assert start(tmp_path / "a", *words) == 130
        said = capsys.readouterr()
        assert "msa: stopped with 0 of 2 runs in" in said.err and "Traceback" not in said.err
        assert [p.name for p in (tmp_path / "a").iterdir()] == ["no-kl-0"]
        assert len(run.metrics(tmp_path / "a" / "no-kl-0")) == 1
    for folder in ("a", "b"):
        assert start(tmp_path / folder, *words) == 0
    runs = [results(tmp_path / folder)["runs"] for folder in ("a", "b")]
    for one in [*runs[0], *runs[1]]:
        del one["seconds"]
    assert runs[0] == runs[1] and len(runs[0]) == 2


def test_a_run_that_lost_a_line_is_told_each_time(tmp_path, short, micro, capsys):
    words = ["--rows", "no-kl", "--seeds", "0"]
    assert start(tmp_path, *words) == 0
    (tmp_path / RESULTS).unlink()
    path = tmp_path / "no-kl-0" / METRICS
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    for _ in range(2):
        capsys.readouterr()
        assert start(tmp_path, *words) == 1
        said = capsys.readouterr()
        assert "0 of 1 runs" in said.out
        assert f"no-kl, seed 0: {path} must have a line for each of the 2 steps" in said.err


def test_a_library_that_all_runs_lack_is_told_once(tmp_path, short, micro, monkeypatch, capsys):
    def lack(*_):
        raise ModuleNotFoundError(name="sklearn")

    monkeypatch.setattr(run, "train", lack)
    assert start(tmp_path, "--rows", "no-kl", "forced", "--seeds", "0") == 2
    assert capsys.readouterr().err == (
        "msa: msa findings run needs sklearn; pip install 'msa-stack[model,demo]' brings it\n"
    )


def test_one_process_writes_to_a_folder(tmp_path, capsys):
    with files.locked("out", tmp_path):
        assert start(tmp_path) == 2
    assert f"where process {os.getpid()} is at work" in capsys.readouterr().err


def test_results_of_another_kind_in_the_folder_are_told(tmp_path, capsys):
    for content in ("[]", "{}", "{", "\0"):
        (tmp_path / RESULTS).write_text(content)
        assert start(tmp_path) == 2
        said = capsys.readouterr().err
        assert str(tmp_path / RESULTS) in said and said.count("\n") == 1


def test_two_workers_train_side_by_side(tmp_path):
    """The command works on the tiny model without libraries that only tests need."""
    name = "beartype"
    (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError(name={name!r})")
    words = [
        "findings",
        "run",
        "--rows",
        "window",
        "no-kl",
        "--seeds",
        "0",
        "--workers",
        "2",
        "--steps",
        "1",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "msa.cli", *words, "--documents", "1", "--out", "out"],
        capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {run["row"] for run in results(tmp_path / "out")["runs"]} == {"window", "no-kl"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--rows base best", "rows must be of base, no-kl, .* got 'best'"),
        ("--seeds 0 -1", "seeds must be at least 0, got -1"),
        ("--workers 0", "workers must be at least 1, got 0"),
        ("--minutes 0", "minutes must be finite and positive, got 0.0"),
    ],
)
def test_bad_options_are_named(words, message, tmp_path, capsys):
    import re

    assert cli.main(["findings", "run", "--out", str(tmp_path), *words.split()]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_results_that_are_not_there_are_named(tmp_path, capsys):
    assert cli.main(["findings", "--results", str(tmp_path / "no.json")]) == 2
    assert "results must be a file, got" in capsys.readouterr().err


# -- readings -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def shipped():
    return checkpoint.load_trained("tiny", backend="torch")


@torch.no_grad()
def test_other_budgets_and_windows_are_the_same_weights(shipped):
    (document,) = unseen(200, 1)
    own = shipped.config.msa
    all_blocks = with_config(shipped, replace(own, top_k=13))  # R11
    window, mode = attending(shipped, "window")
    assert (window.config.msa.local_blocks, mode) == (5, "sparse")
    text = torch.as_tensor(document.tokens)
    text[text == 256] = 32
    logits = [m(text, mode=mode).logits for m, mode in (
        attending(shipped, "dense"), (all_blocks, "sparse"), (shipped, "sparse"),
        (window, "sparse"),
    )]  # fmt: skip
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-4)
    assert (logits[2] - logits[0]).abs().max() > 0.1
    assert (logits[3] - logits[2]).abs().max() > 0.1
    assert torch.equal(logits[3][:80], logits[2][:80])  # there are only five blocks so far


def test_the_shipped_index_finds_what_a_window_does_not(shipped):
    documents = unseen_documents(512, 8, 8, 2)
    found = measure_index(shipped, documents)
    window = measure_index(attending(shipped, "window")[0], documents)
    assert found["block_recall"] > window["block_recall"] + 0.1
    assert 0.8 < found["score_recall"] <= 1
    assert 0 < found["kl"] < 1
    assert window["kl"] is None
    # with attention to all blocks the recall is 1
    everything = measure_index(
        with_config(shipped, replace(shipped.config.msa, top_k=32)), documents
    )
    assert everything["block_recall"] == everything["score_recall"] == 1


def test_far_is_the_same_in_every_row(shipped):
    documents = unseen(512, 2)
    reading = read_documents(shipped, documents, at_once=4)
    found = readings.measure_answers(shipped, documents)
    assert found["far"] == reading.accuracy(80)
    assert found["prose"] == pytest.approx(reading.prose, rel=1e-6)


def test_numbers_that_are_not_finite_are_none_and_shown_as_a_dash():
    assert readings.finite(math.inf) is None
    assert mean_of([1.0, None]) == "-"
    assert mean_of([1.0, 3.0], 1, 2) == "2.00 ± 1.41"


def test_lines_of_the_figure_are_told_apart():
    """If one run lacks the longest documents, the lines of the others are still complete."""
    base = {"row": "base", "seed": 0, "budgets": [], "lengths": []}
    base["lengths"] = [
        {"tokens": n, "how": how, "answers": share}
        for how, share in (("dense", 0.2), ("msa", 0.4), ("window", 0.1)) for n in (512, 1024)
    ]  # fmt: skip
    other = copy.deepcopy(base) | {"seed": 1}
    found = {"runs": [base, other]}
    assert lengths_of(found, "base", "msa") == {512: [0.4, 0.4], 1024: [0.4, 0.4]}
    assert tables.lengths_table(found)[1:] == [
        ("512", *(f"{v} ± 0.0" for v in ("20.0", "40.0", "10.0")), "-"),
        ("1,024", *(f"{v} ± 0.0" for v in ("20.0", "40.0", "10.0")), "-"),
    ]


def test_the_figure_of_the_site_is_that_of_the_results(tmp_path):
    (path,) = plots.draw(SHIPPED, tmp_path)
    assert path.read_text() == (ROOT / "docs" / path.name).read_text()


def test_what_the_page_says_holds_in_the_results():
    """Each line checks a sentence of docs/measure/findings.md, by means of three seeds."""
    found = json.loads(SHIPPED.read_text())

    def values(row, name):
        return [run[name] for run in runs_of(found, row)]

    def mean(row, name="answers"):
        return sum(values(row, name)) / 3

    assert all(len(runs_of(found, row)) == 3 for row in ROWS)
    base = {name: mean("base", name) for name in tables.MEASURES}
    assert (
        abs(mean("no-kl", "prose") - base["prose"]) < 0.05 and mean("no-kl") < base["answers"] / 3
    )
    for row in ("gradient", "gradient-10"):
        assert mean(row, "kl") < base["kl"] and mean(row, "score_recall") > base["score_recall"]
        assert mean(row, "block_recall") > base["block_recall"]
        assert mean(row) < base["answers"] - 0.2 and mean(row, "prose") > base["prose"]
        assert None not in values(row, "steepest")
    assert max(values("gradient-10", "answers")) < 0.15
    for row in ("kl-10", "no-warm-up", "blocks-8"):
        assert abs(mean(row) - base["answers"]) < 0.05
    spread = max(values("base", "answers")) - min(values("base", "answers"))
    assert 0.05 < base["answers"] - mean("forced") < min(0.07, spread)
    assert mean("blocks-40") < base["answers"] - 0.2
    choosing = [mean(row, "prose") for row in ROWS if row not in ("window", "dense", "cpt")]
    assert mean("window", "prose") < min(choosing) and mean("window", "far") < 0.15
    for row in ("dense", "cpt"):  # seed 1 is the one that has not learned
        assert [answers < 0.15 for answers in values(row, "answers")] == [False, True, False]
    learned = [run for run in runs_of(found, "dense") if run["seed"] != 1]
    assert sum(run["answers"] for run in learned) / 2 > base["answers"]
    sparse = lengths_of(found, "base", "msa")
    twin = {n: sum(of["answers"] for run in learned for of in run["lengths"]
                   if of["tokens"] == n) / 2 for n in sparse}  # fmt: skip
    assert {n: sum(sparse[n]) / 3 > twin[n] for n in twin} == {
        512: False, 1024: False, 2048: False, 4096: True, 8192: True
    }  # fmt: skip
    converted = [run["answers"] for run in runs_of(found, "cpt") if run["seed"] != 1]
    assert base["answers"] - 0.1 < sum(converted) / 2 < base["answers"]
