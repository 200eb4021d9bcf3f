"""The poster: what queries read, and the accuracy if they read less."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from msa import files
from msa.demo.digits.experiment import Outcome
from msa.demo.digits.gallery import BLUE, COLUMNS, INK, SOFT, draw_queries
from msa.demo.digits.stream import Stream
from msa.demo.digits.tables import at_a_tenth

STYLES = {
    "MSA": (BLUE, "o", "-", (0, (0.0, -18.0), "left")),
    "random": ("#a0558a", "^", ":", (2, (-9.0, 5.0), "right")),
    "window": ("#c98200", "s", "--", (2, (10.0, -12.0), "left")),
}
"""Colour, marker and dashes of each line, so that lines differ in more than colour. Then the place
of its name: the number of a point, the distance from it in points, the side."""
FONTS = {
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.labelsize": 10.5,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(path: Path, stream: Stream, outcomes: list[Outcome]) -> None:
    """Draw the poster and write it as a PNG of 16 x 10 inches at 150 dots per inch."""
    tenth = at_a_tenth(stream, outcomes)
    dense = next(o for o in outcomes if o.method == "dense")
    with matplotlib.rc_context(FONTS):
        figure = Figure(figsize=(16, 10), dpi=150, facecolor="white")
        FigureCanvasAgg(figure)
        draw_words(figure, stream, tenth, dense)
        draw_queries(figure, stream, tenth)
        draw_accuracy(figure.add_axes((0.705, 0.432, 0.265, 0.337)), outcomes, tenth, dense)
        draw_recall(figure.add_axes((0.705, 0.112, 0.265, 0.175)), outcomes, tenth)
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
    files.write(path, picture.getvalue())


def draw_words(figure: Figure, stream: Stream, tenth: Outcome, dense: Outcome) -> None:
    """Write the title, the captions and the sources."""
    share = tenth.keys / dense.keys
    figure.text(0.03, 0.925, f"Reading {share:.0%} of the keys", size=34, weight="bold")
    figure.text(
        0.03, 0.885,
        f"{len(stream.q)} handwritten digits ask {stream.known:,} known ones what they are.  "
        f"Dense attention reads them all and is right for {dense.accuracy:.1%};  "
        f"sparse attention reads {share:.0%} and is right for {tenth.accuracy:.1%}.",
        size=13, color=SOFT,
    )  # fmt: skip
    caption(
        figure, 0.03, 0.823, "What a query reads",
        f"The {COLUMNS} heaviest of the {tenth.top_k - 1} blocks chosen for it: the bluer an "
        "image, the more it counts; below, where in the stream all of them lie.",
    )  # fmt: skip
    caption(
        figure, 0.672, 0.823, "What reading less costs",
        "Blocks chosen by the index, at random, or from the end.",
    )  # fmt: skip
    caption(
        figure, 0.672, 0.338, "What the index finds",
        f"With {stream.k_idx.shape[-1]} numbers an image: what dense attention looks at.",
    )  # fmt: skip
    figure.text(
        0.03, 0.018,
        "Rows: the first queries of four different digits, and the first error. Shown is the group "
        f"of heads that sees plain pixels, one of {stream.k.shape[1]} that vote on the answer.\n"
        "Images: scikit-learn's digits, 8 x 8 pixels (UCI, Optical Recognition of Handwritten "
        "Digits).  Method: MiniMax Sparse Attention, arXiv 2606.13392.",
        size=9, color=SOFT, linespacing=1.5,
    )  # fmt: skip


def caption(figure: Figure, x: float, y: float, title: str, sentence: str) -> None:
    """Write the heading of a panel and its sentence."""
    figure.text(x, y, title, size=16, weight="bold")
    figure.text(x, y - 0.023, sentence, size=10.5, color=SOFT)


def draw_accuracy(axes: Axes, outcomes: list[Outcome], tenth: Outcome, dense: Outcome) -> None:
    """Draw accuracy against keys read, with a named line for each method."""
    for method, (colour, marker, dashes, name_at) in STYLES.items():
        line = [o for o in outcomes if o.method == method]
        keys, hits = [o.keys for o in line], [100 * o.accuracy for o in line]
        axes.plot(keys, hits, dashes, color=colour, marker=marker, markersize=6.5, linewidth=2)
        put_name(axes, method, keys, hits, colour, *name_at)
    level = 100 * dense.accuracy
    axes.axhline(level, color=INK, linewidth=1.1, zorder=1)
    axes.annotate(
        f"dense: {dense.keys:,.0f} keys", (1, level), (0, 7), ("axes fraction", "data"),
        textcoords="offset points", ha="right", size=11, weight="bold",
    )  # fmt: skip
    axes.set_ylim(None, 105)
    axes.set_ylabel("images right, %")
    label_budgets(axes, outcomes, tenth)


def draw_recall(axes: Axes, outcomes: list[Outcome], tenth: Outcome) -> None:
    """Draw the recall of the index against keys read."""
    line = [o for o in outcomes if o.method == "MSA"]
    keys = [o.keys for o in line]
    score, block = [100 * o.score_recall for o in line], [100 * o.block_recall for o in line]
    axes.plot(keys, score, "-", color=BLUE, marker="o", markersize=5.5, linewidth=1.8)
    axes.plot(keys, block, "--", color=INK, marker="D", markersize=5, linewidth=1.8)
    put_name(axes, "weight (score recall)", keys, score, BLUE, 3, (-8.0, 7.0), "right")
    put_name(axes, "top blocks (block recall)", keys, block, INK, 2, (6.0, -17.0), "left")
    axes.set_ylim(0, 105)
    axes.set_ylabel("found, %")
    label_budgets(axes, outcomes, tenth)


def put_name(
    axes: Axes, name: str, xs: list[float], ys: list[float], colour: str,
    point: int, offset: tuple[float, float], side: str,
) -> None:  # fmt: skip
    """Write the name of a line beside one of its points."""
    point = min(point, len(xs) - 1)
    axes.annotate(
        name, (xs[point], ys[point]), offset, textcoords="offset points", color=colour, size=11,
        weight="bold", ha=side,
    )  # fmt: skip


def label_budgets(axes: Axes, outcomes: list[Outcome], tenth: Outcome) -> None:
    """Make a logarithmic axis with a tick for each budget. The budget of a tenth is marked."""
    axes.set_xscale("log")
    ticks = sorted({o.keys for o in outcomes if o.method == "MSA"})
    axes.set_xticks(ticks, [f"{t:.0f}" for t in ticks])
    axes.minorticks_off()
    axes.axvspan(tenth.keys * 0.93, tenth.keys * 1.07, color=BLUE, alpha=0.09, linewidth=0)
    axes.set_xlabel("keys read per query (shaded: the rows on the left)")
