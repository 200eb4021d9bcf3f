"""How well a model reads documents that it has never seen: prose, and answers by distance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from msa.model import checks
from msa.model.attention import Mode
from msa.model.model import IGNORE, Model
from msa.model.records import QUESTION, RECORD, Document, pack, world, write_document


@dataclass(frozen=True)
class Reading:
    """What came of reading some documents."""

    prose: float
    """Mean cross-entropy of a byte of prose, in nats."""
    right: Bool[Tensor, " questions"]
    """Whether the likeliest token was the digit asked for. Of ten digits, chance is a tenth."""
    distances: Int[Tensor, " questions"]
    """How many tokens before its question each picture stands."""
    depths: Float[Tensor, " questions"]
    """Where in its document each picture stands, from 0 to 1."""

    def by_depth(self, parts: int) -> list[tuple[int, int]]:
        """For equal parts of a document: right answers and questions.

        >>> asked = torch.tensor([True, False]), torch.tensor([10, 500]), torch.tensor([0.3, 0.9])
        >>> Reading(1.0, *asked).by_depth(4)
        [(0, 0), (1, 1), (0, 0), (0, 1)]
        """
        part = (self.depths * parts).long()
        asked = torch.bincount(part, minlength=parts)
        right = torch.bincount(part[self.right], minlength=parts)
        return list(zip(right.tolist(), asked.tolist()))

    def accuracy(self, nearest: int = 0, farthest: int | None = None) -> float | None:
        """Over the questions whose distance is nearest <= d < farthest; None if there is none.

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
        """Near is what a window of `budget` keys would reach, far what it would not."""
        return {
            "prose": self.prose, "answers": self.accuracy(),
            "near": self.accuracy(0, budget), "far": self.accuracy(budget),
        }  # fmt: skip


def unseen_documents(
    length: int, records: int, questions: int, count: int, seed: int = 0
) -> list[Document]:
    """Documents of the test side. The same arguments give the same ones.

    Raises:
        TypeError, ValueError: more is asked for than a document of this length, or the test side,
            has room for.
    """
    check_documents(length, records, questions)
    rng = np.random.default_rng([seed, length])
    return [write_document(world("test"), length, records, questions, rng) for _ in range(count)]


def check_documents(length: int, records: int, questions: int, name: str = "length") -> None:
    """Whether the test side has such documents; `name` is what the length is called in messages."""
    checks.check_document(length, records, questions, RECORD, QUESTION, name)
    test, prose = world("test"), length - records * RECORD - questions * QUESTION
    checks.check_supply(length, records, prose, len(test.prose), len(test.keys), name)


@torch.no_grad()
def read(
    model: Model, documents: Sequence[Document], *, mode: Mode = "sparse", half: bool = False,
    at_once: int = 8,
) -> Reading:  # fmt: skip
    """Let a model read them, `at_once` at a time. It is left in the mode it was in."""
    device, was_training = model.embed.weight.device, model.training
    vision = checks.read_vision(model.config)
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
