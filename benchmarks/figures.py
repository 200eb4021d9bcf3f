"""Figures of the prefill results: latency, gain, and what the loop orders make of a union."""

from __future__ import annotations

import math
from typing import Any

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, StrMethodFormatter

from benchmarks.cases import CONFIG, DIM, GROUPS, HEADS, MILLION
from benchmarks.prefill_table import LOOP_ORDERS, number, tokens
from benchmarks.reading import Found, at, million_dense, million_sparse, ms
from msa.loop_order import WALK_ALL, WALK_PAIRS

INK, MUTED, QUIET, GRID = "#22252b", "#5c626b", "#8a9099", "#e4e6ea"
BLUE, SKY, ORANGE, GREEN = "#0072b2", "#3b9fdb", "#d55e00", "#009e73"  # after Okabe and Ito
DENSE = {"cudnn": ("cuDNN", INK), "fa4": ("FlashAttention-4", ORANGE), "flash": ("flash", QUIET)}
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
    """A part of the results.

    Raises:
        MissingResults: if it was not measured.
    """
    if name not in found:
        raise MissingResults(f"the results have no {name!r}")
    return found[name]


# -- helpers of the drawing -----------------------------------------------------------------------
def duration(milliseconds: float) -> str:
    """With its unit.

    >>> [duration(x) for x in (0.12, 10, 1246.8)]
    ['0.12 ms', '10.0 ms', '1.25 s']
    """
    if milliseconds >= 1000:
        return number(milliseconds / 1000, " s")
    return number(milliseconds, " ms")


def spread(values: list[float], gap: float) -> list[float]:
    """Places for labels beside points: in the same order, at least `gap` apart.

    >>> spread([0.0, 1.0, 1.1], 0.5)
    [0.0, 0.8, 1.3]
    """
    order = sorted(range(len(values)), key=lambda i: values[i])
    groups: list[list[int]] = []

    def place(group: list[int]) -> float:
        """The lowest place of a group of touching labels, around the mean of their points."""
        return sum(values[i] for i in group) / len(group) - gap * (len(group) - 1) / 2

    for i in order:
        groups.append([i])
        while len(groups) > 1 and place(groups[-1]) < place(groups[-2]) + gap * len(groups[-2]):
            last = groups.pop()
            groups[-1] += last
    placed = {i: place(group) + gap * n for group in groups for n, i in enumerate(group)}
    return [round(placed[i], 9) for i in range(len(values))]


