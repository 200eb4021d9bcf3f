"""Pictures and diffs of the chapters about kernels."""

from __future__ import annotations

import difflib
import inspect

import numpy as np

import msa
from docs.hooks.svg import Drawing
from examples.triton_steps import STEPS


def step_diff(step: int, context: int = 1) -> str:
    """What changes from one kernel of `examples/triton_steps.py` to the next, as Markdown.

    >>> "+    for j in range(tl.load(counts + i_tile)):" in step_diff(0)
    True
    """
    before, after = (inspect.getsource(kernel.fn).splitlines() for kernel in STEPS[step : step + 2])
    diff = list(difflib.unified_diff(before, after, lineterm="", n=context))[2:]
    hunks: list[list[str]] = []
    for line in diff:
        if line.startswith("@@"):
            hunks.append([])
        elif not is_head(line):
            hunks[-1].append(line)
    kept = ["\n".join(hunk) for hunk in hunks if any(line[0] in "+-" for line in hunk)]
    return "```diff\n{}\n```".format("\n...\n".join(kept))


def is_head(line: str) -> bool:
    """Whether a line is one of a kernel's head: its name, its parameters, its docstring."""
    inside = line[1:].strip()
    return inside.startswith(("def ", '"""', "D: ", "ROWS: ", "H: "))


def grid_figure() -> str:
    """A grid of programs over an output, and the memories that one of them uses."""
    drawing = Drawing(700, 236)
    drawing.text(0, 14, "the grid: one program for each tile of the output", "d-ink d-bold", 12.5)
    for row in range(4):
        for column in range(5):
            mine = (row, column) == (1, 3)
            drawing.rect(
                4 + column * 56, 28 + row * 40, 52, 36, "d-own" if mine else "d-faint", r=4
            )
            drawing.text(30 + column * 56, 50 + row * 40, f"{row}, {column}",
                         "d-on d-bold" if mine else "d-muted", 11, "middle")  # fmt: skip
    drawing.text(4, 212, "tl.program_id(0) and tl.program_id(1)", "d-muted d-mono", 11)
    drawing.text(330, 14, "one of them, on one multiprocessor", "d-ink d-bold", 12.5)
    levels = (
        ("registers", "tiles that it computes with: b_q, b_s, b_o", "d-own", 60),
        ("shared memory", "tiles that arrive: keys, values", "d-remote", 130),
        ("L2 cache", "shared by all multiprocessors", "d-green", 220),
        ("HBM", "all tensors", "d-muted", 330),
    )
    for i, (name, holds, style, width) in enumerate(levels):
        y = 28 + i * 50
        drawing.rect(330, y, width, 26, style, r=4)
        drawing.text(336, y + 40, f"{name}: {holds}", "d-muted", 11)
    drawing.line((676, 196), (676, 40), arrow=True)
    drawing.text(670, 120, "tl.load", "d-muted d-mono", 11, "end")
    return drawing.figure(
        "Left: a grid of 4 × 5 programs, each with its own numbers. Right: the memories below one program. "
        "Each level is larger and slower than the one above it.",
        "a grid of twenty boxes, and four memories from small to large",
    )


def example_pool() -> msa.PagePool:
    """The pool of chapter 14: five tokens of one text and twelve of another, in six pages."""
    pages = (np.zeros((6, 4, 2, 2)), np.zeros((6, 4, 2, 1)), np.zeros((6, 4, 2)))
    pool = msa.PagePool(*(page.astype(np.float32) for page in pages), batch=2)
    for slot, n in ((0, 5), (1, 12)):
        pool.append(slot, *(np.zeros((n, *page.shape[2:]), np.float32) for page in pages))
    return pool


def pages_figure() -> str:
    """Two sequences, their page table and the pages, as the pool of the chapter has them."""
    drawing, pool = Drawing(700, 178), example_pool()
    table = np.asarray(pool.cache.page_table)
    owner: dict[int, tuple[int, int]] = {}
    drawing.text(0, 14, "blocks of the sequences", "d-ink d-bold", 12)
    drawing.text(236, 14, "page table", "d-ink d-bold", 12)
    drawing.text(430, 14, "pages", "d-ink d-bold", 12)
    for s, length in enumerate(pool.lengths):
        style, y = ("d-remote", "d-own")[s], 28 + 50 * s
        used = -(-int(length) // 4)
        for b in range(3):
            if b < used:
                owner[int(table[s, b])] = (s, b)
                tokens = min(4, int(length) - 4 * b)
                drawing.rect(b * 66, y, 15 * tokens, 30, style, r=3)
                drawing.text(b * 66 + 7.5 * tokens, y + 20, f"b{b}" if tokens > 1 else "b",
                             "d-on d-bold", 11, "middle")  # fmt: skip
            drawing.rect(236 + b * 44, y, 40, 30, style if b < used else "d-dashed", r=3)
            words = str(table[s, b]) if b < used else "−1"
            drawing.text(256 + b * 44, y + 20, words, "d-on d-bold" if b < used else "d-muted", 12,
                         "middle")  # fmt: skip
        drawing.text(0, y + 43, f"sequence {s}: {int(length)} tokens", "d-muted", 10.5)
    for page in range(6):
        s, b = owner.get(page, (-1, -1))
        x, y = 430 + (page % 3) * 88, 28 + (page // 3) * 66
        drawing.rect(x, y, 80, 34, "d-dashed" if s < 0 else ("d-remote", "d-own")[s], r=4)
        drawing.text(x + 40, y + 22, "free" if s < 0 else f"block {b} of {s}",
                     "d-muted" if s < 0 else "d-on d-bold", 11, "middle")  # fmt: skip
        drawing.text(x + 40, y + 48, f"page {page}", "d-muted", 10.5, "middle")
    return drawing.figure(
        "To find block 1 of a sequence, a kernel reads entry 1 of its row of the page table; the number there "
        "is the page. −1 stands where a sequence has no block, and must never be used as a page.",
        "blocks of two sequences, a table of numbers, and six pages that hold the blocks",
    )
