"""`msa train`: the paper's schedule on documents with hidden records, resumable to the bit.

    python -m msa.model.train --preset small --minutes 7 --out DIR

is the same command where tyro is not installed. `torchrun --nproc-per-node N -m` in place of
`python -m` trains on N GPUs of one machine, with the losses that one would have had.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from msa import files
from msa.dispatch import BackendName
from msa.model import checks, interrupts, plain
from msa.model.config import ModelConfig
from msa.model.plain import given
from msa.model.presets import PRESETS, Preset, PresetName

if TYPE_CHECKING:
    from msa.model.ranks import Ranks
    from msa.model.trainer import Trainer

METRICS = "metrics.jsonl"
Twin = Literal["msa", "dense", "window"]
TrainWatch = Callable[[dict[str, Any]], "bool | None"]
HELD_OUT = 16
"""Documents of each test."""
STUDIED = 2
"""Those of them on which index and experts are studied."""


@dataclass(frozen=True)
class TrainOptions:
    """Train a model to read documents and to find the pictures that they hide.

    Writes model.safetensors, config.json, metrics.jsonl (one line per step) and state.pt, from
    which the same command goes on after an interruption.
    """

    preset: PresetName = "tiny"
    """tiny: two CPU cores, under five minutes. small: a GPU."""
    out: Path = Path("trained")
    """Where to write; a run that lies there is continued."""
    seed: int = 0
    """Of weights and documents."""
    steps: int | None = None
    """How many; None: those of the preset."""
    minutes: float | None = None
    """Instead of steps: as many as fit, judged by timing the first batches."""
    attention: Twin | None = None
    """dense: no index, every layer reads everything. window: the last blocks alone, as many as
    top-k has places, no warm-up and no loss of the index unless asked for. None: the preset's."""
    warm_up: float | None = None
    """The share of steps with dense attention, in which the index only watches. None: that of the
    preset."""
    kl: float | None = None
    """How much the loss of the index branches counts. None: as in the preset."""
    index_gradient: bool = False
    """Let that loss reach the backbone as well: no stop-gradient at the index branch."""
    block_size: int | None = None
    """Tokens in a key block. This and the next three, None: as in the preset."""
    top_k: int | None = None
    """Blocks kept per query and group."""
    sink_blocks: int | None = None
    """How many of them are the first ones of the text, whatever their scores."""
    local_blocks: int | None = None
    """How many of them are the last visible ones, the query's own first."""
    start: Path | None = None
    """A folder of a trained model, whose sizes and weights are those to begin with."""
    device: str | None = None
    """cpu or cuda; None: that of the preset."""
    backend: BackendName | None = None
    """Who computes MSA layers; None: that of the preset."""


