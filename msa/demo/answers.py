"""The answers of a model at some positions of a document, and the blocks that it read for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

import msa
from msa.model.attention import Mode, Seen
from msa.model.model import Model
from msa.model.vision import cut
from msa.training.documents import vision_of


@dataclass(frozen=True)
class Answer:
    """The answer of a model at one position of a document."""

    place: int
    """The position of the token before the answer."""
    digit: int
    """The most probable of the ten digits."""
    chance: float
    """The probability of this digit among all tokens."""
    opened: Bool[Tensor, "layers groups blocks"] | None
    """The blocks that each MSA layer read for each group; None if it read all tokens."""
    keys: float
    """The number of keys that were read, as a mean over layers and groups."""


@torch.no_grad()
def answer(
    model: Model, tokens: Int[np.ndarray, " T"], images: Float[np.ndarray, "n 8 8"],
    places: Sequence[int], mode: Mode = "sparse",
) -> list[Answer]:  # fmt: skip
    """Let a model read a document once. Returns its answer at each of the places.

    >>> from msa.model.checkpoint import load_trained
    >>> from msa.training.evaluate import unseen_documents
    >>> (document,) = unseen_documents(100, records=2, questions=1, count=1)
    >>> (question,) = document.questions
    >>> (found,) = answer(load_trained(), document.tokens, document.images, [question.place])
    >>> found.digit == question.digit, found.opened.shape  # 100 tokens are 7 blocks of 16
    (True, torch.Size([3, 2, 7]))
    """
    device = model.embed.weight.device
    vision = vision_of(model.config)
    pixels = torch.as_tensor(images, dtype=torch.float32, device=device)
    opened: list[Tensor] = []
    keys: list[Tensor] = []

    def watch(seen: Seen) -> None:
        opened.append(blocks_of(seen.selection, places).cpu())
        keys.append(keys_of(seen.selection)[list(places)].cpu())

    logits = model(
        torch.as_tensor(tokens, device=device), images=cut(pixels[:, None, None], vision),
        mode=mode, watch=watch,
    ).logits[list(places)]  # fmt: skip
    chances = logits.float().softmax(-1).cpu()
    digits = chances[:, ord("0") : ord("9") + 1].argmax(-1).tolist()
    return [
        Answer(
            place, digit, float(chances[i, ord("0") + digit]),
            opened=torch.stack([layer[i] for layer in opened]) if opened else None,
            keys=torch.stack([n[i] for n in keys]).float().mean().item() if keys else place + 1.0,
        )
        for i, (place, digit) in enumerate(zip(places, digits))
    ]  # fmt: skip


def blocks_of(
    selection: msa.Selection, places: Sequence[int]
) -> Bool[Tensor, "places groups blocks"]:
    """The blocks of one sequence that the queries at these places read, as a mask.

    >>> blocks = torch.tensor([[[0, -1]], [[0, 2]]], dtype=torch.int32)
    >>> blocks_of(msa.Selection(blocks, msa.Sequences.one(2, 5), block_size=2), [1]).tolist()
    [[[True, False, True]]]
    """
    indices = torch.as_tensor(selection.indices)[list(places)].long()
    blocks = selection.sequences.max_blocks(selection.block_size)
    ids = torch.arange(blocks, device=indices.device)
    return (indices[..., None] == ids).any(-2)


def keys_of(selection: msa.Selection) -> Int[Tensor, "Tq Hkv"]:
    """The number of visible keys in the blocks of each query and group (R3).

    The own block of a query is often visible in part only.

    >>> blocks = torch.tensor([[[0, -1]], [[0, 2]]], dtype=torch.int32)
    >>> keys_of(msa.Selection(blocks, msa.Sequences.one(2, 5), block_size=2)).flatten().tolist()
    [2, 3]
    """
    indices = torch.as_tensor(selection.indices)
    positions = torch.tensor(selection.sequences.positions(), device=indices.device)
    visible = positions[:, None, None] + 1 - indices * selection.block_size
    return visible.clamp(0, selection.block_size).where(indices >= 0, 0).sum(-1)
