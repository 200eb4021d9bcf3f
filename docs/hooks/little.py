"""Pictures of the little model: its parts, its training, a document, the blocks that it read."""

from __future__ import annotations

import json
import re
from html import escape

import numpy as np
from jaxtyping import Float
from matplotlib import pyplot

from benchmarks.figures.style import BLUE, GREEN, INK, MUTED, ORANGE, SKY, STYLE
from docs.hooks.measured import inline
from docs.hooks.svg import Drawing
from msa.demo import demo, demo_html
from msa.demo.questions import Comparison
from msa.model.checkpoint import TRAINED
from msa.model.config import ModelConfig, VisionConfig
from msa.training.documents import IMAGE_TOKEN, Document
from msa.training.presets import PRESETS, PresetName
from msa.training.train import METRICS

Box = tuple[float, float, float, str, str, str]
"""Left edge, top, width, two lines of words, style."""
HIGH = 44


def draw_box(drawing: Drawing, box: Box) -> None:
    """A box with a name and, below it, its sizes."""
    x, y, width, name, sizes, style = box
    drawing.rect(x, y, width, HIGH, style, r=6)
    ink = "d-ink" if style == "d-faint" else "d-on"
    drawing.text(x + width / 2, y + (19 if sizes else 27), name, f"{ink} d-bold", 12, "middle")
    drawing.text(x + width / 2, y + 35, sizes, ink, 10, "middle")


def arrows(drawing: Drawing, y: float, *spans: tuple[float, float]) -> None:
    """Level arrows, each from x to x."""
    for start, stop in spans:
        drawing.line((start + 2, y), (stop - 2, y), arrow=True)


def architecture_figure() -> str:
    """The tiny preset from tokens and pictures to logits, every size read from its configuration."""
    config = PRESETS["tiny"].model
    drawing = Drawing(740, 436)
    draw_inputs(drawing, config)
    draw_layer(drawing, config)
    drawing.line((370, 340), (370, 362), arrow=True)
    drawing.text(382, 356, f"× {config.layers} layers", "d-ink d-bold", 11.5)
    names = "norm", "head", "logits"
    sizes = f"{config.width}", f"{config.width} × {config.vocab_size}", "of each token's successor"
    for i, (name, size) in enumerate(zip(names, sizes)):
        draw_box(drawing, (190 + i * 130, 366, 106 + 34 * (i == 2), name, size, "d-faint"))
    arrows(drawing, 388, (296, 320), (426, 450))
    return drawing.figure(
        "The tiny preset, with the sizes from its configuration. Orange: the index branch. Blue: "
        "attention. Green: parts that treat each token separately. Red: pictures.",
        "boxes from tokens and pictures through a layer of attention and experts to logits",
    )


def draw_inputs(drawing: Drawing, config: ModelConfig) -> None:
    """Two rows: text, and the pictures whose tokens are put into the text."""
    vision = config.vision
    assert isinstance(vision, VisionConfig)
    side = vision.patch * vision.merge
    for i, mark in enumerate("[QKZ#]"):
        drawing.rect(10 + i * 22, 12, 20, 26, "d-red" if mark == "#" else "d-faint", r=3)
        ink = "d-on d-bold" if mark == "#" else "d-ink"
        drawing.text(20 + i * 22, 30, mark, f"{ink} d-mono", 12, "middle")
    embedding = f"{config.vocab_size} × {config.width}"
    draw_box(drawing, (190, 4, 130, "embedding", embedding, "d-faint"))
    drawing.text(10, 56, "bytes; # is a picture's token", "d-muted", 10.5)
    tower = f"{vision.layers} layer, {vision.heads} heads, width {vision.width}"
    boxes: tuple[Box, ...] = (
        (10, 76, 120, "picture", f"{side} × {side} pixels", "d-red"),
        (154, 76, 120, "patches", f"{vision.merge**2} of {vision.patch} × {vision.patch}", "d-red"),
        (298, 76, 164, "vision tower", tower, "d-red"),
        (486, 76, 120, "projector", f"one token of {config.width}", "d-red"),
    )
    for box in boxes:
        draw_box(drawing, box)
    arrows(drawing, 26, (144, 188))
    arrows(drawing, 98, (130, 154), (274, 298), (462, 486))
    drawing.line((546, 74), (546, 34), arrow=True)
    drawing.text(556, 58, "replaces #", "d-muted", 10.5)
    drawing.line((322, 26), (724, 26), (724, 146), (14, 146), (14, 184), (30, 184), arrow=True)
    drawing.text(330, 18, f"the stream: {config.width} numbers a token", "d-ink d-bold", 11.5)


