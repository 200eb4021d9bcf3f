"""The roofline: how close each stage comes to what the device can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.figures.style import BLUE, GREEN, INK, MUTED, ORANGE, QUIET, need, plain_ticks
from benchmarks.prefill_table import tokens
from benchmarks.reading import Found, at

KEEP = 0.95
BELOW: dict[str, Any] = {"xytext": (0, -7), "ha": "center", "va": "top"}
BESIDE: dict[str, Any] = {"xytext": (8, 0), "ha": "left", "va": "center"}
ABOVE: dict[str, Any] = {"xytext": (0, 7), "ha": "center", "va": "bottom"}
PLACES = {  # of names that would lie on a ceiling or on one another
    "attention, KV-outer": BESIDE, "select, fp8": BESIDE, "attention, union": ABOVE,
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """A point: operations per byte that has to move, and operations per second."""

    name: str
    intensity: float
    rate: float
    """In units of 10^12 per second."""
    color: str
    ceiling: str = "bf16_tflops"

    def share(self, ceilings: dict[str, float]) -> str:
        """Say what part of its ceiling the stage reaches, and which ceiling that is.

        >>> Stage("half", 10.0, 15.0, "k").share({"copy_tbps": 3.0, "bf16_tflops": 700.0})
        '50% of the copy'
        """
        slope, flat = ceilings["copy_tbps"] * self.intensity, ceilings[self.ceiling]
        bound = "the copy" if slope < flat else self.ceiling.split("_")[0]
        return f"{self.rate / min(slope, flat):.0%} of {bound}"


def with_products(row: Found) -> list[Stage]:
    """Return the stages that multiply matrices: selection and attention of one prompt."""
    select, attention = row["select"], at(row, KEEP)
    points = [
        Stage(name, stage["tflops"] * stage["ms"] / stage["gb"], stage["tflops"], GREEN, ceiling)
        for name, stage, ceiling in (
            ("select", select["bf16"], "bf16_tflops"),
            ("select, fp8", select["fp8_e4m3"], "fp8_tflops"),
        )
    ]
    for name, order, color in (
        ("attention, auto", "auto", BLUE), ("attention, union", "union", ORANGE),
        ("attention, KV-outer", "kv_outer", QUIET),
    ):  # fmt: skip
        stage = attention[order]
        rate = stage["tflops"]
        points.append(Stage(name, attention["gflop"] / stage["gb"], rate, color))
    return points


def without_products(row: Found, topk: list[Found]) -> list[Stage]:
    """Return the stages without products: an operation is an edge or a score."""
    index = at(row, KEEP)["reverse_index"]
    counted = [("reverse index", index, index["ms"])]
    for rows in topk[:1]:
        ours = rows.get("hopper", rows["ours"])["ms"]
        counted += [("top-k", rows, ours), ("torch.topk", rows, rows["torch"]["ms"])]
    return [
        Stage(name, stage["gop"] / stage["gb"], stage["gop"] / took, INK)
        for name, stage, took in counted
    ]


def draw(axis: Axes, points: list[Stage], ceilings: dict[str, float]) -> None:
    """Draw the points with their shares of the ceiling, on two logarithmic axes."""
    axis.set_xscale("log")
    axis.set_yscale("log")
    for point in points:
        axis.plot([point.intensity], [point.rate], "o", color=point.color, markersize=6, zorder=3)
        axis.annotate(
            f"{point.name}\n{point.share(ceilings)}", (point.intensity, point.rate),
            **PLACES.get(point.name, BELOW), textcoords="offset points", fontsize=8,
            color=point.color,
        )  # fmt: skip


def copy_ceiling(axis: Axes, bandwidth: float, stop: float, label_at: float) -> None:
    """Draw the slope up to `stop` operations per byte, with its name. The axis must have limits."""
    low = axis.get_xlim()[0]
    axis.plot([low, stop], [low * bandwidth, stop * bandwidth], color=INK, lw=1.2)
    ends = axis.transData.transform([[x, x * bandwidth] for x in (low, stop)])
    across, up = ends[1] - ends[0]
    axis.text(
        label_at, label_at * bandwidth * 1.3, f"copy, {bandwidth:.2f} TB/s", fontsize=8,
        rotation=float(np.degrees(np.arctan2(up, across))), rotation_mode="anchor",
    )  # fmt: skip


def roofline(found: Found) -> Figure:
    """Draw the stages of the longest prompt at ρ = 0.95: without products left, with them right.

    Raises:
        MissingResults: results without ceilings or prompts.
    """
    ceilings, row = need(found, "ceilings"), max(need(found, "lengths"), key=lambda row: row["n"])
    bandwidth = ceilings["copy_tbps"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10.4, 4.4), width_ratios=(1, 2.1))
    figure.subplots_adjust(left=0.06, right=0.91, top=0.92, bottom=0.22, wspace=0.17)

    points = without_products(row, found.get("topk", []))
    draw(left, points, ceilings)
    least, most = (f(p.intensity for p in points) for f in (min, max))
    left.set_xlim(least / 4, most * 4)
    left.set_ylim(min(p.rate for p in points) / 4, most * 4 * bandwidth)
    copy_ceiling(left, bandwidth, most * 4, least / 3)
    left.set_xlabel("edges or scores per byte")
    left.set_title("10¹² edges or scores per second", loc="left", fontweight="bold", fontsize=10)

    points = with_products(row)
    draw(right, points, ceilings)
    least, most = (f(p.intensity for p in points) for f in (min, max))
    right.set_xlim(least / 3, most * 4)
    right.set_ylim(min(p.rate for p in points) / 2.2, ceilings["fp8_tflops"] * 1.35)
    copy_ceiling(right, bandwidth, ceilings["fp8_tflops"] / bandwidth, least / 1.6)
    for name in ("bf16", "fp8"):
        rate = ceilings[f"{name}_tflops"]
        right.plot([rate / bandwidth, most * 4], [rate, rate], color=INK, lw=1.2)
        right.text(most * 4.6, rate, f"{rate:,.0f}, {name}", va="center", fontsize=8)
    right.set_xlabel("operations per byte that has to move")
    right.set_title("TFLOP/s", loc="left", fontweight="bold", fontsize=10)
    right.set_yticks([100, 200, 500, 1000])
    for axis in (left, right):
        plain_ticks(axis)
    figure.text(
        0.06, 0.02, f"{found['device']}, {tokens(row['n'])} tokens, ρ = {KEEP:g}; top-k: "
        "128K rows of 1,024 scores. Ceilings: a copy of 4 GiB and products of 8,192³ by torch, "
        "in the same run.\nBytes: every tensor read or written once, counted from shapes; "
        "operations of attention: selected blocks alone.",
        fontsize=7.5, color=MUTED,
    )  # fmt: skip
    return figure
