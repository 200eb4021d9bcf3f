"""What every benchmark on a GPU says: which machine, which versions, when; results as JSON."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table


def has_device(command: str) -> bool:
    """Whether torch sees a CUDA device; if not, say on the error stream who needs one."""
    import torch

    if not torch.cuda.is_available():
        print(
            f"{command} needs a CUDA device, and torch {torch.__version__} sees none here",
            file=sys.stderr,
        )
        return False
    return True


def machine() -> dict[str, Any]:
    """The head of a results file: device, multiprocessors, torch, triton, date."""
    import torch
    import triton

    device = torch.cuda.get_device_properties(0)
    return {
        "device": device.name,
        "multiprocessors": device.multi_processor_count,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
    }


def results_path(benchmark: str, machine: dict[str, Any]) -> Path:
    """Where results of this machine belong.

    >>> str(results_path("prefill", {"device": "NVIDIA H100 80GB HBM3"}))
    'benchmarks/results/prefill_h100.json'
    >>> str(results_path("prefill", {"device": "NVIDIA A100-SXM4-80GB"}))
    'benchmarks/results/prefill_a100.json'
    """
    word = machine["device"].removeprefix("NVIDIA ").replace("-", " ").split()[0].lower()
    return Path("benchmarks/results") / f"{benchmark}_{word}.json"


def write(path: Path, found: dict[str, Any]) -> None:
    """The results as JSON, in the folder made for them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


def arguments(doc: str | None, parts: tuple[str, ...]) -> argparse.Namespace:
    """`out` and `parts` from the command line, where tyro is not installed."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--parts", nargs="*", default=parts, choices=parts)
    return parser.parse_args()


def measure(
    benchmark: str,
    out: Path | None,
    names: Iterable[str],
    parts: dict[str, Callable[[], Any]],
    wrong: type[Exception],
) -> tuple[dict[str, Any], Path] | None:
    """Run parts by name and write the results after each; what was found, and where it lies.

    None, and a word on the error stream, if a part raises `wrong`.
    """
    found = machine()
    out = out or results_path(benchmark, found)
    try:
        for name in names:
            found[name] = parts[name]()
            write(out, found)
    except wrong as error:
        print(f"msa bench {benchmark}: not timed, for it is wrong: {error}", file=sys.stderr)
        return None
    return found, out


def table(title: str, *columns: str) -> Table:
    """An empty table of numbers, its first column a name."""
    made = Table(title=title, title_style="bold", box=box.SIMPLE_HEAD)
    made.title_justify = made.caption_justify = "left"
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i else "left", no_wrap=True)
    return made