def draw_layer(drawing: Drawing, config: ModelConfig) -> None:
    """One layer: the stream on top, and the two outputs that are added to it."""
    drawing.rect(4, 166, 732, 174, "d-dashed", r=8)
    drawing.line((30, 184), (732, 184), style="d-rule", arrow=True)
    index = f"{config.groups} queries, 1 key of {config.index_dim}"
    choice = f"k = {config.msa.top_k} of {config.msa.block_size} tokens"
    heads = f"{config.heads} heads in {config.groups} groups, {config.head_dim} each"
    dense, experts = config.mlp.count("dense"), config.mlp.count("moe")
    routed = f"{config.experts_per_token} of {config.experts} and 1 for all"
    wide = f"experts, {config.expert_width} wide"
    boxes: tuple[Box, ...] = (
        (18, 206, 92, "norm", f"mix {config.mixed_tokens} tokens", "d-faint"),
        (136, 206, 136, "index branch", index, "d-own"),
        (296, 206, 112, "blocks", choice, "d-own"),
        (250, 280, 178, "attention", heads, "d-remote"),
        (470, 206, 60, "norm", "", "d-faint"),
        (580, 206, 130, "MLP", f"{config.mlp_width} wide", "d-green"),
        (452, 280, 104, "router", "bias: only to choose", "d-green"),
        (580, 280, 130, wide, routed, "d-green"),
    )
    for box in boxes:
        draw_box(drawing, box)
    drawing.line((64, 184), (64, 204), arrow=True)
    drawing.line((110, 228), (134, 228), style="d-dashed", arrow=True)
    drawing.text(122, 200, "detached", "d-muted", 9.5, "middle")
    drawing.line((64, 250), (64, 302), (248, 302), arrow=True)
    turned = f"q, k: norm, {config.rotary_dim} of {config.head_dim} turned"
    drawing.text(72, 296, turned, "d-muted", 10)
    arrows(drawing, 228, (272, 296), (530, 580))
    arrows(drawing, 302, (556, 580))
    drawing.line((352, 250), (352, 278), arrow=True)
    drawing.line((428, 302), (440, 302), (440, 188), arrow=True)
    drawing.line((500, 184), (500, 204), arrow=True)
    drawing.line((500, 250), (500, 278), arrow=True)
    drawing.text(536, 221, f"{dense} layer", "d-muted", 10)
    drawing.text(508, 269, f"{experts} layers", "d-muted", 10)
    drawing.line((710, 302), (724, 302), (724, 188), arrow=True)
    drawing.line((710, 228), (724, 228))
    for x in (445, 711):
        drawing.text(x, 202, "+", "d-ink d-bold", 13)


def load_figure(shares: list[list[float]]) -> str:
    """Each expert's share of the choices, step by step."""
    with pyplot.rc_context(STYLE | {"svg.fonttype": "none"}):
        figure, axis = pyplot.subplots(figsize=(8, 2.4), layout="constrained")
        for i, (expert, color) in enumerate(zip(zip(*shares), (BLUE, ORANGE, GREEN, SKY))):
            axis.plot(expert, color=color, label=f"expert {i}")
        axis.axhline(1 / len(shares[0]), color=MUTED, lw=0.8, ls=(0, (4, 3)))
        axis.set_ylim(0, 0.55)
        axis.set_xlabel("step")
        axis.set_title("Share of all choices", loc="left", fontweight="bold", fontsize=10)
        axis.legend(frameon=False, fontsize=8, ncols=4)
        caption = "The figure shows the run above. The dashed line is an equal share."
        return inline(figure, "load", caption, "four lines that meet at a quarter")


def training_figure(name: PresetName, caption: str) -> str:
    """The run that made a shipped model, from its metrics: losses by step, answers by test."""
    path = TRAINED[name] / METRICS
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    border = sum(line["mode"] == "dense" for line in lines)
    tests = [(line["step"] + 1, line["test"]) for line in lines if "test" in line]
    with pyplot.rc_context(STYLE | {"svg.fonttype": "none"}):
        figure, (left, middle, right) = pyplot.subplots(
            1, 3, figsize=(8.6, 2.7), layout="constrained"
        )
        left.plot([line["language"] for line in lines], color=INK, lw=1)
        middle.plot([line["kl"] for line in lines], color=BLUE, lw=1)
        middle.set_ylim(0)
        for share, color in (("near", MUTED), ("far", GREEN)):
            steps, shares = zip(*((step, test[share]) for step, test in tests))
            right.plot(steps, shares, "o-", color=color, label=share)
        right.set_ylim(0, 1.03)
        right.legend(frameon=False, fontsize=8, loc="lower right")
        titles = "prose + answers, nats", "KL of the index", "right answers"
        for axis, title in zip((left, middle, right), titles):
            axis.set_title(title, loc="left", fontweight="bold", fontsize=10)
            axis.axvline(border, color=MUTED, lw=0.8, ls=(0, (4, 3)))
            axis.set_xlabel("step")
        words = (
            f"{caption} Attention becomes sparse at the dashed line. Drawn from {name}/{path.name}."
        )
        return inline(figure, f"training-{name}", words, "losses fall, right answers rise")


