"""A figure of the blocks that each group opened, with the document's pictures above them.

It is drawn by matplotlib.
"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from msa.demo.demo_html import opened_by
from msa.demo.questions import Comparison
from msa.training.documents import IMAGE_TOKEN

INK, MUTED, CELL, OPEN, OWN, MARK = "#1c2430", "#5b6570", "#eef1f4", "#0072b2", "#8a9099", "#b34700"
PIXELS, DPI = 1200, 100
ROW, PICTURE, TITLE, EDGE = 0.13, 0.24, 0.3, 0.7
"""Sizes in inches: a row of blocks, a picture, the title of a question, the space at the left."""


def draw(comparison: Comparison) -> Figure:
    """A map for each question, one below the other, 1200 pixels wide."""
    rows = opened_by(comparison.sparse[0]).shape[:2]
    map_height = ROW * rows[0] * rows[1]
    panel = map_height + PICTURE + TITLE + 0.16
    head, foot = 0.62, 0.1
    width, height = PIXELS / DPI, head + panel * len(comparison.questions) + foot
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    figure.text(
        EDGE / width, 1 - 0.26 / height, headline(comparison), size=13, weight="bold", color=INK
    )
    figure.text(
        EDGE / width, 1 - 0.48 / height, size=9, color=MUTED, s="Each column is a block, each row "
        "a group of heads in a layer. Blue: read to answer. Grey: the question's own block. "
        "Framed: the block with the picture.",
    )  # fmt: skip
    for i in range(len(comparison.questions)):
        bottom = height - head - panel * i - TITLE - PICTURE - map_height
        size = (width - EDGE - 0.2, map_height)
        box = (EDGE / width, bottom / height, size[0] / width, size[1] / height)
        draw_question(figure.add_axes(box), comparison, i, size)
    return figure


def headline(comparison: Comparison) -> str:
    """The results in one line."""
    asked = len(comparison.questions)
    line = f"{asked} question{'s' if asked > 1 else ''} to {comparison.tokens:,} tokens"
    if comparison.known:
        dense, sparse = comparison.right(comparison.dense), comparison.right(comparison.sparse)
        line += f", right by dense attention {dense}, by MSA {sparse}"
    dense_keys, sparse_keys = comparison.keys
    return f"{line}; MSA reads {sparse_keys:.0f} keys of {dense_keys:,.0f}"


def draw_question(axes: Axes, comparison: Comparison, i: int, size: tuple[float, float]) -> None:
    """Draw the map of one question. The size of the axes is in inches."""
    opened, question = opened_by(comparison.sparse[i]), comparison.questions[i]
    groups, blocks = opened.shape[1:]
    rows = opened.reshape(-1, blocks)
    own, record = (at // comparison.block_size for at in (question.place, question.record))
    colours = np.where(rows[..., None], rgb(OPEN), rgb(CELL))
    colours[:, own] = np.where(rows[:, own, None], rgb(OWN), rgb(CELL))
    axes.imshow(colours, aspect="auto", interpolation="none")
    for border in range(1, blocks):
        axes.axvline(border - 0.5, color="white", lw=0.8)
    for border in range(1, len(rows)):
        axes.axhline(border - 0.5, color="white", lw=2.2 if border % groups == 0 else 0.8)
    axes.add_patch(frame(record, len(rows)))
    axes.set_xticks([])
    axes.set_yticks(
        range(len(rows)), [f"layer {n // groups + 1}.{n % groups + 1}" for n in range(len(rows))]
    )
    axes.tick_params(length=0, labelsize=7.5, labelcolor=MUTED)
    axes.spines[:].set_visible(False)
    (places,) = np.nonzero(question.tokens == IMAGE_TOKEN)
    for number, place in enumerate(places.tolist()):
        draw_picture(
            axes, comparison, number, (place // comparison.block_size + 0.5) / blocks, size
        )
    answers = [("dense", comparison.dense[i]), ("MSA", comparison.sparse[i])]
    words = [
        f"{name} {a.digit} {question.mark(a) or format(a.chance, '.0%')}" for name, a in answers
    ]
    right = [] if question.right is None else [f"right {question.right}"]
    above = 1 + (PICTURE + 0.07) / size[1]
    text = f"?{question.key}=   " + "   ".join([*right, *words])
    axes.text(0, above, text, transform=axes.transAxes, size=10.5, color=INK, va="bottom")


def draw_picture(
    axes: Axes, comparison: Comparison, number: int, middle: float, size: tuple[float, float]
) -> None:
    """Draw a picture above the map. `middle` is its position as a share of the width."""
    across, down = PICTURE / size[0], PICTURE / size[1]
    inset = axes.inset_axes((middle - across / 2, 1 + 0.02 / size[1], across, down))
    inset.imshow(comparison.images[number], cmap="Greys", vmin=-1, vmax=1, interpolation="none")
    inset.set_axis_off()


def frame(block: int, rows: int) -> Patch:
    """A frame around a column."""
    place = (block - 0.5, -0.5)
    return Rectangle(place, 1, rows, fill=False, ec=MARK, lw=1.8, clip_on=False, zorder=3)


def rgb(colour: str) -> np.ndarray:
    """A colour as three numbers from 0 to 1."""
    return np.array(to_rgb(colour))
