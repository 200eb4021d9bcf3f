"""Figures of the prefill results: latency, gain, and useful TFLOP/s by loop order."""

from __future__ import annotations

import math

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks.cases import CONFIG, DIM, GROUPS, HEADS, MILLION
from benchmarks.figures.style import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    QUIET,
    SKY,
    Curve,
    End,
    MissingResults,
    duration,
    label_ends,
    line,
    need,
    tidy_tokens,
)
from benchmarks.prefill_table import LOOP_ORDERS, tokens
from benchmarks.reading import Found, at, million_dense, million_sparse, ms
from msa.loop_order import WALK_ALL, WALK_PAIRS

DENSE = {"cudnn": ("cuDNN", INK), "fa4": ("FlashAttention-4", ORANGE), "flash": ("flash", QUIET)}


# -- latency and gain -----------------------------------------------------------------------------
def dense_curves(found: Found) -> dict[str, Curve]:
    """Return milliseconds of each baseline that was measured; a million tokens by interpolation."""
    curves: dict[str, Curve] = {}
    for name in DENSE:
        curve = {row["n"]: ms(row, name) for row in need(found, "lengths")}
        curves[name] = {n: value for n, value in curve.items() if not math.isnan(value)}
    if "million" in found:
        curves["cudnn"][MILLION] = million_dense(found["million"])
    return {name: curve for name, curve in curves.items() if curve}


def sparse_curve(found: Found, keep: float, fp8: bool = False) -> Curve:
    """Return milliseconds of selection and attention, by tokens."""
    name = "whole_fp8" if fp8 else "whole"
    curve = {row["n"]: ms(at(row, keep), name) for row in need(found, "lengths")}
    if "million" in found and keep == 0.95:
        curve[MILLION] = ms(found["million"]["whole_keep_0.95"], "fp8_e4m3" if fp8 else "bf16")
    elif "million" in found:
        curve[MILLION] = million_sparse(found["million"], keep)
    return curve


def draw_latency(axis: Axes, found: Found) -> None:
    """Draw milliseconds against tokens; the band reaches from rho = 0 to the fp8 index."""
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
        else:  # the line ends before the others do, so its name stands above its end
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
    """Draw how many times faster than cuDNN; its time for a million tokens is interpolated."""
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
    """Draw milliseconds against tokens on the left, times faster than cuDNN on the right.

    Raises:
        MissingResults: if there are no whole prompts, or no time of cuDNN for one of them.
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
    """Draw useful TFLOP/s of attention against the mean union of the blocks of four queries."""
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
