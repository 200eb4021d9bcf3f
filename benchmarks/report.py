"""What all benchmarks on a GPU share: options, the head of a results file, writing, tables."""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from benchmarks.reading import device
from msa import files


def has_device(command: str) -> bool:
    """Whether torch sees a CUDA device; if not, print which command needs one."""
    import torch

    if not torch.cuda.is_available():
        print(
            f"{command} needs a CUDA device, and torch {torch.__version__} sees none here",
            file=sys.stderr,
        )
        return False
    return True


def machine() -> dict[str, Any]:
    """Return the head of a results file: device, versions, date, and the kernels that select.

    The kernels are those that `msa.kernel_choice` takes on this device for the usual shape.
    """
    import torch
    import triton

    from msa import kernel_choice

    gpu = torch.cuda.get_device_properties(0)
    return {
        "device": gpu.name,
        "multiprocessors": gpu.multi_processor_count,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "kernels": kernel_choice.choose("auto", kernel_choice.usual_call()),
        "date": datetime.date.today().isoformat(),
    }


def results_path(benchmark: str, machine: dict[str, Any]) -> Path:
    """Return the path for results of this machine; Git ignores the folder.

    >>> str(results_path("prefill", {"device": "NVIDIA H100 80GB HBM3"}))
    'benchmarks/run/prefill_h100.json'
    >>> str(results_path("prefill", {"device": "NVIDIA A100-SXM4-80GB"}))
    'benchmarks/run/prefill_a100.json'
    """
    return Path("benchmarks/run") / f"{benchmark}_{device(machine).lower()}.json"


def write(path: Path, found: dict[str, Any]) -> None:
    """Write the results as JSON; a missing folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, (json.dumps(found, indent=1) + "\n").encode())


@dataclass(frozen=True)
class Options:
    """What every benchmark on a GPU takes; each adds `parts`, the names of what it measures."""

    out: Path | None = None
    """Where to write the results, again after each part; None is
    benchmarks/run/BENCHMARK_DEVICE.json."""


def main(options: Any, run: Callable[[Any], int]) -> int:
    """Run a benchmark with `--out` and `--parts` of the command line; tyro is not needed."""
    parser = argparse.ArgumentParser(description=options.__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--parts", nargs="*", default=options.parts, choices=options.parts)
    given = parser.parse_args()
    return run(options(out=given.out, parts=tuple(given.parts)))


def measure(
    benchmark: str,
    options: Any,
    stages: str,
    show: Callable[[dict[str, Any]], None],
    write_to: bool = True,
) -> tuple[int, Path]:
    """Run a benchmark's parts by name, write the results after each, then show them.

    Args:
        options: with `out`, where to write (None: `results_path`), and `parts`, their names.
        stages: the module that has the parts by name in PARTS; imported only where a GPU is.
        write_to: whether this process writes and prints; of several processes, the first one does.

    Returns:
        the exit code and the path of the results. The code is 0, or 2 without a GPU, or 1 if the
        results of a part are wrong; then a message is on the error stream.
    """
    if not has_device(f"msa bench {benchmark}"):
        return 2, Path()
    from benchmarks.checks import Wrong

    parts = importlib.import_module(stages).PARTS
    found = machine()
    out = options.out or results_path(benchmark, found)
    if write_to:
        files.check_target("out", out)
    try:
        for name in options.parts:
            found[name] = parts[name]()
            if write_to:
                write(out, found)
    except Wrong as error:
        print(f"msa bench {benchmark}: not timed, for it is wrong: {error}", file=sys.stderr)
        return 1, out
    if write_to:
        show(found)
        print(f"Results: {out}")
    return 0, out


def table(title: str, *columns: str) -> Table:
    """Make an empty table of numbers; its first column is a name."""
    made = Table(title=title, title_style="bold", box=box.SIMPLE_HEAD)
    made.title_justify = made.caption_justify = "left"
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i else "left", no_wrap=True)
    return made
