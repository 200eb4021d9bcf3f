"""`msa findings`: what the paper found by leaving things out, found again by the tiny model.

    python -m msa.model.findings run --seeds 0 1 2 --workers 15 --out DIR

trains and reads every row (needs no tyro); `msa findings --results FILE` shows what came of it.
"""

from __future__ import annotations

import importlib
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from msa import files
from msa.model import checks, plain
from msa.model.train import TrainOptions

RESULTS = "findings_tiny.json"
PLACES = (Path(__file__).parents[2] / "benchmarks" / "results", Path(__file__).parent)
"""Where the results lie that come with a checkout, and with an installed package."""
SHIPPED = next((p / RESULTS for p in PLACES if (p / RESULTS).exists()), PLACES[0] / RESULTS)
Found = dict[str, Any]
"""What a results file holds; see `findings_run.train_all`."""


@dataclass(frozen=True)
class Row:
    """One finding: a run of `msa train` for each seed."""

    name: str
    title: str
    words: str = ""
    """What the command says beside steps, seed and folder."""
    after: str | None = None
    """The row whose model, turned into MSA, this one starts from."""
    share: float = 1.0
    """Its steps, as a share of those of the other rows."""

    def command(self, steps: int, seed: int) -> str:
        """What a reader types to have the same run.

        >>> ROWS["no-kl"].command(300, 1)
        'msa train --kl 0 --steps 300 --seed 1'
        """
        own = f"{self.words} --steps {self.steps(steps)} --seed {seed}".strip()
        if self.after is None:
            return f"msa train {own}"
        return f"msa convert TRAINED --seed {seed} --out START && msa train --start START {own}"

    def steps(self, whole: int) -> int:
        """Its own, where a whole run has so many."""
        return max(1, round(self.share * whole))

    def options(self, steps: int, seed: int, out: Path, start: Path | None = None) -> TrainOptions:
        """The command as an object.

        >>> ROWS["no-kl"].options(300, 1, Path("out")).kl
        0.0
        """
        told = plain.read(TrainOptions, "msa train", self.words.split())
        return replace(told, steps=self.steps(steps), seed=seed, out=out, start=start)


ROWS = {
    row.name: row
    for row in (
        Row("base", "MSA from scratch (MSA-PT)"),
        Row("no-kl", "no alignment loss", "--kl 0"),
        Row("kl-10", "λ = 10", "--kl 10"),
        Row("gradient", "no stop-gradient", "--index-gradient"),
        Row("gradient-10", "no stop-gradient, λ = 10", "--index-gradient --kl 10"),
        Row("no-warm-up", "no warm-up of the index", "--warm-up 0"),
        Row("forced", "first and two local blocks forced", "--sink-blocks 1 --local-blocks 2"),
        Row("blocks-8", "10 blocks of 8", "--block-size 8 --top-k 10"),
        Row("blocks-40", "2 blocks of 40", "--block-size 40 --top-k 2"),
        Row("window", "the last 5 blocks alone", "--attention window"),
        Row("dense", "dense attention", "--attention dense"),
        Row("cpt", "dense, then MSA (MSA-CPT)", "--warm-up 0.3", after="dense", share=1 / 3),
    )
}
"""A query may read 80 keys in each row, 5 blocks of 16 where nothing is said; dense has all."""

MEASURES = {
    "prose": ("prose, nats", 1, 3), "answers": ("answers, %", 100, 1), "near": ("near, %", 100, 1),
    "far": ("far, %", 100, 1), "kl": ("KL", 1, 3), "block_recall": ("block recall, %", 100, 1),
    "score_recall": ("score recall, %", 100, 1), "steepest": ("steepest", 1, 1),
}  # fmt: skip
"""By its name in a run: a heading, a factor, decimals."""
LINES = {
    ("base", "dense"): "dense",
    ("base", "msa"): "MSA",
    ("base", "window"): "window",
    ("dense", "dense"): "dense twin",
}
"""Whose weights are read in which way on longer documents, and what that is called."""


@dataclass(frozen=True)
class FindingsOptions:
    """Show the findings of the tiny model: a table, each row with its command."""

    results: Path | None = None
    """What `msa findings run` wrote; None: the findings_tiny.json that comes with the package."""
    plots: Path | None = None
    """A folder to draw the figure in; this needs a checkout, whose benchmarks draw."""


@dataclass(frozen=True)
class RunOptions:
    """Train and read every row with every seed; the same command takes up what is missing."""

    rows: tuple[str, ...] = tuple(ROWS)
    """Which ones."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of weights and documents, each from 0 up to 2**63 - 1."""
    workers: int = 1
    """Processes, each of one thread; 1: this process alone."""
    steps: int = 300
    """Of each row but MSA-CPT, which adds a third of them to the dense twin's."""
    minutes: float | None = None
    """Stop after so many; runs that are not at their end go on from there the next time."""
    documents: int = 64
    """Unseen ones that every run is read on, each of 512 tokens and eight questions."""
    out: Path = Path("findings")
    """Where the runs and findings_tiny.json lie."""


