"""`msa findings run`: trains every row of the ablations with every seed, and reads each model.

Each run has its own folder and continues if it was interrupted. The results are one JSON file. It
is written after each job.
"""

from __future__ import annotations

import datetime
import json
import math
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from msa import files
from msa.ablations.readings import finite, read_model
from msa.ablations.results import RESULTS, Found, read_results
from msa.ablations.rows import LINES, ROWS, Row
from msa.checks import check_count, check_positive, check_seed
from msa.model import checkpoint
from msa.training.convert_dense import convert
from msa.training.interrupts import Flag, ignored, patient
from msa.training.options import TrainOptions, read_preset
from msa.training.train import METRICS, train

CONTEXT = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class RunOptions:
    """Train every row with every seed, and read each model. Runs that exist are not repeated."""

    rows: tuple[str, ...] = tuple(ROWS)
    """The names of the rows to train."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Draw weights and documents; each from 0 up to 2**63 - 1."""
    workers: int = 1
    """The number of processes, each with one thread. With 1, this process does all the work."""
    steps: int = 300
    """Steps of each row. MSA-CPT takes a third as many, after the steps of the dense twin."""
    minutes: float | None = None
    """Stop after this time. The same command continues runs that are not complete."""
    documents: int = 64
    """Unseen documents that every model reads, each with 512 tokens and eight questions."""
    out: Path = Path("findings")
    """The folder of the runs and of findings_tiny.json."""


@dataclass(frozen=True)
class Job:
    """Runs that one process trains one after the other."""

    rows: tuple[Row, ...]
    seed: int
    options: RunOptions
    until: float
    """The time to stop, in seconds since 1970."""

    @property
    def cost(self) -> float:
        """The approximate time: 1 per dense step, 2 per sparse step, 200 for longer documents."""
        plans = [options_of(row, self.options.steps, self.seed, Path()) for row in self.rows]
        schedules = [read_preset(plan).schedule for plan in plans]
        longer = sum(200 for row in self.rows if row.name in dict(LINES))
        return longer + sum(schedule.steps * (2 - schedule.warm_up) for schedule in schedules)


def run(options: RunOptions) -> int:
    """Train and read the missing runs, and print each; 1 if a run failed.

    Raises:
        ValueError: options out of range, a folder with results of other settings, or a folder that
            another process is writing to.
        KeyboardInterrupt: after Ctrl-C, with the place from which the same command continues.
    """
    _check_options(options)
    files.check_folder("out", options.out)
    stop = Flag() if options.workers == 1 else CONTEXT.RawValue("b", 0)
    with files.locked("out", options.out), patient(stop, "when the runs have saved their steps"):
        try:
            return _run(options, stop)
        except KeyboardInterrupt as error:
            default = (
                "stopped at once; the same command continues from the last steps that were saved"
            )
            raise KeyboardInterrupt(str(error) or default) from None


def _run(options: RunOptions, stop: Flag) -> int:
    """Do the jobs, and write the results after each."""
    started = time.time()
    until = math.inf if options.minutes is None else started + 60 * options.minutes
    path, wanted = options.out / RESULTS, {(r, s) for r in options.rows for s in options.seeds}
    found, failed = open_results(path, options), False
    for outcome in outcomes(missing(found, options, until), options.workers, stop):
        if isinstance(outcome, str):
            failed = True
            print(f"msa findings run: {outcome}", file=sys.stderr)
            continue
        if outcome:
            found["runs"] += outcome
            files.write(path, (json.dumps(found, indent=1) + "\n").encode())
        for one in outcome:
            at, share = f"{time.time() - started:5.0f} s", one["answers"]
            answers = "none" if share is None else f"{share:.1%}"
            print(f"{at}  {one['row']}, seed {one['seed']}: answers {answers}", flush=True)
    there = len(wanted & {(run["row"], run["seed"]) for run in found["runs"]})
    if stop.value and there < len(wanted):
        raise KeyboardInterrupt(
            f"stopped with {there} of {len(wanted)} runs in {path}; the same command continues"
        )
    print(f"{path}: {there} of {len(wanted)} runs")
    return int(failed)


