"""What all figures share: colors, fonts, labels at the ends of lines, axes of token counts."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator, StrMethodFormatter

from benchmarks.cases import MILLION
from benchmarks.prefill_table import number, tokens
from benchmarks.reading import Found

INK, MUTED, QUIET, GRID = "#22252b", "#5c626b", "#8a9099", "#e4e6ea"
BLUE, SKY, ORANGE, GREEN = "#0072b2", "#3b9fdb", "#d55e00", "#009e73"  # after Okabe and Ito
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans", "font.size": 9, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": QUIET, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": GRID, "axes.axisbelow": True,
    "xtick.major.size": 0, "ytick.major.size": 0, "lines.linewidth": 1.8, "lines.markersize": 5,
}  # fmt: skip

Curve = dict[int, float]
"""A measure by the number of tokens."""
End = tuple[float, float, str, str]
"""Where a line ends, its name and its color."""


class MissingResults(Exception):
    """The results lack what a figure shows."""


def need(found: Found, name: str) -> Any:
    """Return a part of the results.

    Raises:
        MissingResults: if it was not measured.
    """
    if name not in found:
        raise MissingResults(f"the results have no {name!r}")
    return found[name]


def duration(milliseconds: float) -> str:
    """Format a duration with its unit.

    >>> [duration(x) for x in (0.12, 10, 1246.8)]
    ['0.12 ms', '10.0 ms', '1.25 s']
    """
    if milliseconds >= 1000:
        return number(milliseconds / 1000, " s")
    return number(milliseconds, " ms")


def spread(values: list[float], gap: float) -> list[float]:
    """Choose places for labels beside points: in the same order, at least `gap` apart.

    >>> spread([0.0, 1.0, 1.1], 0.5)
    [0.0, 0.8, 1.3]
    """
    order = sorted(range(len(values)), key=lambda i: values[i])
    groups: list[list[int]] = []

    def place(group: list[int]) -> float:
        """Return the lowest place of a group of touching labels, centred on their points."""
        return sum(values[i] for i in group) / len(group) - gap * (len(group) - 1) / 2

    for i in order:
        groups.append([i])
        while len(groups) > 1 and place(groups[-1]) < place(groups[-2]) + gap * len(groups[-2]):
            last = groups.pop()
            groups[-1] += last
    placed = {i: place(group) + gap * n for group in groups for n, i in enumerate(group)}
    return [round(placed[i], 9) for i in range(len(values))]


def label_ends(axis: Axes, ends: list[End], gap: float = 0.055) -> None:
    """Write the names of lines to the right of their ends. The axis must have its limits.

    gap: the least distance of two labels, as a share of the axis.
    """
    axis.set(xlim=axis.get_xlim(), ylim=axis.get_ylim())
    points = [axis.transLimits.transform(axis.transScale.transform(end[:2])) for end in ends]
    places = spread([float(y) for _, y in points], gap)
    for (x, y), place, (_, _, text, color) in zip(points, places, ends):
        fixed = {"transform": axis.transAxes, "color": color}
        axis.plot([x + 0.02, x + 0.06], [y, place], lw=0.6, clip_on=False, **fixed)
        axis.text(x + 0.075, place, text, va="center", **fixed)


def tidy_tokens(axis: Axes, least: int, most: int) -> None:
    """Show token counts on a log axis, in K and M."""
    axis.set_xscale("log", base=2)
    axis.set_xlim(least / 1.25, most * 1.15)
    powers = range(int(math.log2(least)), int(math.log2(most)) + 1)
    axis.xaxis.set_ticks(
        lengths := [2**n for n in powers], ["1M" if n == MILLION else tokens(n) for n in lengths]
    )
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("tokens in the prompt")


def plain_ticks(axis: Axes) -> None:
    """Show numbers and not powers of ten, on both logarithmic axes."""
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter(StrMethodFormatter("{x:,.6g}"))
        side.set_minor_locator(NullLocator())


def line(axis: Axes, curve: Curve, color: str, measured: set[int], **style: Any) -> None:
    """Draw a line through all points; points that were not measured as a whole are hollow."""
    axis.plot(list(curve), list(curve.values()), color=color, **style)
    for n, value in curve.items():
        face = color if n in measured else "white"
        axis.plot([n], [value], "o", color=color, markerfacecolor=face, zorder=3)
