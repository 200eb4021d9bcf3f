"""Pictures of the 12-token example, drawn from the forms that the spec makes of it."""

from __future__ import annotations

from functools import lru_cache

from docs.hooks.svg import Drawing
from msa.explain import CONFIG, GROUPS, TOKENS, Step, explain, trace_example

CELL, GAP, TOP, LEFT = 15, 4, 34, 26
WIDTH = TOKENS * CELL + GAP * (TOKENS // CONFIG.block_size - 1)
PALETTE = ("d-remote", "d-green", "d-own", "d-red", "d-sky", "d-muted")


@lru_cache
def steps() -> tuple[Step, ...]:
    """The seven steps of `msa explain`."""
    return tuple(explain(trace_example("reference")))


def place(j: int) -> float:
    """Where the column or row of token j begins. There is a gap between blocks."""
    return j * CELL + j // CONFIG.block_size * GAP


def cell(drawing: Drawing, x: float, y: float, mark: str, own: bool, kind: str) -> None:
    """One token of one query, as its mark says."""
    if mark == " ":
        return
    if mark == "·":
        drawing.rect(x, y, CELL - 1, CELL - 1, "d-faint")
        return
    if mark == "○":
        drawing.rect(x + 1, y + 1, CELL - 3, CELL - 3, "d-dashed")
        return
    if mark == "█":
        drawing.rect(x, y, CELL - 1, CELL - 1, "d-own" if own else "d-remote")
        return
    if kind == "strength":
        drawing.rect(x, y, CELL - 1, CELL - 1, "d-remote", opacity=0.15 + 0.085 * int(mark))
        dark = int(mark) > 4
    elif kind == "score":
        drawing.rect(x, y, CELL - 1, CELL - 1, "d-remote", opacity=0.12 + 0.22 * int(mark))
        dark = int(mark) > 1
    else:
        number = int(mark) if mark.isdigit() else ord(mark) - ord("a")
        drawing.rect(x, y, CELL - 1, CELL - 1, PALETTE[number % len(PALETTE)])
        dark = True
    style = "d-on" if dark else "d-ink"
    drawing.text(x + CELL / 2 - 0.5, y + CELL - 4, mark, style, 10, "middle")


def step_figure(number: int, caption: str, kind: str = "name") -> str:
    """Step `number` (from 1) of the example: for each group the queries against the tokens.

    kind says what a mark is: "name" (colours tell them apart), "score" or "strength" (depth).
    """
    step = steps()[number - 1]
    drawing = Drawing(LEFT + GROUPS * (WIDTH + 46), TOP + place(TOKENS) + 6)
    for r, picture in enumerate(step.pictures):
        x0 = LEFT + r * (WIDTH + 46)
        drawing.text(x0, 12, f"group {r}", "d-ink d-bold", 12)
        for b in range(TOKENS // CONFIG.block_size):
            middle = x0 + place(4 * b) + 2 * CELL
            drawing.text(middle, 28, f"block {b}", "d-muted", 9.5, "middle")
        for i, row in enumerate(picture):
            y = TOP + place(i)
            drawing.text(x0 - 6, y + CELL - 4, i, "d-muted", 9.5, "end")
            for j, mark in enumerate(row):
                own = j // CONFIG.block_size == i // CONFIG.block_size
                cell(drawing, x0 + place(j), y, mark, own, kind)
    alt = f"{step.form} of the twelve-token example: {step.changed}"
    return drawing.figure(caption, alt)


def union_figure() -> str:
    """Three loop orders over the edges of queries 8 to 11, group 0, of the example."""
    selection = trace_example("reference").selection.indices[8:12, 0]
    blocks = sorted({int(b) for b in selection.ravel() if b >= 0})
    edges = [(i, int(b)) for i, row in enumerate(selection) for b in row if b >= 0]
    orders = (
        ("query by query", edges, f"{len(edges)} blocks loaded"),
        ("block by block", sorted(edges, key=lambda e: (e[1], e[0])), f"{len(blocks)} loaded, a partial result per edge"),
        ("along the union", sorted(edges, key=lambda e: (e[1], e[0])), f"{len(blocks)} loaded for all four queries"),
    )  # fmt: skip
    drawing = Drawing(620, 210)
    for n, (name, order, cost) in enumerate(orders):
        x0 = 14 + n * 205
        drawing.text(x0, 14, name, "d-ink d-bold", 12.5)
        for i in range(4):
            drawing.text(x0, 50 + i * 34, f"q{8 + i}", "d-muted", 11)
            for b in range(3):
                x, y = x0 + 26 + b * 52, 32 + i * 34
                if (i, b) in order:
                    step = blocks.index(b) if n == 2 else order.index((i, b))
                    drawing.rect(x, y, 46, 28, PALETTE[blocks.index(b)], r=4)
                    drawing.text(x + 23, y + 19, step + 1, "d-on d-bold", 12, "middle")
                else:
                    drawing.rect(x, y, 46, 28, "d-dashed" if n == 2 else "d-faint", r=4)
        drawing.text(x0, 196, cost, "d-muted", 11)
    return drawing.figure(
        "The same eight edges in three orders. A number says when an edge is computed. Along the union, "
        "a dashed box is computed but masked, because that query did not select the block.",
        "a grid of four queries by three blocks, three times, numbered in different orders",
    )
