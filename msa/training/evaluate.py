"""How well a model reads unseen documents: its loss on prose, and its answers by distance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from msa.model.attention import Mode
from msa.model.model import IGNORE, Model
from msa.training.documents import (
    QUESTION,
    RECORD,
    Document,
    check_document,
    pack,
    vision_of,
    world,
    write_document,
)


@dataclass(frozen=True)
class Reading:
    """The results of reading some documents."""

    prose: float
    """Mean cross-entropy of a byte of prose, in nats."""
    right: Bool[Tensor, " questions"]
    """Whether the likeliest token was the right digit. A random digit is right for a tenth."""
    distances: Int[Tensor, " questions"]
    """The number of tokens from each picture to its question."""
    depths: Float[Tensor, " questions"]
    """The position of each picture in its document, from 0 (start) to 1 (end)."""

    def by_depth(self, parts: int) -> list[tuple[int, int]]:
        """The numbers of right answers and of questions, for equal parts of a document.

        >>> asked = torch.tensor([True, False]), torch.tensor([10, 500]), torch.tensor([0.3, 0.9])
        >>> Reading(1.0, *asked).by_depth(4)
        [(0, 0), (1, 1), (0, 0), (0, 1)]
        """
        part = (self.depths * parts).long()
        asked = torch.bincount(part, minlength=parts)
        right = torch.bincount(part[self.right], minlength=parts)
        return list(zip(right.tolist(), asked.tolist()))

    def accuracy(self, nearest: int = 0, farthest: int | None = None) -> float | None:
        """The share of right answers where nearest <= distance < farthest; None without questions.

        >>> asked = torch.tensor([True, False]), torch.tensor([10, 500]), torch.tensor([0.9, 0.1])
        >>> reading = Reading(1.0, *asked)
        >>> reading.accuracy(), reading.accuracy(100), reading.accuracy(1000)
        (0.5, 0.0, None)
        """
        chosen = self.distances >= nearest
        if farthest is not None:
            chosen &= self.distances < farthest
        return float(self.right[chosen].float().mean()) if bool(chosen.any()) else None

    def summary(self, budget: int) -> dict[str, float | None]:
        """The results as numbers. A question is near if its distance is below `budget`."""
        return {
            "prose": self.prose, "answers": self.accuracy(),
            "near": self.accuracy(0, budget), "far": self.accuracy(budget),
        }  # fmt: skip


def unseen_documents(
    length: int, records: int, questions: int, count: int, seed: int = 0
) -> list[Document]:
    """Documents of the test side. The same arguments give the same documents.

    Raises:
        TypeError, ValueError: more records, questions or prose than a document of this length, or
            the test side, can have.
    """
    check_documents(length, records, questions)
    rng = np.random.default_rng([seed, length])
    return [write_document(world("test"), length, records, questions, rng) for _ in range(count)]


def check_documents(length: int, records: int, questions: int, name: str = "length") -> None:
    """The test side has enough prose and keys for such documents. Messages call the length `name`.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.
    """
    check_document(length, records, questions, name)
    test, prose = world("test"), length - records * RECORD - questions * QUESTION
    if records > len(test.keys):
        raise ValueError(
            f"records must be at most {len(test.keys):,}, the number of keys, got {records}"
        )
    if prose > len(test.prose):
        raise ValueError(
            f"{name} must be at most {length - prose + len(test.prose):,}, for there are "
            f"{len(test.prose):,} bytes of such prose, got {length}"
        )


@torch.no_grad()
def read_documents(
    model: Model, documents: Sequence[Document], *, mode: Mode = "sparse", half: bool = False,
    at_once: int = 8,
) -> Reading:  # fmt: skip
    """Let a model read documents, `at_once` at a time. Its training mode is left as it was."""
    device, was_training = model.embed.weight.device, model.training
    vision = vision_of(model.config)
    model.eval()
    losses: list[Tensor] = []
    right: list[Tensor] = []
    distances: list[Tensor] = []
    for start in range(0, len(documents), at_once):
        batch = pack(list(documents[start : start + at_once]), vision, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            logits = model(batch.tokens, batch.cu_seqlens, images=batch.images, mode=mode).logits
        prose = batch.targets.index_fill(0, batch.places, IGNORE)
        each = F.cross_entropy(logits.float(), prose, ignore_index=IGNORE, reduction="none")
        losses.append(each[prose != IGNORE])
        right.append(logits[batch.places].argmax(-1) == batch.digits + ord("0"))
        distances.append(batch.distances)
    depths = [q.record / len(document.tokens) for document in documents for q in document.questions]
    model.train(was_training)
    return Reading(
        float(torch.cat(losses).mean()),
        torch.cat(right).cpu(),
        torch.cat(distances).cpu(),
        torch.tensor(depths),
    )
