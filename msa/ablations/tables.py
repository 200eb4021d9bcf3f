"""The tables of `msa findings`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from msa.ablations.results import SHIPPED, Found, lengths_of, read_results, readings_by, runs_of
from msa.ablations.rows import LINES, ROWS

MEASURES = {
    "prose": ("prose, nats", 1, 3), "answers": ("answers, %", 100, 1), "near": ("near, %", 100, 1),
    "far": ("far, %", 100, 1), "kl": ("KL", 1, 3), "block_recall": ("block recall, %", 100, 1),
    "score_recall": ("score recall, %", 100, 1), "steepest": ("steepest", 1, 1),
}  # fmt: skip
"""For each number of a run: its heading, a factor, and the decimals shown."""


@dataclass(frozen=True)
class FindingsOptions:
    """Print the results of the paper's ablations with the tiny model, each with its command.

    `msa bench plots --results FILE` draws them.
    """

    results: Path | None = None
    """A file that `msa findings run` wrote. None: findings_tiny.json, which comes with the
    package."""


def run(options: FindingsOptions) -> int:
    """Print the tables."""
    found = read_results("results", SHIPPED if options.results is None else options.results)
    console = Console()
    for title, (columns, *lines) in (
        ("Each row changes one thing", answers_table(found)),
        ("The index of each row, and its longest gradient", index_table(found)),
        ("The command of each row", commands_table(found)),
        ("MSA from scratch, read with k blocks", budgets_table(found)),
        ("Answers in % on documents longer than any in training", lengths_table(found)),
    ):
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for i, column in enumerate(columns):
            numbers = i > 0 and column != "command"
            table.add_column(column, justify="right" if numbers else "left", overflow="fold")
        for cells in lines:
            table.add_row(*cells)
        console.print(table)
    console.print(about(found), markup=False)
    return 0


def answers_table(found: Found) -> list[tuple[str, ...]]:
    """The results of each row on unseen documents."""
    return rows_table(found, ("prose", "answers", "near", "far"))


def index_table(found: Found) -> list[tuple[str, ...]]:
    """The measures of the index of each row, and its largest gradient norm."""
    return rows_table(found, ("kl", "block_recall", "score_recall", "steepest"))


def rows_table(found: Found, measures: Sequence[str]) -> list[tuple[str, ...]]:
    """The headings, then a line for each row with runs."""
    lines: list[tuple[str, ...]] = [("row", *(MEASURES[name][0] for name in measures))]
    for row in ROWS.values():
        runs = runs_of(found, row.name)
        cells = [mean_of([r[name] for r in runs], *MEASURES[name][1:]) for name in measures]
        lines += [(row.title, *cells)] if runs else []
    return lines


def commands_table(found: Found) -> list[tuple[str, ...]]:
    """The command of the first run of each row."""
    rows = ((row.title, runs_of(found, row.name)) for row in ROWS.values())
    return [("row", "command"), *((title, runs[0]["command"]) for title, runs in rows if runs)]


def budgets_table(found: Found) -> list[tuple[str, ...]]:
    """The base model, read with other values of k than in training."""
    names = ("prose", "answers", "near", "far")
    lines: list[tuple[str, ...]] = [("k", *(MEASURES[name][0] for name in names))]
    for k, readings in readings_by(found, "base", "budgets", "k").items():
        cells = (mean_of([r[name] for r in readings], *MEASURES[name][1:]) for name in names)
        lines.append((str(k), *cells))
    return lines


def lengths_table(found: Found) -> list[tuple[str, ...]]:
    """Answers by length of documents, with a column for each of LINES."""
    curves = {name: lengths_of(found, *key) for key, name in LINES.items()}
    tokens = sorted({n for curve in curves.values() for n in curve})
    lines: list[tuple[str, ...]] = [("tokens", *curves)]
    for n in tokens:
        cells = (mean_of(curve.get(n, []), 100) for curve in curves.values())
        lines.append((f"{n:,}", *cells))
    return lines


def mean_of(values: Sequence[float | None], factor: int = 1, decimals: int = 1) -> str:
    """The mean over the seeds ± their standard deviation; a dash if a run lacks the number.

    >>> mean_of([0.5], 100), mean_of([0.5, 0.7], 100), mean_of([0.5, None]), mean_of([])
    ('50.0', '60.0 ± 14.1', '-', '-')
    """
    known = [factor * value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "-"
    mean = f"{statistics.fmean(known):.{decimals}f}"
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):.{decimals}f}"


def about(found: Found) -> str:
    """One paragraph that says where the numbers come from."""
    seeds = sorted({run["seed"] for run in found["runs"]})
    return (
        f"{len(found['runs'])} runs of {found['steps']} steps (MSA-CPT: a third as many more), "
        f"seeds {', '.join(map(str, seeds))}, mean ± standard deviation; each read on "
        f"{found['documents']} unseen documents. {found['device']}, torch {found['torch']}, "
        f"{found['date']}."
    )