def run(options: TrainOptions) -> int:
    """Train with a progress bar, then say what came of it.

    Raises:
        KeyboardInterrupt: after Ctrl-C, with the step from which the same command goes on.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from msa.model.ranks import read_ranks

    console = Console(quiet=not read_ranks("cpu").first)
    columns = "{task.completed}/{task.total} {task.fields[told]}"
    bar = Progress(
        TextColumn("Training"), BarColumn(), TextColumn(columns), TimeRemainingColumn(),
        console=console,
    )  # fmt: skip
    stop, steps = interrupts.Flag(), {"taken": 0, "all": 0}
    with bar, interrupts.patient(stop, "after this step, which it saves"):
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
                "stopped at once; the same command goes on from the last step that was saved"
            ) from None
    if steps["taken"] < steps["all"]:
        raise KeyboardInterrupt(
            f"stopped after step {steps['taken']:,} of {steps['all']:,}, which is saved in "
            f"{folder}; the same command goes on from there"
        )
    console.print(f"The model lies in {folder}.", markup=False, soft_wrap=True)
    return 0


def train(options: TrainOptions, watch: TrainWatch | None = None) -> Path:
    """Train to the end; `watch` sees each line of the metrics. Returns the folder.

    Where `watch` says True the run stops, and the same options go on from there.

    Raises:
        TypeError, ValueError: options that do not go together, a device that is not there, a folder
            of another run, or one that another process is writing to.
    """
    from msa.model import checkpoint
    from msa.model.ranks import joined

    preset, folder = read_preset(options), options.out
    checks.check_device(preset.device)
    if options.start is not None:
        weights = checkpoint.read_weights(options.start / checkpoint.WEIGHTS)
        checkpoint.check_sizes(options.start, preset.model, weights)
    files.check_folder("out", folder)
    with (
        joined(preset.device) as ranks,
        files.locked("out", folder) if ranks.first else nullcontext(),
    ):
        _train(options, preset, ranks, watch)
    return folder


def _train(options: TrainOptions, preset: Preset, ranks: Ranks, watch: TrainWatch | None) -> None:
    """The first of the processes tests and writes; the others only take steps."""
    from msa.model import checkpoint
    from msa.model.trainer import STATE, Trainer

    folder = options.out
    trainer = Trainer(preset, options.seed, options.start, ranks)
    if (folder / STATE).exists():
        trainer.resume(folder)
        checks.check_steps(options.steps, trainer.schedule.steps)
    elif options.minutes is not None:
        trainer.plan(60 * options.minutes)
    schedule = trainer.schedule
    path = metrics_until(folder / METRICS, trainer.step) if ranks.first else Path(os.devnull)
    if ranks.first and trainer.step == schedule.steps:  # nothing left but to see that it is there
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
    """The model and the state; before them, for good, the metrics of the steps that led there."""
    os.fsync(metrics.fileno())
    trainer.save(folder)


def test(model: Any, preset: Preset, mode: Any) -> dict[str, Any]:
    """Unseen documents of the longest context: answers, and how index and experts do on a few.

    These are studied under MSA also while attention is still dense: as if it began now.
    """
    from msa.model.evaluate import read, unseen_documents
    from msa.model.study import study

    schedule, config = preset.schedule, preset.model.msa
    length = max(schedule.contexts)
    records = schedule.records(length)
    documents = unseen_documents(length, records, records, HELD_OUT)
    at_once = max(1, schedule.tokens // length)
    reading = read(model, documents, mode=mode, half=preset.half, at_once=at_once)
    found = study(model, documents[:STUDIED], half=preset.half)
    return reading.summary(config.top_k * config.block_size) | found.summary()


def read_preset(options: TrainOptions) -> Preset:
    """The preset, but for what the options say otherwise."""
    checks.check_training(options, tuple(PRESETS))
    preset = PRESETS[options.preset]
    twin: dict[str, Any] = {}
    if options.attention == "dense":
        twin = {"warm_up": 1.0}
    elif options.attention == "window":
        twin = {"warm_up": 0.0, "kl": 0.0}
    return replace(
        preset,
        model=read_model(options, preset.model),
        schedule=replace(preset.schedule, **twin | given(options, "steps", "warm_up", "kl")),
        device=options.device or preset.device,
        backend=options.backend or preset.backend,
    )


def read_model(options: TrainOptions, model: ModelConfig) -> ModelConfig:
    """The preset's sizes or those of the folder to start from, but for what the options say."""
    if options.start is not None:
        from msa.model.checkpoint import read_config

        model = read_config(options.start)
    blocks = ("block_size", "top_k", "sink_blocks", "local_blocks")
    msa, kinds = replace(model.msa, **given(options, *blocks)), model.attention
    if options.attention is not None:
        kinds = ("dense" if options.attention == "dense" else "msa",) * model.layers
    if options.attention == "window":
        msa = replace(msa, local_blocks=msa.top_k - msa.sink_blocks)
    return replace(model, attention=kinds, msa=msa, index_gradient=options.index_gradient)


def metrics_until(path: Path, step: int) -> Path:
    """Cut off the lines of steps that will be taken again.

    Raises:
        ValueError: a step before these has no line.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    checks.check_metrics(path, lines, step)
    files.write(path, b"".join(lines[:step]))
    return path


def describe(test: dict[str, Any]) -> str:
    """One line for people; a recall is the mean of layers and groups."""
    shares = {name: test[name] for name in ("answers", "near", "far")}
    for name in ("block_recall", "score_recall"):
        values = [value for groups in test[name] for value in groups]
        shares[name.replace("_", " ")] = sum(values) / len(values) if values else None
    told = (f"{name} {'-' if x is None else format(x, '.1%')}" for name, x in shares.items())
    return f"unseen: prose {test['prose']:.3f} nats, {', '.join(told)}"


def main(arguments: list[str] | None = None) -> int:
    """The command without tyro."""
    from msa import cli

    def call() -> int:
        return run(plain.read(TrainOptions, "python -m msa.model.train", arguments))

    return cli.guarded(lambda: cli.supplied("train", call))


if __name__ == "__main__":
    sys.exit(main())
