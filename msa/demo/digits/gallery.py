"""The left half of the poster: queries, and the images in the blocks chosen for them."""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from msa.demo.digits.experiment import Outcome
from msa.demo.digits.stream import Stream
from msa.ir import Array

Place = tuple[float, float, float, float]  # left, bottom, width, height, as shares of the figure
INK, SOFT, FAINT, BLUE, RED = "#1c2430", "#5b6570", "#dfe3e8", "#0072b2", "#d55e00"
GROUP = 0
"""The group whose blocks are shown. Its filter leaves the pixels as they are."""
ROWS, COLUMNS = 5, 6
"""The number of queries shown, and of blocks for each."""
LEFT, TOP, STEP = 0.108, 0.681, 0.1435
"""The left edge of the blocks, the lower edge of the first query, the distance to the next."""


def draw_queries(figure: Figure, stream: Stream, outcome: Outcome) -> None:
    """Draw a row for each query: its image, its heaviest blocks, the places of all its blocks."""
    for row, query in enumerate(choose_queries(stream, outcome)):
        bottom = TOP - STEP * row
        weights = weigh_images(stream, outcome, query)
        mass = weights.reshape(stream.known_blocks, -1).sum(axis=1)
        draw_query(figure, bottom, stream, outcome, query)
        for column, block in enumerate(np.argsort(-mass, kind="stable")[:COLUMNS]):
            ids = np.arange(block * stream.block_size, (block + 1) * stream.block_size)
            axes = bare_axes(figure, (LEFT + 0.0877 * column, bottom + 0.014, 0.078, 0.074))
            sheet = mosaic(stream.images[ids], weights[ids])
            axes.imshow(sheet, interpolation="nearest")
            frame(axes, sheet, BLUE if mass[block] >= 0.05 else FAINT)
            share = f"{mass[block]:.0%}" if mass[block] >= 0.005 else "under 1%"
            axes.text(
                0.5, -0.17, share, transform=axes.transAxes, ha="center", va="top", size=10,
                color=BLUE if mass[block] >= 0.05 else SOFT,
            )  # fmt: skip
        draw_strip(figure, (LEFT, bottom - 0.031, 0.5165, 0.010), stream, mass)


def choose_queries(stream: Stream, outcome: Outcome) -> list[int]:
    """The queries to show, by a rule: the first queries of new digits, and the first error."""
    answer = outcome.distribution.argmax(-1)
    wrong = np.flatnonzero(answer != stream.truth)[:1].tolist()
    firsts = np.sort(np.unique(stream.truth, return_index=True)[1]).tolist()
    return [i for i in firsts if i not in wrong][: ROWS - len(wrong)] + wrong


def weigh_images(stream: Stream, outcome: Outcome, query: int) -> Float[Array, " known"]:
    """The weight of each known image for one query and group: the mean over heads, with sum 1."""
    heads = stream.q.shape[1] // stream.k.shape[1]
    q = stream.q[query, GROUP * heads : (GROUP + 1) * heads].astype(np.float64)
    logits = q @ stream.k[: stream.known, GROUP].T
    block = np.arange(stream.known) // stream.block_size
    logits[:, ~np.isin(block, outcome.selection.indices[query, GROUP])] = -np.inf
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (weights / weights.sum(axis=1, keepdims=True)).mean(axis=0)


def draw_query(figure: Figure, bottom: float, stream: Stream, outcome: Outcome, query: int) -> None:
    """Draw the held-out image, with its predicted digit."""
    answer, truth = int(outcome.distribution[query].argmax()), int(stream.truth[query])
    axes = bare_axes(figure, (0.03, bottom, 0.055, 0.088))
    image = stream.images[stream.known + query].reshape(8, 8, 1)
    axes.imshow(1 - image * (1 - np.array(to_rgb(INK))), interpolation="nearest")
    axes.text(
        0.5, -0.07, f"read as {answer}" + ("" if answer == truth else f", is {truth}"),
        transform=axes.transAxes, ha="center", va="top", size=11, weight="bold",
        color=INK if answer == truth else RED,
    )  # fmt: skip


def mosaic(images: Float[Array, "n 64"], weights: Float[Array, " n"]) -> Float[Array, "h w 3"]:
    """The images of a block in two rows. Grey has no weight; more weight is more blue."""
    half = -(-len(images) // 2)
    sheet = np.ones((2 * 10 - 2, half * 10 - 2, 3))
    for i, (image, weight) in enumerate(zip(images, weights)):
        y, x = 10 * (i // half), 10 * (i % half)
        sheet[y : y + 8, x : x + 8] = 1 - image.reshape(8, 8, 1) * (1 - shade(weight))
    return sheet


def shade(weight: float) -> Float[Array, "3"]:
    """The colour of a weight: grey for 0, full blue for 0.2 and more."""
    strength = min(1.0, (weight / 0.2) ** 0.5)
    return (1 - strength) * np.array(to_rgb("#bfc6ce")) + strength * np.array(to_rgb(BLUE))


def frame(axes: Axes, sheet: Float[Array, "h w 3"], colour: str) -> None:
    """Draw a thin rounded border around a block."""
    height, width = sheet.shape[:2]
    box = FancyBboxPatch(
        (-0.5, -0.5), width, height, boxstyle="round,pad=1.4,rounding_size=1.2",
        facecolor="none", edgecolor=colour, linewidth=1.0, clip_on=False,
    )  # fmt: skip
    axes.add_patch(box)
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)


def draw_strip(figure: Figure, place: Place, stream: Stream, mass: Float[Array, " blocks"]) -> None:
    """Draw the whole stream as a line, with a tick for each block that was read."""
    axes = bare_axes(figure, place, aspect="auto")
    axes.set_xlim(-0.5, stream.known_blocks - 0.5)
    axes.set_ylim(0, 1)
    axes.axhline(0.5, color=FAINT, linewidth=2)
    read = np.flatnonzero(mass)
    read = read[np.argsort(mass[read])]  # the heaviest on top
    axes.vlines(read, 0, 1, colors=[shade(m) for m in mass[read]], linewidth=2.2)


def bare_axes(figure: Figure, place: Place, aspect: Literal["auto", "equal"] = "equal") -> Axes:
    """Axes without ticks, labels and lines."""
    axes = figure.add_axes(place)
    axes.set_axis_off()
    axes.set_aspect(aspect)
    return axes