def with_pictures(html: str, images: Float[np.ndarray, "n 8 8"], name: str) -> str:
    """HTML that refers to pictures as #p0, #p1, ...; these, and ids of this name."""
    shapes = "".join(demo_html.symbol(i, picture) for i, picture in enumerate(images))
    unseen = 'width="0" height="0" style="position:absolute" aria-hidden="true"'
    whole = f"<svg {unseen}><defs>{shapes}</defs></svg>{html}"
    return re.sub(r'(?<=id="|f="#)p(?=\d)', f"{name}-p", whole)


def document_figure(document: Document) -> str:
    """A document as a reader sees it, with its pictures in their places."""
    text = demo_html.draw_text(document.tokens, 0)
    for question in document.questions:
        asked = f"?{question.key.decode()}={question.digit}"
        text = text.replace(asked, f"<b>{asked}</b>")
    caption = (
        f"{len(document.tokens)} tokens: bytes of prose, a token for each of "
        f"{len(document.images)} pictures, and {len(document.questions)} questions (bold)."
    )
    html = (
        f'<figure class="drawn"><p class="document">{text}</p>'
        f"<figcaption>{caption}</figcaption></figure>"
    )
    return with_pictures(html, document.images, "document")


def demo_frame() -> str:
    """The page of `msa demo` as it is shipped, in a frame that holds the whole page itself."""
    page = demo_html.draw(demo.compute(demo.DemoOptions(backend="torch")))
    return (
        f'<iframe class="demo" title="The page of msa demo" loading="lazy" '
        f'srcdoc="{escape(page, quote=True)}"></iframe>'
    )


def opened_figure(comparison: Comparison, question: int) -> str:
    """The blocks that each layer and group read for one question, with the pictures above."""
    asked = comparison.questions[question]
    opened = demo_html.opened_by(comparison.sparse[question])
    layers, groups, blocks = opened.shape
    size, left = comparison.block_size, 92
    cell = 600 / blocks
    drawing = Drawing(700, 46 + layers * groups * 17)
    (places,) = np.nonzero(asked.tokens == IMAGE_TOKEN)
    for number, place in enumerate(places.tolist()):
        x = left + place / size * cell - 10
        digit = f'x="{x:.1f}" y="0" width="20" height="20" class="d-ink" viewBox="0 0 8 8"'
        drawing.parts.append(f'<svg {digit}><use href="#p{number}"/></svg>')
        drawing.line((x + 10, 22), (x + 10, 27))
    own, record = asked.place // size, asked.record // size
    for row, (layer, group) in enumerate(np.ndindex(layers, groups)):
        y = 30 + row * 17
        drawing.text(0, y + 11, f"layer {layer + 1}, group {group + 1}", "d-muted", 10.5)
        drawing.rect(left, y, blocks * cell, 13, "d-faint", r=2)
        for block in np.flatnonzero(opened[layer, group]).tolist():
            style = "d-muted" if block == own else "d-own" if block == record else "d-remote"
            drawing.rect(left + block * cell, y, max(cell - 0.8, 2), 13, style, r=1)
    drawing.text(left, 42 + layers * groups * 17, "first token", "d-muted", 10.5)
    drawing.text(left + 600, 42 + layers * groups * 17, "the question", "d-muted", 10.5, "end")
    answer = comparison.sparse[question].digit
    caption = (
        f"The blocks that were read to answer ?{escape(asked.key)}=, {asked.distance:,} tokens behind "
        f"its picture. The answer {answer} is {'right' if answer == asked.right else 'wrong'}. Orange: "
        "the block with the picture. Grey: the own block. Blue: the other blocks that were read."
    )
    figure = drawing.figure(caption, "rows of blocks, of which a few in each row were read")
    return with_pictures(figure, comparison.images, "opened")
