"""The page of the demo: one HTML file with the blocks that were opened and their contents."""

from __future__ import annotations

from html import escape

import numpy as np
from jaxtyping import Float, Int

from msa.demo import control
from msa.demo.answers import Answer
from msa.demo.questions import Comparison
from msa.training.documents import IMAGE_TOKEN

STYLE = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1c2430; --soft: #5b6570; --line: #dfe3e8;
  --cell: #eef1f4; --open: #0072b2; --mark: #b34700; --card: #f7f9fb; }
@media (prefers-color-scheme: dark) { :root { --ground: #14181d; --ink: #e8ecf0; --soft: #a0abb6;
  --line: #333c46; --cell: #232a32; --open: #56b4e9; --mark: #ff9d5c; --card: #1b2128; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground);
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.9rem; line-height: 1.2; } .soft { color: var(--soft); }
section { border-top: 1px solid var(--line); padding: 1.2rem 0; }
h2 { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; align-items: center; font-size: 1.1rem; }
h2 .digit { width: 3rem; height: 3rem; } code { font-size: 1em; }
.map { width: 100%; height: auto; display: block; margin-bottom: .8rem; overflow: visible; }
.map text { fill: var(--soft); font-size: 8px; }
.row { fill: var(--cell); } .open { fill: var(--open); } .own { fill: var(--soft); }
.record { fill: none; stroke: var(--mark); stroke-width: 1.5; }
.wrong { color: var(--mark); }
.digit { width: 1.5em; height: 1.5em; vertical-align: middle; border: 1px solid var(--line); }
.digit rect { fill: currentColor; }
.blocks { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: .6rem; }
.block { background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  padding: .4rem .6rem; } .block.holds { border: 2px solid var(--mark); }
.block code { white-space: pre-wrap; overflow-wrap: anywhere; }
.block small { color: var(--soft); display: block; }
"""
CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in range(0x80, 0xA0)}
CONTROLS |= {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\t\n"}
CONTROLS[0x7F] = "\N{SYMBOL FOR DELETE}"
"""The symbols for control characters, which HTML does not have."""
CELL, LEFT, PICTURE = 7, 62, 14
"""Widths in the map, in pixels: a block, the names of the rows, a picture above."""

SOURCES = (
    " Prose: the Python reference. Pictures: scikit-learn's digits (UCI, Optical Recognition of "
    "Handwritten Digits)."
)


def draw(comparison: Comparison) -> str:
    """The page as HTML."""
    asked = len(comparison.questions)
    sections = "".join(draw_question(comparison, i) for i in range(asked))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>What a sparse model reads</title><style>{STYLE}</style></head><body>
<svg width="0" height="0" style="position:absolute" aria-hidden="true"><defs>
{"".join(symbol(i, picture) for i, picture in enumerate(comparison.images))}</defs></svg>
<h1>{asked} question{"s" if asked > 1 else ""} to a document of {comparison.tokens:,} tokens</h1>
<p>{introduce(comparison)}</p>
<p class="soft">Each column of a map is a block. Each row is a group of heads in a layer. Blue: a
block that was read to answer. Grey: the question's own block, which is always read. Framed: the
block with the picture asked for. Below each map are the contents of the blocks that were read.</p>
{sections}
<p class="soft">Method: MiniMax Sparse Attention, arXiv 2606.13392.{
        SOURCES if comparison.known else ""
    }</p>
</body></html>
"""


def introduce(comparison: Comparison) -> str:
    """How much was read, and how many answers are right if that is known."""
    asked = len(comparison.questions)
    dense, sparse, unseen = "", "", ""
    if comparison.known:
        dense = f" and is right for <b>{comparison.right(comparison.dense)} of {asked}</b>"
        sparse = f", and is right for <b>{comparison.right(comparison.sparse)} of {asked}</b>"
        unseen = " The prose, the pictures and the keys were not in training."
    fair = f" {control.sentence(comparison.tokens)}" if comparison.known else ""
    return (
        "Pictures of digits are hidden in prose, each after a key of three letters. One model, "
        "which was trained with MSA, reads them twice. Dense attention "
        f"reads all tokens{dense}. MSA reads a few blocks of "
        f"{comparison.block_size} tokens, {comparison.keys[1]:.0f} keys on average{sparse}.{unseen}"
        f"{fair}"
    )


def draw_question(comparison: Comparison, i: int) -> str:
    """The answers, the map and the blocks of one question."""
    question = comparison.questions[i]
    answers = "".join(
        f"<span class={'wrong' if question.mark(a) == '✗' else 'right'}>{name}: {a.digit} "
        f"{question.mark(a) or format(a.chance, '.0%')} "
        f"<span class=soft>({a.keys:,.0f} keys)</span></span>"
        for name, a in (("dense", comparison.dense[i]), ("MSA", comparison.sparse[i]))
    )
    right = "" if question.right is None else f"<span>right: {question.right}</span>"
    return (
        f"<section><h2><code>?{escape(question.key)}=</code>{digit(question.picture)}{right}{answers}"
        f"</h2>"
        f"{draw_map(comparison, i)}<div class=blocks>{draw_blocks(comparison, i)}</div></section>\n"
    )


def draw_map(comparison: Comparison, i: int) -> str:
    """The map: the blocks that each group of each layer opened, with the pictures above them."""
    opened = opened_by(comparison.sparse[i])
    layers, groups, blocks = opened.shape
    question = comparison.questions[i]
    own, record = (at // comparison.block_size for at in (question.place, question.record))
    top, width = PICTURE + 4, LEFT + blocks * CELL
    height = top + layers * groups * (CELL + 2)
    parts: list[str] = []
    (places,) = np.nonzero(question.tokens == IMAGE_TOKEN)
    for number, place in enumerate(places.tolist()):
        x = LEFT + place // comparison.block_size * CELL + CELL / 2 - PICTURE / 2
        parts.append(digit(number, f'x="{x}" y="0" width="{PICTURE}" height="{PICTURE}"'))
    for layer in range(layers):
        for group in range(groups):
            y = top + (layer * groups + group) * (CELL + 2)
            parts.append(f'<text x="0" y="{y + CELL}">layer {layer + 1}, {group + 1}</text>')
            parts.append(
                f'<rect class="row" x="{LEFT}" y="{y}" width="{blocks * CELL - 1}" '
                f'height="{CELL}"/>'
            )
            for block in np.flatnonzero(opened[layer, group]).tolist():
                kind = "own" if block == own else "open"
                parts.append(
                    f'<rect class="{kind}" x="{LEFT + block * CELL}" y="{y}" width="{CELL - 1}" '
                    f'height="{CELL}"><title>block {block}</title></rect>'
                )
    parts.append(
        f'<rect class="record" x="{LEFT + record * CELL - 1}" y="{top - 2}" width="{CELL + 1}" '
        f'height="{height - top + 1}"/>'
    )
    label = f"Blocks that were opened for {question.key}"
    return (
        f'<svg class=map viewBox="0 0 {width} {height}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg>"
    )


def draw_blocks(comparison: Comparison, i: int) -> str:
    """The text and the pictures of each opened block, and the layers and groups that read it."""
    opened = opened_by(comparison.sparse[i])
    question, size = comparison.questions[i], comparison.block_size
    tokens = question.tokens
    parts: list[str] = []
    for block in np.flatnonzero(opened.any((0, 1))).tolist():
        who = [f"{a + 1}.{b + 1}" for a, b in np.argwhere(opened[:, :, block]).tolist()]
        span = range(block * size, min((block + 1) * size, question.place + 1))
        text = draw_text(
            tokens[span.start : span.stop], int((tokens[: span.start] == IMAGE_TOKEN).sum())
        )
        holds = " holds" if question.record in span else ""
        parts.append(
            f'<div class="block{holds}"><code>{text}</code>'
            f"<small>block {block}; layer.group {', '.join(who)}</small></div>"
        )
    return "".join(parts)


def draw_text(tokens: Int[np.ndarray, " n"], number: int) -> str:
    """Tokens as HTML text, decoded as UTF-8, with the pictures from `number` on in their places.

    Control characters become symbols, bytes that are not UTF-8 the replacement character.

    >>> draw_text(np.array([*b"a<", IMAGE_TOKEN, *"’".encode()[:2]]), 4)
    'a&lt;<svg class=digit  viewBox="0 0 8 8"><use href="#p4"/></svg>�'
    """
    parts: list[str] = []
    for i, part in enumerate(np.split(tokens, np.flatnonzero(tokens == IMAGE_TOKEN))):
        if i > 0:
            parts.append(digit(number + i - 1))
        prose = bytes(part[part != IMAGE_TOKEN].tolist())
        parts.append(escape(prose.decode(errors="replace").translate(CONTROLS)))
    return "".join(parts)


def opened_by(answer: Answer) -> np.ndarray:
    """The opened blocks of an answer by MSA, as an array [layers, groups, blocks]."""
    if answer.opened is None:
        raise ValueError("comparison.sparse must hold answers by MSA, got one by dense attention")
    return answer.opened.numpy()


def symbol(number: int, picture: Float[np.ndarray, "8 8"]) -> str:
    """A picture as an SVG symbol, with a square for each pixel that has ink."""
    squares = "".join(
        f'<rect x="{x}" y="{y}" width="1.02" height="1.02" opacity="{(1 + ink) / 2:.2f}"/>'
        for y, row in enumerate(picture.tolist())
        for x, ink in enumerate(row)
        if ink > -1
    )
    return f'<symbol id="p{number}" viewBox="0 0 8 8">{squares}</symbol>'


def digit(number: int, place: str = "") -> str:
    """A reference to a picture, in a line of text or at a place of a drawing."""
    return f'<svg class=digit {place} viewBox="0 0 8 8"><use href="#p{number}"/></svg>'
