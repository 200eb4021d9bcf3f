"""The fair control of the demo: models trained for the way in which they read.

The demo reads one model in two ways. It was trained with MSA, so its dense reading is at a
disadvantage. `msa findings run` has also trained a dense twin: the same model, steps and documents,
with dense attention. Its results are beside those of MSA in the package.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from rich import box
from rich.table import Table

from msa import files

RESULTS = Path(__file__).parents[1] / "ablations" / "findings_tiny.json"
COLUMNS = {
    "trained with MSA,\nread densely": ("base", "dense"),
    "dense twin: trained\nand read densely": ("dense", "dense"),
    "trained and read\nwith MSA": ("base", "msa"),
}
"""For each column: the row of the findings, and how its models read."""


def shares(row: str, how: str) -> dict[int, list[float]]:
    """The shares of right answers of a row's seeds, by the length of the documents."""
    found: Any = files.read_json("results", RESULTS)
    by_length: dict[int, list[float]] = {}
    for run in found["runs"]:
        for reading in run["lengths"] if run["row"] == row else ():
            if reading["how"] == how:
                by_length.setdefault(reading["tokens"], []).append(reading["answers"])
    return by_length


def table() -> Table:
    """Right answers by length, for the same weights read densely, the dense twin, and MSA."""
    title = "The fair control: right answers of three seeds each, mean and range (msa findings)"
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    shown.add_column("tokens", justify="right", vertical="bottom")
    columns = [shares(*key) for key in COLUMNS.values()]
    for name in COLUMNS:
        shown.add_column(name, justify="right")
    for n in sorted(columns[0]):
        shown.add_row(f"{n:,}", *(span(column[n]) for column in columns))
    return shown


def span(values: list[float]) -> str:
    """The mean, and the lowest and highest.

    >>> span([0.5, 0.7, 0.9])
    '70% (50–90%)'
    """
    return f"{fmean(values):.0%} ({100 * min(values):.0f}–{max(values):.0%})"


def sentence(tokens: int) -> str:
    """What the control says at the measured length that is nearest to a document's."""
    twin, sparse = shares("dense", "dense"), shares("base", "msa")
    n = min(twin, key=lambda length: abs(length - tokens))
    return (
        "This is not a comparison of dense and sparse attention, because the weights were trained "
        f"with MSA. The fair control is a dense twin, trained with dense attention: of three seeds "
        f"each, documents of {n:,} tokens, the twin answers {span(twin[n])} and MSA "
        f"{span(sparse[n])}."
    )
