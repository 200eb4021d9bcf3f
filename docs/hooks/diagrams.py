"""Diagrams that belong to chapters: drawn by hand, in units of the page."""

from __future__ import annotations

import numpy as np

from docs.hooks.svg import Drawing


def cost_figure() -> str:
    """Keys read by each query: dense attention's triangle and the bounded strip of MSA."""
    drawing, n, size = Drawing(560, 236), 24, 8
    for side, (x0, title) in enumerate(
        ((20, "dense: every key so far"), (300, "MSA: at most k blocks"))
    ):
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
                drawing.rect(
                    x0 + j * (size + 1), 24 + i * (size + 0.3), size, size - 0.6, style, r=1
                )
    return drawing.figure(
        "Rows are queries, columns are keys. The triangle grows with the square of the length of the "
        "text, the strip with its length. The index branch scores grey keys, but they are not read.",
        "a filled triangle beside one of which only three blocks in each row are filled",
    )


def heads_figure() -> str:
    """Eight query heads in two groups that share key and value heads."""
    drawing = Drawing(560, 190)
    for r, style in enumerate(("d-remote", "d-own")):
        x0 = 20 + r * 275
        for h in range(4):
            drawing.box(x0 + h * 62, 20, 54, 34, f"q{r * 4 + h}", style, 13, r=5)
            drawing.line((x0 + h * 62 + 27, 56), (x0 + 120 + (h - 1.5) * 8, 108), arrow=True)
        drawing.box(x0 + 60, 112, 120, 34, f"k{r}, v{r}", style, 13, r=5)
        drawing.text(
            x0 + 120, 170, f"group {r}: G = 4 heads share one cache", "d-muted", 11.5, "middle"
        )
    return drawing.figure(
        "Hq = 8 query heads, Hkv = 2 key/value heads. A cache holds 2 heads instead of 8.",
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
        drawing.box(x, y, 116, 40, words, style)
    for y in (46, 180):
        drawing.line((288, y), (306, y), arrow=True)
        drawing.line((428, y), (446, y), arrow=True)
    drawing.line((102, 108), (166, 50), style="d-dashed")
    drawing.text(100, 68, "detached", "d-muted", 11, "middle")
    drawing.line((102, 122), (166, 176), arrow=True)
    drawing.line((508, 68), (508, 112), (368, 112), (368, 156), arrow=True)
    drawing.text(512, 126, "which blocks to read", "d-muted", 11, "middle")
    drawing.line((340, 158), (340, 70), style="d-dashed", arrow=True)
    drawing.text(334, 126, "KL trains", "d-muted", 11, "end")
    return drawing.figure(
        "A layer has two branches. The index branch (orange) selects the blocks that the main branch "
        "(blue) reads. The index branch gets a gradient only from the KL loss, and this gradient stops "
        "at the hidden state.",
        "index branch above, main branch below; arrows show the selection down and the KL loss up",
    )


def rules_figure() -> str:
    """The rules, by subject."""
    families = (
        ("sequences", "d-muted", (1, 2, 3)), ("index branch", "d-own", (4, 5, 6, 7, 8)),
        ("main branch", "d-remote", (9, 10, 11, 12)), ("lowering", "d-green", (13, 14, 15, 16)),
        ("training", "d-red", (17, 18)), ("behaviour", "d-muted", (19, 20, 21)),
    )  # fmt: skip
    drawing, x = Drawing(732, 78), 4.0
    for name, style, rules in families:
        drawing.text(x, 18, name, "d-ink d-bold", 11.5)
        for n in rules:
            drawing.box(x, 28, 30, 30, f"R{n}", style, 11, r=5)
            x += 32
        x += max(10.0, 6.6 * len(name) - 32 * len(rules) + 10)
    return drawing.figure("The twenty-one rules, in six families.", "boxes named R1 to R21")


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
        drawing.box(x, y, 100, 40, name, style, 12, r=7)
    for x, y in ((104, 78), (224, 78), (464, 34), (584, 34)):
        drawing.line((x + 1, y), (x + 18, y), arrow=True)
    drawing.line((344, 70), (352, 70), (352, 34), (362, 34), arrow=True)
    drawing.line((344, 88), (352, 88), (352, 122), (362, 122), arrow=True)
    drawing.line((654, 56), (654, 100), arrow=True)
    drawing.line((464, 122), (602, 122), arrow=True)
    drawing.text(533, 115, "attend_union", "d-muted", 10.5, "middle")
    drawing.text(662, 82, "combine", "d-muted", 10.5)
    drawing.text(
        364, 166, "above: KV-outer, block by block; below: the union walk", "d-muted", 10.5
    )
    return drawing.figure(
        "Forms are boxes, steps are arrows. Both loop orders end in the same output.",
        "boxes from index vectors to block scores, selection, and two ways to the output",
    )


def memory_figure() -> str:
    """Bars for the memory of scores: by a mask, by a gather, by a gather in tiles."""
    n, heads, picked = 32_768, 64, 16 * 128
    bars = (
        ("a mask: scores of all pairs", heads * n * n, "d-red"),
        ("a gather: scores of selected pairs", heads * n * picked, "d-remote"),
        ("a gather, 512 queries at a time", heads * 512 * picked, "d-green"),
    )
    drawing = Drawing(640, 132)
    for i, (name, numbers, style) in enumerate(bars):
        gib, y = numbers * 4 / 2**30, 8 + 42 * i
        drawing.text(0, y + 12, name, "d-ink", 12)
        drawing.rect(0, y + 18, max(2.0, gib / 256 * 540), 14, style, r=2)
        drawing.text(max(2.0, gib / 256 * 540) + 8, y + 30, f"{gib:.3g} GiB", "d-muted", 11.5)
    return drawing.figure(
        "32K tokens, 64 heads, float32. The last bar does not grow with the text.",
        "three bars, each a sixteenth or less of the one before",
    )


def tile_figure() -> str:
    """A tile of queries times heads, its union of blocks and the bits of its rows."""
    drawing = Drawing(690, 170)
    drawing.text(0, 14, "one tile: 4 queries × 16 heads = 64 rows", "d-ink d-bold", 12.5)
    wants = ((0, 2, 4), (0, 3, 4), (1, 3, 4), (1, 3, 4))
    for i, wanted in enumerate(wants):
        y = 48 + i * 25
        for line in range(4):
            drawing.rect(0, y + line * 5.2, 110, 4.4, "d-quiet", r=1)
        drawing.text(118, y + 15, f"query {i}", "d-muted", 10.5)
        for b in range(5):
            x = 190 + b * 88
            if b in wanted:
                drawing.rect(x, y, 80, 20, "d-own" if b == 4 else "d-remote", r=3)
            else:
                drawing.rect(x, y, 80, 20, "d-dashed", r=3)
    for b in range(5):
        words = "own block" if b == 4 else f"block {(3, 8, 9, 17)[b]}"
        drawing.text(230 + b * 88, 38, words, "d-ink", 11.5, "middle")
    drawing.line((190, 160), (622, 160), arrow=True)
    drawing.text(632, 164, "walk", "d-muted", 11)
    return drawing.figure(
        "The program walks from left to right. At each block all 64 rows are multiplied, because tensor "
        "cores compute whole tiles; dashed rows get weight 0. Here 12 of 20 boxes are useful work.",
        "rows of queries against five blocks, filled where a query selected the block",
    )


def threshold_figure() -> str:
    """A threshold that rises as candidates fill a buffer, over random scores; the buffer below."""
    rng, drawing = np.random.default_rng(5), Drawing(660, 298)
    scores, places, room = rng.standard_normal(210), 6, 18
    bar, held, last = -9.0, [], 0
    for b, score in enumerate(scores):
        x, y = 4 + b * 3.1, 100 - score * 30
        if score > bar:
            held.append(float(score))
        drawing.rect(x, y, 4, 4, "d-own" if score > bar else "d-quiet", r=2)
        full = 60 * len(held) / room
        drawing.rect(x, 278 - full, 2.6, full, "d-own", r=0)
        if len(held) == room or b == len(scores) - 1:
            level = 100 - max(bar, -2.9) * 30
            drawing.line((4 + last * 3.1, level), (x, level), style="d-rule")
            held = sorted(held)[-places:]
            bar, last = held[0], b
    drawing.line((4, 218), (656, 218), style="d-dashed")
    drawing.text(656, 212, f"room for {room}", "d-muted", 11, "end")
    drawing.text(4, 212, "candidates in the buffer", "d-ink", 11)
    drawing.text(4, 294, "blocks, in the order in which they are scored", "d-muted", 11)
    drawing.text(656, 14, "threshold", "d-ink", 11, "end")
    return drawing.figure(
        "Above: orange scores are above the threshold and enter the buffer; grey ones are dropped at once. "
        f"Below: the buffer fills. When it is full, only the best {places} candidates are kept, and the "
        "threshold rises to the worst of them.",
        "points, fewer and fewer of which lie above a line that rises in steps; a buffer that fills below",
    )


def backward_figure() -> str:
    """The same edges, added up for queries and for blocks."""
    drawing = Drawing(640, 196)
    edges = ((0, 0), (1, 0), (1, 1), (2, 0), (2, 2), (3, 1), (3, 2))
    for side, title in enumerate(("dQ: a sum for each query", "dK, dV: a sum for each block")):
        x0 = 10 + side * 330
        drawing.text(x0, 14, title, "d-ink d-bold", 12.5)
        for i, b in edges:
            start, stop = (x0 + 222, 54 + b * 50), (x0 + 72, 46 + i * 38)
            if side == 1:
                start, stop = stop, start
            drawing.line(start, stop, arrow=True)
        for i in range(4):
            drawing.box(x0, 32 + i * 38, 70, 28, f"query {i}", "d-own", 11.5, r=5)
        for b in range(3):
            drawing.box(x0 + 224, 38 + b * 50, 70, 32, f"block {b}", "d-remote", 11.5, r=5)
    return drawing.figure(
        "The same seven edges on both sides. On the left, at most k arrows lead to a query. On the right, "
        "thousands of arrows may lead to a block that many queries read.",
        "arrows from blocks to queries, and from queries to blocks",
    )


def testing_figure() -> str:
    """Draw, check, shrink: the loop of a property test."""
    drawing = Drawing(660, 132)
    boxes = (
        (4, "draw a case", "shapes, ties, NaN", "d-own"), (176, "run the backend", "and the spec", "d-remote"),
        (348, "rule holds?", "yes: draw the next", "d-green"), (520, "shrink it", "while it still fails", "d-red"),
    )  # fmt: skip
    for x, words, more, style in boxes:
        drawing.rect(x, 34, 132, 58, style, r=8)
        drawing.text(x + 66, 60, words, "d-on d-bold", 12.5, "middle")
        drawing.text(x + 66, 78, more, "d-on", 10.5, "middle")
    for x in (136, 308, 480):
        drawing.line((x + 2, 63), (x + 36, 63), arrow=True)
    drawing.line((414, 32), (414, 12), (70, 12), (70, 32), arrow=True)
    drawing.text(498, 54, "no", "d-muted", 11, "middle")
    drawing.line((586, 94), (586, 118), (242, 118), (242, 94), arrow=True)
    return drawing.figure(
        "The loop of a property test. Its result is a small input that breaks the rule.",
        "four boxes in a loop: draw, run, check, shrink",
    )
