"""The block scores and the selected blocks of each query of a trained layer, with their text.

The shipped model reads a document that it was not trained on; scores and selections are computed by
the spec from the index vectors of its layers. `assets/widgets/rows.js` moves from query to query.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from html import escape
from typing import Any

import numpy as np
import torch

from docs.hooks.widgets import widget
from msa import Selection, Sequences
from msa.demo.demo_html import digit, symbol
from msa.ir import BlockScores
from msa.model.attention import IndexBranch
from msa.model.checkpoint import load_trained
from msa.model.vision import cut
from msa.reference import score_blocks, select_blocks
from msa.training.documents import IMAGE_TOKEN, Document
from msa.training.evaluate import unseen_documents

TOKENS, RECORDS = 384, 3


@dataclass(frozen=True)
class Read:
    """A document, and for each layer the scores of its blocks and the selections."""

    document: Document
    block_size: int
    scores: list[BlockScores]
    selections: list[Selection]

    def finds(self, layer: int, question: int) -> bool:
        """Whether a group of a layer reads the block with the picture that is asked for."""
        asked = self.document.questions[question]
        chosen = self.selections[layer].indices[asked.place]
        return bool((chosen == asked.record // self.block_size).any())

    @property
    def best_layer(self) -> int:
        """The layer that finds the most pictures."""
        asked = range(len(self.document.questions))
        counts = [sum(self.finds(n, q) for q in asked) for n in range(len(self.selections))]
        return int(np.argmax(counts))


@lru_cache
def read() -> Read:
    """Let the model read the document, and compute scores and selections from its index vectors.

    >>> found = read()
    >>> [found.finds(found.best_layer, question) for question in range(RECORDS)]
    [True, True, True]
    """
    model = load_trained(backend="torch")
    (document,) = unseen_documents(TOKENS, RECORDS, RECORDS, 1)
    heard: list[tuple[np.ndarray, np.ndarray]] = []

    def hear(branch: IndexBranch, given: Any, made: tuple[torch.Tensor, torch.Tensor]) -> None:
        q_idx, k_idx = made
        heard.append((q_idx.numpy(), k_idx.numpy()))

    for module in model.modules():
        if isinstance(module, IndexBranch):
            module.register_forward_hook(hear)
    vision = model.config.vision
    assert vision is not None
    pixels = torch.as_tensor(document.images, dtype=torch.float32)
    with torch.no_grad():
        model(torch.as_tensor(document.tokens), images=cut(pixels[:, None, None], vision))
    config, tokens = model.config.msa, len(document.tokens)
    scores = [score_blocks(q, k, Sequences.one(tokens, tokens), config) for q, k in heard]
    return Read(document, config.block_size, scores, [select_blocks(s, config) for s in scores])


def letters(document: Document) -> list[str]:
    """Each token as HTML: a letter, or a picture."""
    pictures = iter(range(len(document.images)))
    return [
        digit(next(pictures)) if token == IMAGE_TOKEN
        else escape(chr(token)) if 32 <= token < 127 else " " if token in b"\n\t" else "·"
        for token in document.tokens.tolist()
    ]  # fmt: skip


def bar(score: float, low: float, high: float) -> float:
    """Length in percent: 0 for the worst visible block, 100 for the best."""
    return 100 * (score - low) / (high - low) if high > low else 100.0


def numbers(found: Read) -> dict[str, Any]:
    """The data of the script: scores of visible blocks, times ten, and the selected blocks."""
    places = range(len(found.document.tokens))
    return {
        "block": found.block_size,
        "layers": [
            {
                "scores": [
                    np.round(10 * s.values[i, :, : i // found.block_size + 1]).astype(int).tolist()
                    for i in places
                ],
                "chosen": [[row[row >= 0].tolist() for row in rows] for rows in sel.indices],
            }
            for s, sel in zip(found.scores, found.selections)
        ],
        "questions": [{"key": q.key.decode(), "place": q.place} for q in found.document.questions],
        "start": {"layer": found.best_layer, "query": found.document.questions[0].place},
    }


def block_card(b: int, data: dict[str, Any], tokens: list[str]) -> str:
    """One block: its text, and for each group its score and whether it is read."""
    layer, query = data["layers"][data["start"]["layer"]], data["start"]["query"]
    scores, chosen = layer["scores"][query], layer["chosen"][query]
    seen = b < len(scores[0])
    classes = ["w-block", *(f"w-read{r}" for r in range(2) if b in chosen[r])]
    first = b * data["block"]
    spans = "".join(
        f'<span data-token="{j}"{" class=w-query" if j == query else ""}>{tokens[j]}</span>'
        for j in range(first, first + data["block"])
    )
    bars = "".join(
        f'<i class="w-score"><b data-bar="{r}.{b}" style="width:'
        f'{bar(row[b], min(row), max(row)) if seen else 0:.0f}%"></b></i>'
        f'<u data-cell="{r}.{b}">{f"{row[b] / 10:.1f}" if seen else ""}</u>'
        for r, row in enumerate(scores)
    )
    return (
        f'<div class="{" ".join(classes + ([] if seen else ["w-later"]))}" data-block="{b}">'
        f"<small>block {b}</small><code>{spans}</code>{bars}</div>"
    )


def rows_widget(caption: str) -> str:
    """The widget of chapter 3, with the first question chosen."""
    found = read()
    data, tokens = numbers(found), letters(found.document)
    cards = "".join(block_card(b, data, tokens) for b in range(TOKENS // found.block_size))
    pictures = "".join(symbol(n, picture) for n, picture in enumerate(found.document.images))
    static = (
        '<svg width="0" height="0" style="position:absolute" aria-hidden="true"><defs>'
        f'{pictures}</defs></svg><p class="w-legend"><i class="w-key w-index"></i> read by group 0 '
        f'<i class="w-key w-main"></i> read by group 1</p><div class="w-blocks">{cards}</div>'
    )
    return widget("rows", data, static, caption)
