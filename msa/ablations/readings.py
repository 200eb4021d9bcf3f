"""The readings of one trained model: its answers, its index, other budgets, longer documents."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from msa import recall
from msa.ablations.rows import LINES
from msa.config import MSAConfig
from msa.model.attention import Mode, Seen
from msa.model.model import Model
from msa.training.documents import Document, pack, vision_of
from msa.training.evaluate import read_documents, unseen_documents
from msa.training.presets import TINY

QUESTIONS = 8
LENGTHS = (512, 1024, 2048, 4096, 8192)
"""Lengths of unseen documents in tokens. All rows are compared at the first, the longest length in
training."""
LONG = 8
"""The number of documents of each longer length, and of documents for the index."""
BUDGETS = (1, 2, 3, 5, 8, 16)
"""The values of k with which the base model is read."""
NEAR = TINY.model.msa.top_k * TINY.model.msa.block_size
"""A question is near if its picture is less than this many tokens back, in every row."""


def read_model(name: str, model: Model, documents: int) -> dict[str, Any]:
    """All readings of the model of the row `name`. Numbers that are not finite are None."""
    own, short = model.config.msa, unseen(LENGTHS[0], documents)
    found: dict[str, Any] = {
        **measure_answers(model, short), **measure_index(model, short[:LONG]),
    }  # fmt: skip
    found["budgets"] = [
        {"k": k, **measure_answers(with_config(model, replace(own, top_k=k)), short)}
        for k in (BUDGETS if name == "base" else ())
    ]
    found["lengths"] = [
        {"tokens": n, "how": how, **measure_answers(way, unseen(n, LONG), mode)}
        for row, how in LINES
        if row == name
        for way, mode in [attending(model, how)]
        for n in LENGTHS
    ]
    return found


def attending(model: Model, how: str) -> tuple[Model, Mode]:
    """The same weights, attending to all tokens, to the selected blocks, or to the last blocks."""
    if how == "window":
        own = model.config.msa
        model = with_config(model, replace(own, local_blocks=own.top_k - own.sink_blocks))
    return model, "dense" if how == "dense" else "sparse"


def with_config(model: Model, config: MSAConfig) -> Model:
    """The same weights with another configuration of MSA."""
    other = Model(replace(model.config, msa=config), backend=model.backend)
    other.load_state_dict(model.state_dict())
    return other.eval()


def unseen(length: int, count: int) -> list[Document]:
    """Unseen documents with eight pictures. All of them are asked for."""
    return unseen_documents(length, QUESTIONS, QUESTIONS, count)


def measure_answers(
    model: Model, documents: list[Document], mode: Mode = "sparse"
) -> dict[str, float | None]:
    """The loss on prose and the shares of right answers, near and far."""
    at_once = max(1, TINY.schedule.tokens // len(documents[0].tokens))
    summary = read_documents(model, documents, mode=mode, at_once=at_once).summary(NEAR)
    return {name: finite(value) for name, value in summary.items()}


@torch.no_grad()
def measure_index(model: Model, documents: list[Document]) -> dict[str, float | None]:
    """The loss of the index and its recall, as means over the layers.

    They are None for a dense model. A window has a recall, but no loss.
    """
    config, seen = model.config, list[Seen]()
    if "msa" not in config.attention:
        return {"kl": None, "block_recall": None, "score_recall": None}
    batch = pack(documents, vision_of(config))
    kl = model(
        batch.tokens, batch.cu_seqlens, images=batch.images, align=True, watch=seen.append
    ).kl  # fmt: skip
    recalls = [recall.measure(s.q, s.k, s.selection, s.softmax_scale) for s in seen]
    chooses = config.msa.forced_blocks < config.msa.top_k
    return {
        "kl": finite(float(kl)) if chooses and kl is not None else None,
        "block_recall": sum(r.blocks for r in recalls) / len(recalls),
        "score_recall": finite(sum(r.score for r in recalls) / len(recalls)),
    }


def finite(value: float | None) -> float | None:
    """The value, or None if it is not finite: JSON has no NaN.

    >>> finite(0.5), finite(math.nan), finite(None)
    (0.5, None, None)
    """
    return value if value is not None and math.isfinite(value) else None
