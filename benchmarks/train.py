"""`msa bench train` checks and times a training step on a GPU.

The same without tyro: python -m benchmarks.train [--out results.json] [--parts steps warm_up]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal, get_args

from rich.console import Console

from benchmarks import report

Part = Literal["steps", "warm_up"]


@dataclass(frozen=True)
class TrainOptions(report.Options):
    """Check, then time forward, backward and alignment loss on this GPU against dense attention.

    Takes about two minutes on a Hopper GPU.
    """

    parts: tuple[Part, ...] = get_args(Part)
    """What to measure: steps of 8K to 128K tokens, the warm-up form at 32K."""


def run(options: TrainOptions) -> int:
    """Measure, write, print the table. Exit codes: 2 without a GPU, 1 for wrong results."""
    return report.measure("train", options, "benchmarks.train_stages", show)[0]


def show(found: dict[str, Any], console: Console | None = None) -> None:
    """Print the results as a table."""
    console = console or Console()
    made = report.table(
        "A training step, ms: forward, backward, alignment loss", "tokens", "rho", "dense", "MSA",
        "times", "forward", "KL", "dQ", "dKdV", "GiB", "dense",
    )  # fmt: skip
    for row in found.get("steps", ()):
        dense = row["dense"]["ms"]
        for sparse in row["sparse"]:
            stages = (sparse["stages"][s]["ms"] for s in ("forward", "align", "queries", "keys"))
            made.add_row(
                f"{row['n'] // 1024}K", f"{sparse['keep']}", f"{dense:.1f}",
                f"{sparse['step']['ms']:.1f}", f"{dense / sparse['step']['ms']:.2f}",
                *(f"{ms:.1f}" for ms in stages), f"{sparse['extra_gib']:.1f}",
                f"{row['dense_extra_gib']:.1f}",
            )  # fmt: skip
    console.print(made)
    if warm := found.get("warm_up"):
        dense, both = warm["dense"]["ms"], warm["both"]["ms"]
        console.print(
            f"Warm-up at {warm['n'] // 1024}K: dense {dense:.1f} ms, with the loss over all "
            f"visible tokens {both:.1f} ms, {both / dense:.2f} times as long."
        )


if __name__ == "__main__":
    sys.exit(report.main(TrainOptions, run))
