"""`msa bench decode` checks and times a step of generation on a GPU.

The same without tyro: python -m benchmarks.decode [--out results.json] [--parts steps ...]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal, get_args

from rich.console import Console

from benchmarks import report
from benchmarks.reading import best_dense

Part = Literal["ceilings", "steps", "quality"]


@dataclass(frozen=True)
class DecodeOptions(report.Options):
    """Check, then time decoding over paged caches of up to four million tokens on this GPU.

    Takes about a minute on a Hopper GPU.
    """

    parts: tuple[Part, ...] = get_args(Part)
    """What to measure: the device's own ceilings, steps beside dense attention, what 8 bits
    lose."""


def run(options: DecodeOptions) -> int:
    """Measure, write, print the tables. Exit codes: 2 without a GPU, 1 for wrong results."""
    return report.measure("decode", options, "benchmarks.decode_stages", show)[0]


def show(found: dict[str, Any], console: Console | None = None) -> None:
    """Print the results as tables."""
    console = console or Console()
    made = report.table(
        "A decode step, µs: index, selection, attention", "batch x context", "form", "dense",
        "step", "times", "layer", "scores", "error",
    )  # fmt: skip
    for row in found.get("steps", ()):
        dense = best_dense(row)
        for form in (name for name in row if name not in ("batch", "context", "dense")):
            step = row[form]["step"]["us"]
            made.add_row(
                f"{row['batch']} x {row['context'] // 1024}K", form, f"{dense:.0f}", f"{step:.1f}",
                f"{dense / step:.2f}", f"{row[form]['layer']['us']:.1f}",
                f"{row[form]['scores']['us']:.1f}", f"{row[form]['error']:.4f}",
            )  # fmt: skip
        made.add_section()
    console.print(made)
    lost = report.table("8 bits", "tensors", "cache", "blocks", "scores", "output error")
    for name, kinds in found.get("quality", {}).items():
        for kind, loss in kinds.items():
            lost.add_row(
                name, kind, f"{loss['block_recall']:.2%}", f"{loss['score_recall']:.2%}",
                f"{loss['output_error']:.4f}",
            )  # fmt: skip
    console.print(lost)


if __name__ == "__main__":
    sys.exit(report.main(DecodeOptions, run))
