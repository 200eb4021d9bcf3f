"""Training: the paper's schedule, and the same losses however often a run is cut off."""

from __future__ import annotations

import io
import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from msa import cli, files
from msa.model import checkpoint
from msa.training import train
from msa.training.presets import PRESETS, TINY
from msa.training.train import METRICS, TrainOptions
from msa.training.trainer import STATE, Trainer

MICRO = replace(
    TINY,
    model=replace(
        TINY.model, width=32, attention=("msa",) * 2, mlp=("dense", "moe"), head_dim=8,
        rotary_dim=4, index_dim=8, mlp_width=32, expert_width=16, shared_width=16,
    ),
    schedule=replace(
        TINY.schedule, steps=8, contexts=(32, 64), tokens=128, warm_up=0.3, rising=2,
        test_every=4, save_every=3,
    ),
)  # fmt: skip


@pytest.fixture(autouse=True)
def micro(monkeypatch):
    monkeypatch.setattr(train, "HELD_OUT", 2)
    monkeypatch.setitem(PRESETS, "tiny", MICRO)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "HELD_OUT", 2)
        patch.setitem(PRESETS, "tiny", MICRO)
        return train.train(TrainOptions(out=tmp_path_factory.mktemp("whole")))


def metrics(folder):
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


class Killed(Exception):
    pass


def same_run(folder, whole):
    assert metrics(folder) == metrics(whole)
    weights = load_file(whole / checkpoint.WEIGHTS)
    for name, weight in load_file(folder / checkpoint.WEIGHTS).items():
        assert torch.equal(weight, weights[name]), name


@pytest.mark.parametrize("killed_at", [0, 2, 4, 5, 7])
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path, whole, killed_at):
    def watch(line):
        if line["step"] == killed_at:
            raise Killed

    with pytest.raises(Killed):
        train.train(TrainOptions(out=tmp_path), watch)
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 5, "lang')  # it was just writing
    steps = []
    train.train(TrainOptions(out=tmp_path), lambda line: steps.append(line["step"]))
    saved = killed_at // 3 * 3 if killed_at < 7 else 8
    assert steps == list(range(saved if killed_at != 2 and killed_at != 5 else killed_at + 1, 8))
    same_run(tmp_path, whole)


