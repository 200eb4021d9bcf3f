"""`msa bench train`: a training step on a GPU, first correct, then fast; results and their table.

    python -m benchmarks.train [--out results.json] [--parts steps warm_up]

is the same command where tyro is not installed.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from rich.console import Console

from benchmarks import report

Part = Literal["steps", "warm_up"]


@dataclass(frozen=True)
class TrainOptions:
    """Check, then time forward, backward and alignment loss on this GPU against dense attention.

    Takes about two minutes on an H100.
    """

    out: Path = Path("benchmarks/results/train_h100.json")
    """Where to write the results; they are rewritten after each part."""
    parts: tuple[Part, ...] = get_args(Part)
    """What to measure: steps of 8K to 128K tokens, the warm-up form at 32K."""


def run(options: TrainOptions) -> int:
    """Measure, write, print the table; 2 without a GPU, 1 if something is wrong."""
    if not report.has_device("msa bench train"):
        return 2
    from benchmarks.checks import Wrong
    from benchmarks.train_stages import PARTS

    found: dict[str, Any] = report.machine()
    try:
        for name in options.parts:
            found[name] = PARTS[name]()
            report.write(options.out, found)
    except Wrong as error:
        print(f"msa bench train: not timed, for it is wrong: {error}", file=sys.stderr)
        return 1
    show(found)
    print(f"Results: {options.out}.")
    return 0


def show(found: dict[str, Any]) -> None:
    """The results as tables."""
    console = Console()
    made = report.table(
        "A training step, ms: forward, backward, alignment loss", "tokens", "rho", "dense", "MSA",
        "times", "forward", "align", "dQ", "dK, dV", "GiB", "dense GiB",
    )  # fmt: skip
    for row in found.get("steps", ()):
        dense = row["dense"]["ms"]
        for sparse in row["sparse"]:
            stages = (sparse["stages"][s]["ms"] for s in ("forward", "align", "queries", "keys"))
            made.add_row(
                f"{row['n'] // 1024}K", f"{sparse['keep']}", f"{dense:.2f}",
                f"{sparse['step']['ms']:.2f}", f"{dense / sparse['step']['ms']:.2f}",
                *(f"{ms:.2f}" for ms in stages), f"{sparse['extra_gib']:.1f}",
                f"{row['dense_extra_gib']:.1f}",
            )  # fmt: skip
    console.print(made)
    if warm := found.get("warm_up"):
        dense = warm["dense"]["ms"]
        console.print(
            f"Warm-up at {warm['n'] // 1024}K: dense {dense:.1f} ms, with the loss over all "
            f"visible tokens {warm['both']['ms']:.1f} ms, {warm['both']['ms'] / dense:.2f} times."
        )


def main() -> int:
    """The command without tyro."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=TrainOptions.out)
    parser.add_argument("--parts", nargs="*", default=get_args(Part), choices=get_args(Part))
    given = parser.parse_args()
    return run(TrainOptions(given.out, tuple(given.parts)))


if __name__ == "__main__":
    sys.exit(main())