# -- jobs ------------------------------------------------------------------------------------------
def open_results(path: Path, options: RunOptions) -> Found:
    """The results in the folder, or new results without runs."""
    own: Found = {
        "preset": "tiny", "steps": options.steps, "documents": options.documents,
        "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip
    found: Found = {"device": cpu_name(), "cores": os.cpu_count(), **own}
    found |= {"date": datetime.date.today().isoformat(), "runs": []}
    if path.exists():
        device, found = found["device"], read_results("out", path)
        _check_same_settings(str(path), found, own)
        if device not in found["device"]:
            found["device"] += f" and {device}"
    return found


def missing(found: Found, options: RunOptions, until: float) -> list[Job]:
    """The missing runs as jobs, the longest first. A run that starts from another is in its job."""
    there = {(run["row"], run["seed"]) for run in found["runs"]}
    jobs: list[Job] = []
    for seed in options.seeds:
        wanted = [ROWS[name] for name in options.rows if (name, seed) not in there]
        chains = {row.name: [row] for row in wanted}
        for row in wanted:
            if row.after in chains:
                chains[row.after] += chains.pop(row.name)
        jobs += [Job(tuple(rows), seed, options, until) for rows in chains.values()]
    return sorted(jobs, key=lambda job: -job.cost)


def outcomes(jobs: Sequence[Job], workers: int, stop: Flag) -> Iterator[list[dict[str, Any]] | str]:
    """The runs of each job, in the order in which the jobs end; or a sentence about its error."""
    global stopping
    if workers == 1:
        stopping = stop
        for job in jobs:
            yield attempt(job, partial(work, job))
        return
    with ProcessPoolExecutor(workers, CONTEXT, initializer=start_worker, initargs=(stop,)) as pool:
        with ignored():
            futures = {pool.submit(work, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                yield attempt(futures[future], future.result)
        except KeyboardInterrupt:  # the second Ctrl-C: stop without saving
            for process in multiprocessing.active_children():
                process.terminate()
            raise


stopping = Flag()
"""Whether the jobs of this process must stop."""


def start_worker(stop: Flag) -> None:
    """Prepare a worker process: it has one thread, and `stop` is shared with the first process."""
    global stopping
    stopping = stop
    torch.set_num_threads(1)


def attempt(job: Job, result: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]] | str:
    """The runs of a job, or a sentence about its error, so that the other jobs go on.

    A missing library ends all jobs: each of them needs it.
    """
    try:
        return result()
    except ModuleNotFoundError:
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, (OSError, ValueError)) else repr(error)
        return f"{' and '.join(row.name for row in job.rows)}, seed {job.seed}: {reason}"


# -- one job --------------------------------------------------------------------------------------
def work(job: Job) -> list[dict[str, Any]]:
    """Train and read the runs of a job, until the time is over."""
    runs: list[dict[str, Any]] = []
    for row in job.rows:
        start = None
        if row.after is not None:
            first = trained(ROWS[row.after], job, None)
            if first is None:
                break
            start = job.options.out / f"{row.name}-{job.seed}" / "start"
            dense = checkpoint.load(first)
            checkpoint.save(convert(dense, dense.config.msa, job.seed), start)
        folder = trained(row, job, start)
        if folder is None:
            break
        runs.append(read_run(row, job, folder))
    return runs


def trained(row: Row, job: Job, start: Path | None) -> Path | None:
    """Train a run. Returns its folder; None if the time is over before the last step."""
    out = job.options.out / f"{row.name}-{job.seed}"
    if is_over(job):
        return None
    options = options_of(row, job.options.steps, job.seed, out, start)
    train(options, lambda line: is_over(job))
    return out if len(metrics(out)) == options.steps else None


def is_over(job: Job) -> bool:
    """Whether the time of the job is over, or Ctrl-C was pressed."""
    return time.time() > job.until or bool(stopping.value)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run: one line for each step."""
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def options_of(
    row: Row, steps: int, seed: int, out: Path, start: Path | None = None
) -> TrainOptions:
    """The options of `msa train` for one run of a row.

    >>> options_of(ROWS["no-kl"], 300, 1, Path("out")).kl
    0.0
    """
    return TrainOptions(steps=row.steps(steps), seed=seed, out=out, start=start, **row.overrides)


def read_run(row: Row, job: Job, folder: Path) -> dict[str, Any]:
    """The results of a run, with its readings."""
    model = checkpoint.load(folder, backend="torch")
    lines = metrics(folder)
    later = [line["backbone_gradient"] for line in lines[len(lines) // 2 :]]
    return {
        "row": row.name, "seed": job.seed, "command": row.command(job.options.steps, job.seed),
        "steps": len(lines), "seconds": sum(line["seconds"] for line in lines),
        "steepest": finite(max(later)), **read_model(row.name, model, job.options.documents),
    }  # fmt: skip


def cpu_name() -> str:
    """The name of the CPU, as the operating system says."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


# -- checks ---------------------------------------------------------------------------------------
def _check_options(options: RunOptions) -> None:
    """The rows exist, seeds are at least 0, counts are at least 1."""
    for row in options.rows:
        if row not in ROWS:
            raise ValueError(f"rows must be of {', '.join(ROWS)}, got {row!r}")
    for seed in options.seeds:
        check_seed("seeds", seed)
    for name in ("rows", "seeds"):
        values = getattr(options, name)
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name} must name at least one, and each once, got {values}")
    for name in ("workers", "steps", "documents"):
        check_count(name, getattr(options, name), 1)
    if options.minutes is not None:
        check_positive("minutes", options.minutes)


def _check_same_settings(where: str, found: dict[str, Any], own: dict[str, Any]) -> None:
    """All runs of a file have the same settings."""
    for name, value in own.items():
        if found.get(name) != value:
            raise ValueError(f"{where} must be of {name} {value}, got {found.get(name)}")
