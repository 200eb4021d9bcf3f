"""Questions to a document with hidden pictures, and their answers by dense attention and by MSA."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from msa.demo.answers import Answer, answer
from msa.model.model import Model
from msa.training.documents import IMAGE_TOKEN


@dataclass(frozen=True)
class DemoQuestion:
    """A question to a document, and the picture that answers it."""

    key: str
    tokens: Int[np.ndarray, " T"]
    """The tokens that the model reads: up to this question, or more."""
    place: int
    """The position of the "=" token. The next token is the answer."""
    record: int
    """The position of the picture that answers it."""
    right: int | None
    """The digit in the picture, if it is known."""

    @property
    def distance(self) -> int:
        """The number of tokens from the picture to the question."""
        return self.place - self.record

    @property
    def picture(self) -> int:
        """The number of the picture among those of the document."""
        return int((self.tokens[: self.record] == IMAGE_TOKEN).sum())

    def mark(self, answer: Answer) -> str:
        """✓ for a right answer, ✗ for a wrong one, nothing if the right answer is not known."""
        return "" if self.right is None else "✓" if answer.digit == self.right else "✗"


@dataclass(frozen=True)
class Comparison:
    """Questions, and for each of them the answer by dense attention and the answer by MSA."""

    questions: tuple[DemoQuestion, ...]
    images: Float[np.ndarray, "n 8 8"]
    """The pictures of the document, in their order."""
    dense: list[Answer]
    sparse: list[Answer]
    block_size: int
    seconds: tuple[float, float]
    """The time to read, by dense attention and by MSA."""

    @property
    def tokens(self) -> int:
        """The number of tokens of the longest question, with its document."""
        return max(len(question.tokens) for question in self.questions)

    @property
    def known(self) -> bool:
        """Whether the right answers are known."""
        return all(question.right is not None for question in self.questions)

    @property
    def keys(self) -> tuple[float, float]:
        """The mean number of keys read for an answer: by dense attention, and by MSA."""
        n = len(self.questions)
        return sum(a.keys for a in self.dense) / n, sum(a.keys for a in self.sparse) / n

    def right(self, answers: list[Answer]) -> int:
        """The number of right answers among these."""
        return sum(a.digit == q.right for a, q in zip(answers, self.questions))


def compare(
    model: Model, images: Float[np.ndarray, "n 8 8"], questions: Sequence[DemoQuestion]
) -> Comparison:
    """Let a model read all questions twice: by dense attention and by MSA.

    Questions to the same tokens are answered in one reading.
    """
    readings: dict[int, list[DemoQuestion]] = {}
    for question in questions:
        readings.setdefault(id(question.tokens), []).append(question)
    answers: dict[str, list[Answer]] = {}
    seconds: list[float] = []
    for mode in ("dense", "sparse"):
        started = time.perf_counter()
        answers[mode] = [
            said
            for asked in readings.values()
            for said in answer(model, asked[0].tokens, images, [q.place for q in asked], mode)
        ]
        seconds.append(time.perf_counter() - started)
    return Comparison(
        tuple(question for asked in readings.values() for question in asked), images,
        answers["dense"], answers["sparse"], model.config.msa.block_size, (seconds[0], seconds[1]),
    )  # fmt: skip