def label_ends(axis: Axes, ends: list[End], gap: float = 0.055) -> None:
    """Name the lines to the right of their ends; the axis has its limits by then.

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
    """Lengths on a log axis, in K and M."""
    axis.set_xscale("log", base=2)
    axis.set_xlim(least / 1.25, most * 1.15)
    powers = range(int(math.log2(least)), int(math.log2(most)) + 1)
    axis.xaxis.set_ticks(
        lengths := [2**n for n in powers], ["1M" if n == MILLION else tokens(n) for n in lengths]
    )
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("tokens in the prompt")


def plain_ticks(axis: Axes) -> None:
    """Numbers in place of powers of ten, on both logarithmic axes."""
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter(StrMethodFormatter("{x:,.6g}"))
        side.set_minor_locator(NullLocator())


def line(axis: Axes, curve: Curve, color: str, measured: set[int], **style: Any) -> None:
    """A line through all points; those that were not measured as a whole are hollow."""
    axis.plot(list(curve), list(curve.values()), color=color, **style)
    for n, value in curve.items():
        face = color if n in measured else "white"
        axis.plot([n], [value], "o", color=color, markerfacecolor=face, zorder=3)


# -- latency and gain -----------------------------------------------------------------------------
def dense_curves(found: Found) -> dict[str, Curve]:
    """Milliseconds of each baseline that was measured; a million tokens by interpolation."""
    curves: dict[str, Curve] = {}
    for name in DENSE:
        curve = {row["n"]: ms(row, name) for row in need(found, "lengths")}
        curves[name] = {n: value for n, value in curve.items() if not math.isnan(value)}
    if "million" in found:
        curves["cudnn"][MILLION] = million_dense(found["million"])
    return {name: curve for name, curve in curves.items() if curve}


def sparse_curve(found: Found, keep: float, fp8: bool = False) -> Curve:
    """Milliseconds of selection and attention."""
    name = "whole_fp8" if fp8 else "whole"
    curve = {row["n"]: ms(at(row, keep), name) for row in need(found, "lengths")}
    if "million" in found and keep == 0.95:
        curve[MILLION] = ms(found["million"]["whole_keep_0.95"], "fp8_e4m3" if fp8 else "bf16")
    elif "million" in found:
        curve[MILLION] = million_sparse(found["million"], keep)
    return curve


def draw_latency(axis: Axes, found: Found) -> None:
    """Milliseconds against tokens; the band reaches from rho = 0 to the fp8 index."""
    lengths = {row["n"] for row in found["lengths"]}
    slow, sparse, fast = (
        sparse_curve(found, 0.0), sparse_curve(found, 0.95), sparse_curve(found, 0.95, fp8=True)
    )  # fmt: skip
    ends: list[End] = []
    curves = [(curve, *DENSE[name]) for name, curve in dense_curves(found).items()]
    for curve, text, color in [*curves, (sparse, "MSA", BLUE)]:
        line(axis, curve, color, lengths if text != "MSA" else lengths | {MILLION})
        last = max(curve)
        if last == max(sparse):
            ends.append((last, curve[last], f"{text}, {duration(curve[last])}", color))
        else:  # it stops where the others go on: named above its end
            axis.text(last, curve[last] * 1.5, text, color=color, ha="right")
    band = {"y1": list(slow.values()), "y2": list(fast.values())}
    axis.fill_between(list(sparse), **band, color=BLUE, alpha=0.15, lw=0)
    axis.set_yscale("log")
    ticks = {0.1: "0.1 ms", 1: "1 ms", 10: "10 ms", 100: "100 ms", 1e3: "1 s", 1e4: "10 s"}
    axis.set_yticks(list(ticks), list(ticks.values()))
    tidy_tokens(axis, min(lengths), max(sparse))
    axis.set_title("Time of one attention layer", loc="left", fontweight="bold", fontsize=10)
    label_ends(axis, ends)


def draw_gain(axis: Axes, found: Found) -> None:
    """How many times faster than cuDNN, whose time over a million tokens is interpolated."""
    lengths, cudnn = {row["n"] for row in found["lengths"]}, dense_curves(found)["cudnn"]
    most = max(cudnn)
    ends: list[End] = []
    for text, curve, color in (
        ("ρ = 0.95, fp8", sparse_curve(found, 0.95, fp8=True), GREEN),
        ("ρ = 0.95", sparse_curve(found, 0.95), BLUE),
        ("ρ = 0.8", sparse_curve(found, 0.8), SKY),
        ("ρ = 0", sparse_curve(found, 0.0), QUIET),
    ):
        gain = {n: cudnn[n] / value for n, value in curve.items()}
        line(axis, gain, color, lengths)
        ends.append((most, gain[most], f"{gain[most]:.0f}×  {text}", color))
    axis.axhline(1, color=INK, lw=1)
    axis.set_yscale("log")
    ticks = (1, 2, 5, 10, 20, 50)
    axis.set_yticks(ticks, [f"{n}×" for n in ticks])
    tidy_tokens(axis, min(lengths), most)
    axis.set_title("Times faster than cuDNN", loc="left", fontweight="bold", fontsize=10)
    label_ends(axis, ends)


def latency_and_gain(found: Found) -> Figure:
    """Left: milliseconds against tokens; right: how many times faster than cuDNN.

    Raises:
        MissingResults: results without whole prompts, or without cuDNN's time of one.
    """
    if any(math.isnan(ms(row, "cudnn")) for row in need(found, "lengths")):
        raise MissingResults("the results lack a time of 'cudnn'")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10.4, 4.2))
    figure.subplots_adjust(left=0.065, right=0.86, top=0.93, bottom=0.22, wspace=0.58)
    draw_latency(left, found)
    draw_gain(right, found)
    for axis in (left, right):
        axis.yaxis.set_minor_locator(NullLocator())
    note = (
        f"{found['device']}, bf16, {HEADS} query heads in {GROUPS} groups, head size {DIM}, blocks "
        f"of {CONFIG.block_size}, k = {CONFIG.top_k}. ρ: chance that a query keeps each remote\n"
        "block of its predecessor. MSA: ρ = 0.95, its band from ρ = 0 to the index in fp8."
    )
    if "million" in found:
        measured = len(found["million"]["chunks"])
        note += f" Hollow: 64 chunks of 16K tokens, {measured} of them measured."
    figure.text(0.065, 0.02, note, fontsize=7.5, color=MUTED)
    return figure


# -- loop orders ----------------------------------------------------------------------------------
def loop_orders(found: Found) -> Figure:
    """Useful TFLOP/s of the attention stage against the mean union of four queries' blocks."""
    rows = need(found, "lengths")
    figure, axis = pyplot.subplots(figsize=(7.4, 4.3))
    figure.subplots_adjust(left=0.075, right=0.86, top=0.93, bottom=0.2)
    ends: list[End] = []
    for order, name, color in zip(
        LOOP_ORDERS, ("auto", "KV-outer", "union"), (BLUE, QUIET, ORANGE)
    ):
        points: list[tuple[float, float]] = []
        for size, row in enumerate(rows, 2):
            curve = sorted((s["mean_union_of_4"], s[order]["tflops"]) for s in row["attention"])
            points += curve
            axis.plot(*zip(*curve), "o-", color=color, lw=0.8, markersize=1.6 * size, alpha=0.85)
        ends.append((*max(points), name, color))
    axis.set_ylim(0, None)
    top = axis.get_ylim()[1]
    for factor, text in (
        (WALK_ALL, "a longer union leaves\nblocks of one query\nto KV-outer (auto)"),
        (WALK_PAIRS, "and those of two"),
    ):
        axis.axvline(factor * CONFIG.top_k, color=INK, lw=0.8, ls=(0, (4, 3)))
        axis.text(factor * CONFIG.top_k + 0.5, top, f"{factor:g}·k: {text}", fontsize=7.5, va="top")
    axis.set_xlabel("mean union of four neighbouring queries, blocks")
    axis.set_title(
        "Useful TFLOP/s of the attention stage, by loop order",
        loc="left", fontweight="bold", fontsize=10,
    )  # fmt: skip
    label_ends(axis, ends)
    lengths = " or ".join(tokens(row["n"]) for row in rows)
    figure.text(
        0.075, 0.02, f"{found['device']}, bf16, k = {CONFIG.top_k}. A line is a prompt of "
        f"{lengths} (larger dots: longer); along it neighbours\nagree less "
        "and less. Useful: selected blocks alone.",
        fontsize=7.5, color=MUTED,
    )  # fmt: skip
    return figure
