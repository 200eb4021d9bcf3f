"""`msa bench integrations` times torch operators and Hugging Face's MiniMax-M3 on a GPU.

It needs transformers. The same without tyro:

    python -m benchmarks.integrations [--out results.json] [--parts operators lengths]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal, get_args

from rich.console import Console

from benchmarks import report

Part = Literal["operators", "lengths"]


@dataclass(frozen=True)
class IntegrationsOptions(report.Options):
    """Check, then time what `msa.ops` costs, and transformers on its own attention and on this one.

    Each way of running the model goes from length to length until it no longer fits.
    """

    parts: tuple[Part, ...] = get_args(Part)
    """What to measure: operators beside the plain functions, in compiled and captured graphs;
    four layers of MiniMax-M3's attention at 4K to 128K tokens."""


def run(options: IntegrationsOptions) -> int:
    """Measure, write, print the tables. Exit codes: 2 without a GPU, 1 for wrong results."""
    return report.measure("integrations", options, "benchmarks.integration_stages", show)[0]


def show(found: dict[str, Any], console: Console | None = None) -> None:
    """Print the results as tables."""
    console = console or Console()
    made = report.table("Operators, ms", "call", "function", "operator", "compiled", "captured")
    for row in found.get("operators", ()):
        ways = (row[way]["ms"] for way in ("function", "operator", "compiled", "captured"))
        made.add_row(row["name"], *(f"{ms:.3f}" for ms in ways))
    console.print(made)
    lengths = found.get("lengths", {})
    made = report.table(
        "MiniMax-M3 of transformers, four layers: ms (GiB at the peak)", "tokens",
        *lengths.get("ways", ()),
    )  # fmt: skip
    for n in sorted({row["n"] for rows in lengths.get("ways", {}).values() for row in rows}):
        cells = (cell(rows, n) for rows in lengths["ways"].values())
        made.add_row(f"{n // 1024}K", *cells)
    console.print(made)


def cell(rows: list[dict[str, Any]], n: int) -> str:
    """Format what one way did at one length.

    >>> rows = [{"n": 4096, "time": {"ms": 12.34}, "gib": 1.5}, {"n": 8192, "ends": "no memory"}]
    >>> [cell(rows, n) for n in (4096, 8192, 16384)]
    ['12.3 (1.5)', 'no memory', '']
    """
    for row in rows:
        if row["n"] == n:
            return row.get("ends") or f"{row['time']['ms']:.1f} ({row['gib']:.1f})"
    return ""


if __name__ == "__main__":
    sys.exit(report.main(IntegrationsOptions, run))