@pytest.fixture
def ctrl_c_interrupts():
    """A shell starts background processes with SIGINT ignored; these tests send it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted(monkeypatch, step, times):
    """Ctrl-C is pressed while this step is taken."""
    take_step = Trainer.take_step

    def press(self):
        for _ in range(times if self.step == step else 0):
            signal.raise_signal(signal.SIGINT)
        return take_step(self)

    monkeypatch.setattr(Trainer, "take_step", press)


@pytest.mark.parametrize(("step", "times", "message"), [
    (4, 1, "msa: stopped after step 5 of 8, which is saved in OUT; the same command continues"),
    (4, 2, "msa: stopped at once; the same command continues from the last step that was saved"),
    (7, 1, None),  # the last one: the run is over
])  # fmt: skip
@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_ctrl_c_stops_where_the_run_can_go_on(step, times, message, tmp_path, whole, capsys):
    words = ["train", "--out", str(tmp_path)]
    with pytest.MonkeyPatch.context() as patch:
        interrupted(patch, step, times)
        assert cli.main(words) == (130 if message else 0)
    said = capsys.readouterr()
    assert "Traceback" not in said.err + said.out
    lines = said.err.strip().splitlines()
    assert lines[0].startswith("msa: stops after this step, which it saves; Ctrl-C again stops at")
    assert lines[-1].startswith((message or lines[0]).replace("OUT", str(tmp_path)))
    assert len(lines) == 1 + bool(message)
    assert len(metrics(tmp_path)) == (step if times == 2 else step + 1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert cli.main(words) == 0
    same_run(tmp_path, whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in whole.iterdir())


def test_two_runs_in_one_folder_are_one_too_many(tmp_path, whole, capsys):
    """The second is refused while the first takes its steps, and changes nothing."""
    codes = []

    def watch(line):
        codes.append(cli.main(["train", "--out", str(tmp_path)]))

    train.train(TrainOptions(out=tmp_path), watch)
    assert codes == [2] * 8
    assert f"no other run writes to, got {tmp_path}, where process {os.getpid()} is at" in " ".join(
        capsys.readouterr().err.split()
    )
    same_run(tmp_path, whole)


@pytest.fixture
def stopped(tmp_path):
    """A run of which three steps are saved."""
    train.train(TrainOptions(out=tmp_path), lambda line: line["step"] == 2)
    return tmp_path


def states(path):
    """What may stand in place of a state: by its name, its bytes."""
    content, foreign = path.read_bytes(), {}
    for name, thing in (
        ("another dict", {"model": torch.ones(1)}),
        ("a tensor", torch.ones(3)),
        ("other weights", torch.load(path) | {"model": {"w": torch.ones(1)}}),
        ("a step that is none", torch.load(path) | {"step": "3"}),
        ("settings that are none", torch.load(path) | {"settings": "what"}),
        ("settings that are a list", torch.load(path) | {"settings": "[1]"}),
    ):
        file = io.BytesIO()
        torch.save(thing, file)
        foreign[name] = file.getvalue()
    foreign |= {"empty": b"", "text": b"hello", "pickle": b"\x80\x02N."}
    return foreign | {f"cut to {n}": content[:n] for n in (100, 20_000, len(content) // 2, -500)}


def test_a_broken_state_is_told_and_left_alone(stopped, capsys):
    for name, content in states(stopped / STATE).items():
        (stopped / STATE).write_bytes(content)
        before = {p.name: p.read_bytes() for p in stopped.iterdir()}
        assert cli.main(["train", "--out", str(stopped)]) == 2, name
        said = capsys.readouterr().err
        assert said.count("\n") == 1, (name, said)
        assert f"msa: {stopped / STATE} must be the state of a run as msa train writes it" in said
        assert {p.name: p.read_bytes() for p in stopped.iterdir()} == before


@pytest.mark.parametrize(("change", "got"), [
    (lambda lines: [b"{}\n", *lines[1:]], "another in place of step 0"),
    (lambda lines: [lines[0], b"no json\n", lines[2]], "another in place of step 1"),
    (lambda lines: [lines[0], b"[1]\n", lines[2]], "another in place of step 1"),
    (lambda lines: [lines[0], b"\xff\n", lines[2]], "another in place of step 1"),
    (lambda lines: [lines[0], lines[2]], "another in place of step 1"),
    (lambda lines: [lines[0], lines[0], lines[1]], "another in place of step 1"),
    (lambda lines: lines[:2], "none in place of step 2"),
    (lambda lines: [lines[0], lines[1], lines[2][:-1]], "another in place of step 2"),
])  # fmt: skip
def test_metrics_that_lack_a_step_are_told(change, got, stopped, capsys):
    path = stopped / METRICS
    content = b"".join(change(path.read_bytes().splitlines(keepends=True)))
    path.write_bytes(content)
    assert cli.main(["train", "--out", str(stopped)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"msa: {path} must have a line for each of the 3 steps that were taken")
    assert got in said and said.count("\n") == 1
    assert path.read_bytes() == content


@pytest.mark.parametrize("harm", ["gone", "cut"])
def test_a_finished_run_has_its_model_again(harm, tmp_path, whole):
    train.train(TrainOptions(out=tmp_path))
    path = tmp_path / checkpoint.WEIGHTS
    path.unlink() if harm == "gone" else path.write_bytes(path.read_bytes()[:1000])
    assert cli.main(["train", "--out", str(tmp_path)]) == 0
    same_run(tmp_path, whole)


@pytest.mark.parametrize("room", [1_000, 40_000])
def test_a_full_disk_is_one_sentence_and_leaves_no_halves(room, tmp_path, whole, capsys):
    """The system lets no file grow beyond so many bytes: as if there was no more room."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        code = cli.main(["train", "--out", str(tmp_path)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert code == 2
    assert said.startswith("msa: ") and said.endswith("File too large\n"), said
    assert not list(tmp_path.glob("*.part"))
    train.train(TrainOptions(out=tmp_path))
    same_run(tmp_path, whole)


