"""The figure of `msa findings`: answers by row, by blocks kept, and by length."""

from __future__ import annotations

import math
from typing import Any

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks.figures import style
from benchmarks.figures.style import BLUE, GREEN, INK, MUTED, ORANGE, QUIET
from benchmarks.prefill_table import tokens
from benchmarks.reading import Found
from msa.ablations.results import lengths_of, readings_by, runs_of
from msa.ablations.rows import LINES, ROWS
from msa.ablations.tables import about

COLORS = {"dense": INK, "MSA": BLUE, "window": ORANGE, "dense twin": QUIET}


def findings(found: Found) -> Figure:
    """Draw the answers of each row on the left; one model with other k and lengths on the right.

    Raises:
        MissingResults: results without a run of the base.
    """
    if not runs_of(found, "base"):
        raise style.MissingResults("the results have no run of 'base'")
    figure, (left, middle, right) = pyplot.subplots(
        1, 3, figsize=(11.4, 4.2), width_ratios=(1.25, 0.8, 1)
    )
    figure.subplots_adjust(left=0.205, right=0.92, top=0.92, bottom=0.24, wspace=0.28)
    draw_rows(left, found)
    draw_budgets(middle, found)
    draw_lengths(right, found)
    for axis, title in (
        (left, "Right answers, %"), (middle, "by blocks kept when read"), (right, "by tokens"),
    ):  # fmt: skip
        axis.set_title(title, loc="left", fontweight="bold", fontsize=10)
    note = about(found).replace("; each read", ";\neach read")
    figure.text(0.01, 0.02, note, fontsize=7.5, color=MUTED)
    return figure


def draw_rows(axis: Axes, found: Found) -> None:
    """Draw a line for each row: dots for seeds, a bar for the mean of far answers, a ring: near."""
    rows = [row for row in ROWS.values() if runs_of(found, row.name)]
    for place, row in enumerate(reversed(rows)):
        far, near = (percents(runs_of(found, row.name), name) for name in ("far", "near"))
        color = BLUE if row.name == "base" else INK
        axis.plot(far, [place] * len(far), "o", color=color, markersize=4, alpha=0.6)
        axis.plot([mean(far)], [place], "|", color=color, markersize=14, markeredgewidth=2)
        axis.plot([mean(near)], [place], "o", color=GREEN, markerfacecolor="none", markersize=7)
    axis.set_yticks(range(len(rows)), [row.title for row in reversed(rows)])
    axis.set_xlim(0, 102)
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.axvline(10, color=MUTED, lw=0.8, ls=(0, (4, 3)))
    axis.set_xlabel("far: dots, a bar for their mean; near: ring; dashed: chance")


def draw_budgets(axis: Axes, found: Found) -> None:
    """Draw answers of the base model with other numbers of blocks than in training."""
    readings = readings_by(found, "base", "budgets", "k")
    curve = {k: percents(rs, "answers") for k, rs in readings.items()}
    draw_curve(axis, curve, BLUE)
    axis.set_xticks(list(curve), [str(k) for k in curve])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("k")
    axis.set_ylim(0, 102)


def draw_lengths(axis: Axes, found: Found) -> None:
    """Draw answers on documents longer than any in training."""
    ends: list[style.End] = []
    for key, name in LINES.items():
        curve = {
            n: [100 * v for v in vs if v is not None] for n, vs in lengths_of(found, *key).items()
        }
        if curve:
            draw_curve(axis, curve, COLORS[name])
            ends.append((max(curve), mean(curve[max(curve)]), name, COLORS[name]))
            axis.set_xticks(list(curve), [tokens(n) if n >= 1024 else str(n) for n in curve])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("tokens of a document; 512 in training")
    axis.set_ylim(0, 102)
    style.label_ends(axis, ends)


def draw_curve(axis: Axes, curve: dict[int, list[float]], color: str) -> None:
    """Draw a line through the means, and a band from the least to the most."""
    places = list(curve)
    axis.set_xscale("log", base=2)
    axis.plot(places, [mean(values) for values in curve.values()], "o-", color=color)
    low, high = ([end(v) for v in curve.values()] for end in (min, max))
    axis.fill_between(places, low, high, color=color, alpha=0.15, lw=0)


def percents(runs: list[dict[str, Any]], name: str) -> list[float]:
    """Return this number in percent, of all runs that have it."""
    return [100 * run[name] for run in runs if run[name] is not None]


def mean(values: list[float]) -> float:
    """Return the mean; NaN, which is not drawn, if there are no values."""
    return sum(values) / len(values) if values else math.nan