def run(options: FindingsOptions) -> int:
    """Print the tables, draw the figure if asked."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    results = SHIPPED if options.results is None else options.results
    found = read_results("results", results)
    if options.plots is not None:
        importlib.import_module("benchmarks.plots")  # the one place where results are drawn
        files.check_folder("plots", options.plots)
    console = Console()
    for title, (columns, *lines) in (
        ("Each row changes one thing", answers_table(found)),
        ("Its index, and its longest gradient", index_table(found)),
        ("Its command", commands_table(found)),
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
    if options.plots is not None:
        from benchmarks import plots

        for path, reason in plots.draw(results, options.plots).items():
            print(f"{path}: {f'not drawn, {reason}' if reason else 'drawn'}")
    return 0


def read_results(name: str, path: Path) -> Found:
    """What `msa findings run` wrote.

    Raises:
        ValueError: no such file, or one of another kind.
    """
    found: Found = files.read_json(name, path)
    checks.check_found(str(path), found)
    return found


# -- what came of it ------------------------------------------------------------------------------
def told(values: Sequence[float | None], factor: int = 1, decimals: int = 1) -> str:
    """The mean over seeds and their standard deviation; a dash if a run has no such number.

    >>> told([0.5], 100), told([0.5, 0.7], 100), told([0.5, None]), told([])
    ('50.0', '60.0 ± 14.1', '-', '-')
    """
    known = [factor * value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "-"
    mean = f"{statistics.fmean(known):.{decimals}f}"
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):.{decimals}f}"


def runs_of(found: Found, row: str) -> list[dict[str, Any]]:
    """The runs of a row that are there, by their seeds."""
    runs = [run for run in found["runs"] if run["row"] == row]
    return sorted(runs, key=lambda run: run["seed"])


def about(found: Found) -> str:
    """Where the numbers come from."""
    seeds = sorted({run["seed"] for run in found["runs"]})
    return (
        f"{len(found['runs'])} runs of {found['steps']} steps (MSA-CPT: a third as many more), "
        f"seeds {', '.join(map(str, seeds))}, mean ± standard deviation; each read on "
        f"{found['documents']} unseen documents. {found['device']}, torch {found['torch']}, "
        f"{found['date']}."
    )


def answers_table(found: Found) -> list[tuple[str, ...]]:
    """What each row's model makes of unseen documents."""
    return rows_table(found, ("prose", "answers", "near", "far"))


def index_table(found: Found) -> list[tuple[str, ...]]:
    """How each row was trained, seen from its index."""
    return rows_table(found, ("kl", "block_recall", "score_recall", "steepest"))


def rows_table(found: Found, measures: Sequence[str]) -> list[tuple[str, ...]]:
    """Columns, then a line for each row that was run."""
    lines: list[tuple[str, ...]] = [("row", *(MEASURES[name][0] for name in measures))]
    for row in ROWS.values():
        runs = runs_of(found, row.name)
        cells = [told([r[name] for r in runs], *MEASURES[name][1:]) for name in measures]
        lines += [(row.title, *cells)] if runs else []
    return lines


def commands_table(found: Found) -> list[tuple[str, ...]]:
    """What to type for each row's first run."""
    rows = ((row.title, runs_of(found, row.name)) for row in ROWS.values())
    return [("row", "command"), *((title, runs[0]["command"]) for title, runs in rows if runs)]


def budgets_table(found: Found) -> list[tuple[str, ...]]:
    """The trained base, read with other numbers of blocks than it was trained with."""
    names = ("prose", "answers", "near", "far")
    lines: list[tuple[str, ...]] = [("k", *(MEASURES[name][0] for name in names))]
    for k, readings in by(found, "base", "budgets", "k").items():
        cells = (told([r[name] for r in readings], *MEASURES[name][1:]) for name in names)
        lines.append((str(k), *cells))
    return lines


def lengths_table(found: Found) -> list[tuple[str, ...]]:
    """Answers by length, a column for each way of reading."""
    curves = {name: lengths_of(found, *key) for key, name in LINES.items()}
    tokens = sorted({n for curve in curves.values() for n in curve})
    lines: list[tuple[str, ...]] = [("tokens", *curves)]
    for n in tokens:
        cells = (told(curve.get(n, []), 100) for curve in curves.values())
        lines.append((f"{n:,}", *cells))
    return lines


def lengths_of(found: Found, row: str, how: str) -> dict[int, list[float | None]]:
    """By the tokens of a document: the share of right answers, of each seed."""
    readings = by(found, row, "lengths", "tokens")
    return {n: [r["answers"] for r in rs if r["how"] == how] for n, rs in readings.items()}


def by(found: Found, row: str, part: str, name: str) -> dict[int, list[dict[str, Any]]]:
    """The further readings of a row's runs, by one of their numbers."""
    readings = [reading for run in runs_of(found, row) for reading in run[part]]
    keys = sorted({reading[name] for reading in readings})
    return {key: [r for r in readings if r[name] == key] for key in keys}


def main(arguments: list[str] | None = None) -> int:
    """`msa findings` and `msa findings run` without tyro."""
    from msa import cli

    words = sys.argv[1:] if arguments is None else arguments
    prog = "python -m msa.model.findings"

    def call() -> int:
        if words[:1] == ["run"]:
            from msa.model import findings_run

            return findings_run.run(plain.read(RunOptions, f"{prog} run", words[1:]))
        return run(plain.read(FindingsOptions, prog, words))

    return cli.guarded(lambda: cli.supplied("findings run", call))


if __name__ == "__main__":
    sys.exit(main())