@pytest.mark.parametrize("file", [STATE, checkpoint.WEIGHTS])
def test_a_run_that_was_killed_while_it_saved_goes_on_too(tmp_path, whole, file, monkeypatch):
    write, calls = files.write, []

    def die_in_the_second(path, content):
        if path.name == file:
            calls.append(path)
            if len(calls) == 2:
                path.with_name(path.name + ".part").write_bytes(b"half")
                raise Killed
        write(path, content)

    monkeypatch.setattr(files, "write", die_in_the_second)
    with pytest.raises(Killed):
        train.train(TrainOptions(out=tmp_path))
    train.train(TrainOptions(out=tmp_path))
    same_run(tmp_path, whole)


def test_the_seed_decides(tmp_path, whole):
    (one, same, two) = (Trainer(MICRO, seed).batch(0) for seed in (0, 0, 1))
    assert torch.equal(one.tokens, same.tokens)
    assert one.tokens.tolist() != two.tokens.tolist()
    assert one.tokens.tolist() != Trainer(MICRO, 0).batch(1).tokens.tolist()
    other = train.train(TrainOptions(out=tmp_path, seed=1))
    assert all(a["language"] != b["language"] for a, b in zip(metrics(other), metrics(whole)))


def test_the_index_watches_first(whole):
    """30% of 8 steps, rounded up, with dense attention."""
    lines = metrics(whole)
    assert [line["mode"] for line in lines] == ["dense"] * 3 + ["sparse"] * 5
    assert [line["step"] for line in lines if "test" in line] == [3, 7]
    assert {line["context"] for line in lines} == {32, 64}
    rates = [line["rate"] for line in lines]
    assert rates[0] == pytest.approx(rates[1] / 2)
    assert rates[1:] == sorted(rates[1:], reverse=True)


def test_a_folder_of_another_run_is_refused(whole):
    for options, message in (
        ({"seed": 1}, "must be of a run with these settings, got another seed"),
        ({"kl": 0.5}, "got another schedule"),
        ({"backend": "triton"}, "got another backend"),
        ({"steps": 9}, "steps must be 8, as in the run that is continued, got 9"),
    ):
        with pytest.raises(ValueError, match=message):
            train.train(TrainOptions(out=whole, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"minutes": 0.0}, "minutes must be finite and positive, got 0.0"),
        ({"minutes": 1.0, "steps": 2}, r"minutes must be None where steps are given, got 1\.0"),
        ({"warm_up": 1.5}, r"warm_up must be from 0 to 1, got 1\.5"),
        ({"kl": -1.0}, r"kl must be finite and at least 0, got -1\.0"),
        ({"backend": "reference"}, "backend must be one with gradients, torch or triton"),
        ({"preset": "huge"}, "preset must be tiny or small, got 'huge'"),
    ],
)
def test_bad_options_are_named(options, message, tmp_path, as_users_run_it):
    with pytest.raises(ValueError, match=message):
        train.train(TrainOptions(out=tmp_path, **options))


def test_a_plan_leaves_nothing_behind(tmp_path):
    plain, planned = (Trainer(MICRO, 0) for _ in range(2))
    planned.plan(10.0)
    assert planned.schedule.steps > 1
    longer = planned.schedule.steps
    planned.plan(40.0)
    assert 2 * longer < planned.schedule.steps < 8 * longer
    assert all(router.load.sum() == 0 for router in planned.model.routers())
    planned.schedule = plain.schedule
    one, other = plain.take_step(), planned.take_step()
    assert one | {"seconds": 0} == other | {"seconds": 0}


def test_a_test_studies_index_and_experts(whole):
    """Two MSA layers of two groups, one layer with four experts; in dense steps too."""
    for line in metrics(whole):
        if "test" in line:
            test = line["test"]
            assert len(test["kl"]) == 2
            assert min(test["kl"]) > 0
            for name in ("block_recall", "score_recall"):
                assert [len(groups) for groups in test[name]] == [2, 2]
                assert all(0 <= value <= 1 for groups in test[name] for value in groups)
            (load,) = test["expert_load"]
            assert len(load) == 4
            assert sum(load) == pytest.approx(1)
