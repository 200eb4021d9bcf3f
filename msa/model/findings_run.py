"""`msa findings run`: trains every row of the findings with every seed, and reads what came of it.

One folder for each run, continued if it is there; one JSON file, written again after each job.
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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from msa import files, recall
from msa.config import MSAConfig
from msa.model import checkpoint, checks
from msa.model.attention import Mode, Seen
from msa.model.convert import convert
from msa.model.evaluate import read, unseen_documents
from msa.model.findings import LINES, RESULTS, ROWS, Found, Row, RunOptions, read_results
from msa.model.interrupts import Flag, deaf, patient
from msa.model.model import Model
from msa.model.presets import TINY
from msa.model.records import Document, pack
from msa.model.train import METRICS, read_preset, train

QUESTIONS = 8
LENGTHS = (512, 1024, 2048, 4096, 8192)
"""Tokens of unseen documents; all runs are compared on the first, the longest of training."""
LONG = 8
"""Documents of each length beyond that, and those that selections are judged on."""
BUDGETS = (1, 2, 3, 5, 8, 16)
NEAR = TINY.model.msa.top_k * TINY.model.msa.block_size
"""Records less far back than this are near, in every row."""
CONTEXT = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Job:
    """Runs that one process takes one after the other."""

    rows: tuple[Row, ...]
    seed: int
    options: RunOptions
    until: float
    """In seconds since 1970: when to stop."""

    @property
    def cost(self) -> float:
        """About how long it takes: a sparse step is two dense ones, longer documents are 200."""
        plans = [row.options(self.options.steps, self.seed, Path()) for row in self.rows]
        schedules = [read_preset(plan).schedule for plan in plans]
        longer = sum(200 for row in self.rows if row.name in dict(LINES))
        return longer + sum(schedule.steps * (2 - schedule.warm_up) for schedule in schedules)


def run(options: RunOptions) -> int:
    """Train and read what is missing, and say so; 1 if a run failed.

    Raises:
        ValueError: options out of range, results of other settings in the folder, or another
            process that is at work there.
        KeyboardInterrupt: after Ctrl-C, with what the same command goes on from.
    """
    checks.check_findings(options, tuple(ROWS))
    files.check_folder("out", options.out)
    stop = Flag() if options.workers == 1 else CONTEXT.RawValue("b", 0)
    with files.locked("out", options.out), patient(stop, "when the runs have saved their steps"):
        try:
            return _run(options, stop)
        except KeyboardInterrupt as error:
            told = "stopped at once; the same command goes on from the last steps that were saved"
            raise KeyboardInterrupt(str(error) or told) from None


def _run(options: RunOptions, stop: Flag) -> int:
    """One job after the other, or side by side."""
    started = time.time()
    until = math.inf if options.minutes is None else started + 60 * options.minutes
    path, wanted = options.out / RESULTS, {(r, s) for r in options.rows for s in options.seeds}
    found, failed = open_results(path, options), False
    for told in outcomes(missing(found, options, until), options.workers, stop):
        if isinstance(told, str):
            failed = True
            print(f"msa findings run: {told}", file=sys.stderr)
            continue
        if told:
            found["runs"] += told
            files.write(path, (json.dumps(found, indent=1) + "\n").encode())
        for one in told:
            at, share = f"{time.time() - started:5.0f} s", one["answers"]
            said = "none" if share is None else f"{share:.1%}"
            print(f"{at}  {one['row']}, seed {one['seed']}: answers {said}", flush=True)
    there = len(wanted & {(run["row"], run["seed"]) for run in found["runs"]})
    if stop.value and there < len(wanted):
        raise KeyboardInterrupt(
            f"stopped with {there} of {len(wanted)} runs in {path}; the same command goes on"
        )
    print(f"{path}: {there} of {len(wanted)} runs")
    return int(failed)


# -- what there is to do --------------------------------------------------------------------------
def open_results(path: Path, options: RunOptions) -> Found:
    """What lies there, or the head of what will."""
    own: Found = {
        "preset": "tiny", "steps": options.steps, "documents": options.documents,
        "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip
    found: Found = {"device": cpu_name(), "cores": os.cpu_count(), **own}
    found |= {"date": datetime.date.today().isoformat(), "runs": []}
    if path.exists():
        device, found = found["device"], read_results("out", path)
        checks.check_same_findings(str(path), found, own)
        if device not in found["device"]:
            found["device"] += f" and {device}"
    return found


def missing(found: Found, options: RunOptions, until: float) -> list[Job]:
    """The runs that are not there, the longest first; one that follows another goes with it."""
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
    """What each job found, in the order in which they end; or what was wrong with it."""
    global stopping
    if workers == 1:
        stopping = stop
        for job in jobs:
            yield attempt(job, partial(work, job))
        return
    with ProcessPoolExecutor(workers, CONTEXT, initializer=begin, initargs=(stop,)) as pool:
        with deaf():
            futures = {pool.submit(work, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                yield attempt(futures[future], future.result)
        except KeyboardInterrupt:  # the second one: what is not saved is given up
            for process in multiprocessing.active_children():
                process.terminate()
            raise


stopping = Flag()
"""Whether the jobs of this process are to stop."""


def begin(stop: Flag) -> None:
    """One more process: of one thread, and told by the first one when to stop."""
    global stopping
    stopping = stop
    torch.set_num_threads(1)


def attempt(job: Job, result: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]] | str:
    """One job that fails must not take the others with it, unless all of them lack a library."""
    try:
        return result()
    except ModuleNotFoundError:
        raise
    except Exception as error:
        told = str(error) if isinstance(error, (OSError, ValueError)) else repr(error)
        return f"{' and '.join(row.name for row in job.rows)}, seed {job.seed}: {told}"


# -- one job --------------------------------------------------------------------------------------
def work(job: Job) -> list[dict[str, Any]]:
    """Train and read the runs of a job, as many of them as there is time for."""
    told: list[dict[str, Any]] = []
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
        told.append(read_run(row, job, folder))
    return told


def trained(row: Row, job: Job, start: Path | None) -> Path | None:
    """The folder of a run that is at its end; None if the time is over before."""
    out = job.options.out / f"{row.name}-{job.seed}"
    if is_over(job):
        return None
    options = row.options(job.options.steps, job.seed, out, start)
    train(options, lambda line: is_over(job))
    return out if len(metrics(out)) == options.steps else None


def is_over(job: Job) -> bool:
    """Whether its time is, or Ctrl-C was pressed."""
    return time.time() > job.until or bool(stopping.value)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """A line for each step."""
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def read_run(row: Row, job: Job, folder: Path) -> dict[str, Any]:
    """All that is told of a run; what is not finite is None."""
    model = checkpoint.load(folder, backend="torch")
    documents = unseen(LENGTHS[0], job.options.documents)
    lines, own = metrics(folder), model.config.msa
    later = [line["backbone_gradient"] for line in lines[len(lines) // 2 :]]
    told: dict[str, Any] = {
        "row": row.name, "seed": job.seed, "command": row.command(job.options.steps, job.seed),
        "steps": len(lines), "seconds": sum(line["seconds"] for line in lines),
        "steepest": finite(max(later)),
        **judge(model, documents), **judge_index(model, documents[:LONG]),
    }  # fmt: skip
    told["budgets"] = [
        {"k": k, **judge(under(model, replace(own, top_k=k)), documents)}
        for k in (BUDGETS if row.name == "base" else ())
    ]
    told["lengths"] = [
        {"tokens": n, "how": how, **judge(way, unseen(n, LONG), mode)}
        for name, how in LINES
        if name == row.name
        for way, mode in [seen_as(model, how)]
        for n in LENGTHS
    ]
    return told


def seen_as(model: Model, how: str) -> tuple[Model, Mode]:
    """The same weights, reading everything, what the index chooses, or the last blocks alone."""
    if how == "window":
        own = model.config.msa
        model = under(model, replace(own, local_blocks=own.top_k - own.sink_blocks))
    return model, "dense" if how == "dense" else "sparse"


def under(model: Model, config: MSAConfig) -> Model:
    """The same weights, selecting otherwise."""
    other = Model(replace(model.config, msa=config), backend=model.backend)
    other.load_state_dict(model.state_dict())
    return other.eval()


def unseen(length: int, count: int) -> list[Document]:
    """Documents with eight pictures, all asked for."""
    return unseen_documents(length, QUESTIONS, QUESTIONS, count)


def judge(
    model: Model, documents: list[Document], mode: Mode = "sparse"
) -> dict[str, float | None]:
    """Prose and answers, near and far."""
    at_once = max(1, TINY.schedule.tokens // len(documents[0].tokens))
    summary = read(model, documents, mode=mode, at_once=at_once).summary(NEAR)
    return {name: finite(value) for name, value in summary.items()}


@torch.no_grad()
def judge_index(model: Model, documents: list[Document]) -> dict[str, float | None]:
    """The loss of the index and how many of the best blocks it finds, the mean of all layers.

    A dense model has neither, and a window no loss.
    """
    config, seen = model.config, list[Seen]()
    if "msa" not in config.attention:
        return {"kl": None, "block_recall": None, "score_recall": None}
    batch = pack(documents, checks.read_vision(config))
    kl = model(
        batch.tokens, batch.cu_seqlens, images=batch.images, align=True, watch=seen.append
    ).kl  # fmt: skip
    recalls = [recall.measure(s.q, s.k, s.selection, s.softmax_scale) for s in seen]
    chooses = config.msa.forced_blocks < config.msa.top_k
    return {
        "kl": finite(float(kl)) if chooses and kl is not None else None,
        "block_recall": sum(r.blocks for r in recalls) / len(recalls),
        "score_recall": finite(sum(r.score for r in recalls) / len(recalls)),
    }


def finite(value: float | None) -> float | None:
    """JSON has no NaN.

    >>> finite(0.5), finite(math.nan), finite(None)
    (0.5, None, None)
    """
    return value if value is not None and math.isfinite(value) else None


def cpu_name() -> str:
    """The model as the operating system calls it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
