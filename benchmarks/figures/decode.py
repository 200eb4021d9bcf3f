"""The figure of the decode results: MSA and dense attention, and the time to read their bytes."""

from __future__ import annotations

from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, StrMethodFormatter

from benchmarks.cases import CONFIG, DIM, GROUPS
from benchmarks.figures.style import BLUE, INK, MUTED, ORANGE, need
from benchmarks.prefill_table import tokens
from benchmarks.reading import Found, best_dense

FORMS = (("bf16", "MSA, bf16", BLUE), ("fp8 index", "MSA, index keys in 8 bits", ORANGE))
TBPS = 3.0
"""What the white marks assume for results without ceilings: about a copy's rate on an H100."""


def bandwidth(found: Found) -> float:
    """Return the TB/s that the white marks assume: those of a copy in the same run.

    >>> bandwidth({"ceilings": {"copy_tbps": 4.31}}), bandwidth({})
    (4.31, 3.0)
    """
    return found["ceilings"]["copy_tbps"] if "ceilings" in found else TBPS


def least_bytes(batch: int, context: int, form: str) -> int:
    """Count the bytes that a step has to read: all index keys, selected keys and values.

    >>> round(least_bytes(1, 2**20, "bf16") / 3e12 * 1e6, 1)  # microseconds at 3 TB/s
    90.9
    """
    index = batch * context * DIM * (1 if form == "fp8 index" else 2)
    return index + batch * GROUPS * CONFIG.top_k * CONFIG.block_size * DIM * 2 * 2


def steps(found: Found) -> Figure:
    """Draw bars of microseconds, one group for each batch and context."""
    rows, rate = need(found, "steps"), bandwidth(found)
    figure, axes = pyplot.subplots(figsize=(8, 4.2), layout="constrained")
    for i, row in enumerate(rows):
        dense = best_dense(row)
        axes.barh(i - 0.27, dense, 0.24, color=INK, label=None if i else "dense, the quicker SDPA")
        axes.text(dense * 1.05, i - 0.27, f"{dense:,.0f} µs", va="center", color=MUTED)
        for j, (form, label, color) in enumerate(FORMS):
            y, step = i + 0.27 * j, row[form]["step"]["us"]
            axes.barh(y, step, 0.24, color=color, label=None if i else label)
            floor = least_bytes(row["batch"], row["context"], form) / rate / 1e6
            axes.plot([floor] * 2, [y - 0.12, y + 0.12], color="white", linewidth=2)
            axes.text(step * 1.05, y, f"{step:.0f} µs, {dense / step:.1f}×", va="center")
    names = [f"{row['batch']} × {tokens(row['context'])}" for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(4, 9000)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"microseconds of one step (white: what must be read, at {rate:.3g} TB/s)")
    axes.set_title(f"A decode step of one layer, sequences × tokens, {found['device']}", loc="left")
    axes.legend(loc="upper right", frameon=False)
    return figure
