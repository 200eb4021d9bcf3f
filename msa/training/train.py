"""`msa train`: trains a model by the schedule of its preset. An interrupted run can continue.

    torchrun --nproc-per-node N -m msa.cli train --preset small --minutes 7 --out DIR

trains on N GPUs of one machine, each with a share of the documents. With --context-parallel M,
groups of M GPUs read the same documents, each GPU a part of the tokens. The losses are those of a
run on one GPU.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO

from msa import files
from msa.model import checkpoint
from msa.model.attention import Mode
from msa.model.model import Model
from msa.training.evaluate import read_documents, unseen_documents
from msa.training.interrupts import Flag, patient
from msa.training.layer_stats import measure_layers
from msa.training.options import TrainOptions, read_preset
from msa.training.presets import Preset
from msa.training.ranks import Ranks, joined, read_ranks
from msa.training.trainer import STATE, Trainer

METRICS = "metrics.jsonl"
TrainWatch = Callable[[dict[str, Any]], "bool | None"]
HELD_OUT = 16
"""Documents in each test."""
MEASURED = 2
"""The number of them that `measure_layers` reads."""


def run(options: TrainOptions) -> int:
    """Train with a progress bar, then print the folder of the model.

    Raises:
        KeyboardInterrupt: after Ctrl-C, with the step from which the same command continues.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(quiet=not read_ranks("cpu").first)
    columns = "{task.completed}/{task.total} {task.fields[told]}"
    bar = Progress(
        TextColumn("Training"), BarColumn(), TextColumn(columns), TimeRemainingColumn(),
        console=console,
    )  # fmt: skip
    stop, steps = Flag(), {"taken": 0, "all": 0}
    with bar, patient(stop, "after this step, which it saves"):
        task = bar.add_task("", total=None, told="")

        def watch(line: dict[str, Any]) -> bool:
            steps.update({"taken": line["step"] + 1, "all": line["steps"]})
            told = f"{line['mode']} loss {line['language']:.3f} kl {line['kl']:.3f}"
            bar.update(task, completed=line["step"] + 1, total=line["steps"], told=told)
            if "test" in line:
                console.print(f"step {line['step'] + 1:6,} {describe(line['test'])}")
            return bool(stop.value)

        try:
            folder = train(options, watch)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                "stopped at once; the same command continues from the last step that was saved"
            ) from None
    if steps["taken"] < steps["all"]:
        raise KeyboardInterrupt(
            f"stopped after step {steps['taken']:,} of {steps['all']:,}, which is saved in "
            f"{folder}; the same command continues from there"
        )
    console.print(f"The model is in {folder}.", markup=False, soft_wrap=True)
    return 0


def train(options: TrainOptions, watch: TrainWatch | None = None) -> Path:
    """Train to the end of the schedule. Returns the folder.

    `watch` is called with each line of the metrics. If it returns True the run stops, and the same
    options continue it.

    Raises:
        TypeError, ValueError: options that contradict each other, a device that does not exist, a
            folder of another run, or a folder that another process is writing to.
    """
    preset, folder = read_preset(options), options.out
    checkpoint.check_device(preset.device)
    if options.start is not None:
        weights = checkpoint.read_weights(options.start / checkpoint.WEIGHTS)
        checkpoint.check_sizes(options.start, preset.model, weights)
    files.check_folder("out", folder)
    with (
        joined(preset.device, options.context_parallel) as ranks,
        files.locked("out", folder) if ranks.first else nullcontext(),
    ):
        _train(options, preset, ranks, watch)
    return folder


def _train(options: TrainOptions, preset: Preset, ranks: Ranks, watch: TrainWatch | None) -> None:
    """Train in this process. The first process also tests and writes files."""
    folder = options.out
    trainer = Trainer(preset, options.seed, options.start, ranks)
    if (folder / STATE).exists():
        trainer.resume(folder)
        _check_steps(options.steps, trainer.schedule.steps)
    elif options.minutes is not None:
        trainer.plan(60 * options.minutes)
    schedule = trainer.schedule
    path = metrics_until(folder / METRICS, trainer.step) if ranks.first else Path(os.devnull)
    if (
        ranks.first and trainer.step == schedule.steps
    ):  # all steps are taken; the model may be missing
        checkpoint.save(trainer.model, folder, half=preset.half)
    with path.open("a") as file:
        while trainer.step < schedule.steps:
            line = trainer.take_step()
            last = trainer.step == schedule.steps
            if ranks.first and (last or trainer.step % schedule.test_every == 0):
                line["test"] = test(trainer.model, preset, line["mode"])
            file.write(json.dumps(line) + "\n")
            file.flush()
            if ranks.first and (last or trainer.step % schedule.save_every == 0):
                save(trainer, folder, file)
            if ranks.any(watch is not None and bool(watch(line))):
                if ranks.first:
                    save(trainer, folder, file)
                break


def save(trainer: Trainer, folder: Path, metrics: TextIO) -> None:
    """Write the model and the state, after the metrics of all steps before are on disk."""
    os.fsync(metrics.fileno())
    trainer.save(folder)


def test(model: Model, preset: Preset, mode: Mode) -> dict[str, Any]:
    """Test a model on unseen documents of the longest context: answers, index and experts.

    The statistics of the layers are those of MSA, also while attention is still dense.
    """
    schedule, config = preset.schedule, preset.model.msa
    length = max(schedule.contexts)
    records = schedule.records(length)
    documents = unseen_documents(length, records, records, HELD_OUT)
    at_once = max(1, schedule.tokens // length)
    reading = read_documents(model, documents, mode=mode, half=preset.half, at_once=at_once)
    layers = measure_layers(model, documents[:MEASURED], half=preset.half)
    return reading.summary(config.top_k * config.block_size) | layers.summary()


def metrics_until(path: Path, step: int) -> Path:
    """Remove the lines of steps that will be taken again.

    Raises:
        ValueError: an earlier step has no line.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    _check_metrics(path, lines, step)
    files.write(path, b"".join(lines[:step]))
    return path


def describe(test: dict[str, Any]) -> str:
    """The results of a test as one line of text. A recall is the mean over layers and groups."""
    shares = {name: test[name] for name in ("answers", "near", "far")}
    for name in ("block_recall", "score_recall"):
        values = [value for groups in test[name] for value in groups]
        shares[name.replace("_", " ")] = sum(values) / len(values) if values else None
    told = (f"{name} {'-' if x is None else format(x, '.1%')}" for name, x in shares.items())
    return f"unseen: prose {test['prose']:.3f} nats, {', '.join(told)}"


# -- checks ---------------------------------------------------------------------------------------
def _check_steps(wanted: int | None, planned: int) -> None:
    """A continued run keeps its number of steps, for its learning rates depend on that number."""
    if wanted is not None and wanted != planned:
        raise ValueError(f"steps must be {planned}, as in the run that is continued, got {wanted}")


def _check_metrics(where: Path, lines: Sequence[bytes], steps: int) -> None:
    """The file has a whole line for each step that the state contains, in their order."""
    for number in range(steps):
        line = lines[number] if number < len(lines) else b""
        try:
            step = json.loads(line)["step"] if line.endswith(b"\n") else None
        except (ValueError, KeyError, TypeError, RecursionError):
            step = None
        if step != number:
            raise ValueError(
                f"{where} must have a line for each of the {steps} steps that were taken, got "
                f"{'another' if line else 'none'} in place of step {number}: give another folder, "
                f"or remove this one to start again"
            )
