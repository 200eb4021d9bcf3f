"""Pictures of the 12-token example, drawn from the forms that the spec makes of it."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

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
    """Where token j's column or row begins: blocks stand apart."""
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


def cost_figure() -> str:
    """Keys read by each query: dense attention's triangle and the bounded strip of MSA."""
    drawing, n, size = Drawing(560, 236), 24, 8
    for side, (x0, title) in enumerate(((20, "dense: every key so far"), (300, "MSA: at most k blocks"))):
        drawing.text(x0, 14, title, "d-ink d-bold", 12.5)
        rng = np.random.default_rng(3)
        for i in range(n):
            own = i // 3
            remote = set(rng.permutation(own)[:2].tolist())
            for j in range(i + 1):
                b = j // 3
                if side == 0:
                    style = "d-remote"
                else:
                    style = "d-own" if b == own else "d-remote" if b in remote else "d-faint"
                drawing.rect(x0 + j * (size + 1), 24 + i * (size + 0.3), size, size - 0.6, style, r=1)
    return drawing.figure(
        "Rows are queries, columns keys. The triangle grows with the square of the text, the strip "
        "with its length. Grey keys are scored by the small index branch, but never read.",
        "a filled triangle beside one of which only three blocks in each row are filled",
    )


def heads_figure() -> str:
    """Eight query heads in two groups that share key and value heads."""
    drawing = Drawing(560, 190)
    for r, style in enumerate(("d-remote", "d-own")):
        x0 = 20 + r * 275
        for h in range(4):
            drawing.rect(x0 + h * 62, 20, 54, 34, style, r=5)
            drawing.text(x0 + h * 62 + 27, 42, f"q{r * 4 + h}", "d-on d-bold", 13, "middle")
            drawing.line((x0 + h * 62 + 27, 56), (x0 + 120 + (h - 1.5) * 8, 108), arrow=True)
        drawing.rect(x0 + 60, 112, 120, 34, style, opacity=0.75, r=5)
        drawing.text(x0 + 120, 134, f"k{r}, v{r}", "d-on d-bold", 13, "middle")
        drawing.text(x0 + 120, 170, f"group {r}: G = 4 heads read one cache", "d-muted", 11.5, "middle")
    return drawing.figure(
        "Hq = 8 query heads, Hkv = 2 key/value heads. A cache holds 2 heads in place of 8.",
        "four query heads point to one key and value head, twice",
    )


def branches_figure() -> str:
    """The two branches of one layer, and which way the gradients go."""
    drawing = Drawing(600, 230)
    drawing.rect(10, 95, 92, 40, "d-faint", r=6)
    drawing.text(56, 119, "hidden state", "d-ink", 12.5, "middle")
    boxes = (
        (170, 26, "q_idx, k_idx", "d-own"), (310, 26, "block scores", "d-own"),
        (450, 26, "top-k blocks", "d-own"), (170, 160, "q, k, v", "d-remote"),
        (310, 160, "softmax", "d-remote"), (450, 160, "output", "d-remote"),
    )  # fmt: skip
    for x, y, words, style in boxes:
        drawing.rect(x, y, 116, 40, style, r=6)
        drawing.text(x + 58, y + 25, words, "d-on d-bold", 12.5, "middle")
    for y in (46, 180):
        drawing.line((288, y), (306, y), arrow=True)
        drawing.line((428, y), (446, y), arrow=True)
    drawing.line((102, 108), (166, 50), style="d-dashed")
    drawing.text(100, 68, "detached", "d-muted", 11, "middle")
    drawing.line((102, 122), (166, 176), arrow=True)
    drawing.line((508, 68), (508, 112), (368, 112), (368, 156), arrow=True)
    drawing.text(512, 126, "which blocks to read", "d-muted", 11, "middle")
    drawing.line((340, 158), (340, 70), style="d-dashed", arrow=True)
    drawing.text(334, 126, "KL teaches", "d-muted", 11, "end")
    return drawing.figure(
        "Two branches share a layer. The index branch (orange) decides what the main branch (blue) "
        "reads. Only the KL loss sends gradient into the index branch; it stops at the hidden state.",
        "index branch above, main branch below; arrows show selection down and teaching up",
    )


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
        "The same eight edges in three orders; numbers say when each is worked on. Along the union "
        "a dashed box is work done and thrown away, because that query did not select the block.",
        "a grid of four queries by three blocks, three times, numbered in different orders",
    )


def rules_figure() -> str:
    """The twenty rules, by what they speak of."""
    families = (
        ("sequences", "d-muted", (1, 2, 3)), ("index branch", "d-own", (4, 5, 6, 7, 8)),
        ("main branch", "d-remote", (9, 10, 11, 12)), ("lowering", "d-green", (13, 14, 15, 16)),
        ("training", "d-red", (17, 18)), ("behaviour", "d-muted", (19, 20)),
    )  # fmt: skip
    drawing, x = Drawing(700, 78), 4.0
    for name, style, rules in families:
        drawing.text(x, 18, name, "d-ink d-bold", 11.5)
        for n in rules:
            drawing.rect(x, 28, 30, 30, style, r=5)
            drawing.text(x + 15, 48, f"R{n}", "d-on d-bold", 11, "middle")
            x += 32
        x += max(10.0, 6.6 * len(name) - 32 * len(rules) + 10)
    return drawing.figure("Twenty rules, in six families.", "twenty boxes named R1 to R20")


def pipeline_figure() -> str:
    """The forms and the arrows between them."""
    drawing = Drawing(720, 176)
    boxes = {
        "q_idx, k_idx": (4, 58, "d-muted"), "BlockScores": (124, 58, "d-own"),
        "Selection": (244, 58, "d-own"), "ReverseIndex": (364, 14, "d-green"),
        "Schedule": (484, 14, "d-green"), "Partials": (604, 14, "d-green"),
        "TileUnion": (364, 102, "d-red"), "Output": (604, 102, "d-remote"),
    }  # fmt: skip
    for name, (x, y, style) in boxes.items():
        drawing.rect(x, y, 100, 40, style, r=7)
        drawing.text(x + 50, y + 25, name, "d-on d-bold", 12, "middle")
    for x, y in ((104, 78), (224, 78), (464, 34), (584, 34)):
        drawing.line((x + 1, y), (x + 18, y), arrow=True)
    drawing.line((344, 70), (352, 70), (352, 34), (362, 34), arrow=True)
    drawing.line((344, 88), (352, 88), (352, 122), (362, 122), arrow=True)
    drawing.line((654, 56), (654, 100), arrow=True)
    drawing.line((464, 122), (602, 122), arrow=True)
    drawing.text(533, 115, "attend_union", "d-muted", 10.5, "middle")
    drawing.text(662, 82, "combine", "d-muted", 10.5)
    drawing.text(364, 166, "above: KV-outer, block by block; below: the union walk", "d-muted", 10.5)
    return drawing.figure(
        "Forms are boxes, steps are arrows. Both loop orders end in the same output.",
        "boxes from index vectors to block scores, selection, and two ways to the output",
    )
