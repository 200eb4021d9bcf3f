"""The figure of the integrations' results: Hugging Face's MiniMax-M3 on four attentions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks.figures.style import BLUE, INK, MUTED, QUIET, SKY, need, tidy_tokens
from benchmarks.reading import Found

WAYS = {
    "eager": ("eager", INK),
    "sdpa": ("sdpa", QUIET),
    "msa": ("register()", SKY),
    "enabled": ("enable()", BLUE),
}


def lengths(found: Found) -> Figure:
    """Draw time and memory of one forward pass by length, up to the length that fits."""
    ways = need(found, "lengths")["ways"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    curves(left, ways, lambda row: row["time"]["ms"], (20, 50, 100, 200, 500))
    curves(right, ways, lambda row: row["gib"], (1, 2, 5, 10, 20, 50))
    left.set_title("Milliseconds of a forward pass", loc="left", weight="bold")
    right.set_title("GiB at its peak, beside the model", loc="left", weight="bold")
    about = f"Four layers of MiniMax-M3 in transformers, bfloat16, {found['device']}."
    figure.supxlabel(f"{about} A line ends where memory does.", x=0.02, ha="left", fontsize=8,
                     color=MUTED)  # fmt: skip
    return figure


def curves(
    axes: Axes, ways: Found, measure: Callable[[Found], float], ticks: Sequence[float]
) -> None:
    """Draw one line for each way, with its name at its end."""
    longest = [row["n"] for row in ways["enabled"]]
    tidy_tokens(axes, longest[0], longest[-1])
    axes.set_yscale("log")
    for name, (title, color) in WAYS.items():
        held = [(row["n"], measure(row)) for row in ways[name] if "ends" not in row]
        axes.plot(*zip(*held), marker="o", color=color)
        last = held[-1][0] == longest[-1]
        axes.annotate(title, held[-1], (0, 8) if last else (8, -3), textcoords="offset points",
                      ha="right" if last else "left", color=color)  # fmt: skip
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.margins(y=0.12)
