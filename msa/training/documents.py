"""The task and its batches: pictures of digits, hidden under keys in prose, with questions.

    ... for the loop to en[QKZ#]d early, and an else clause ... ?QKZ=7?BEM=2

The prose is Python's own reference, as bytes. # is one token. The vision tower puts a picture of a
digit in its place (scikit-learn's `load_digits`). A question names a key, and its answer is the
digit in the picture of that key. So a model has to learn to read pictures, and to find the picture
of a key at any distance. Training and test share no picture, no key and no 32 consecutive bytes of
prose (`prose.py`).
"""

from __future__ import annotations

import string
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from msa.checks import check_count
from msa.model.config import ModelConfig, VisionConfig
from msa.model.model import IGNORE
from msa.model.vision import Pictures, cut
from msa.parallel import Shards
from msa.parallel.groups import Group, rank_and_count
from msa.training.prose import TEST_SHARE, Side, own_prose

IMAGE_TOKEN, VOCABULARY = 256, 257
KEY_LETTERS = 3
RECORD = len("[QKZ#]")
"""The tokens of a record: a picture and its key."""
QUESTION = len("?QKZ=7")
"""The tokens of a question and its answer."""


@dataclass(frozen=True)
class World:
    """The prose, pictures and keys of one side of the split."""

    prose: Int[np.ndarray, " bytes"]
    images: Float[np.ndarray, "n 8 8"]
    """From -1 (paper) to 1 (ink)."""
    labels: Int[np.ndarray, " n"]
    keys: tuple[bytes, ...]


@dataclass(frozen=True)
class Question:
    """A question of a document, and the picture that answers it."""

    key: bytes
    place: int
    """The position of the "=" token. The next token is the answer."""
    record: int
    """The position of the picture that answers it."""
    digit: int

    @property
    def distance(self) -> int:
        """The number of tokens from the picture to the question."""
        return self.place - self.record


@dataclass(frozen=True)
class Document:
    """A document: prose with records in it, and questions at its end."""

    tokens: Int[np.ndarray, " T"]
    images: Float[np.ndarray, "n 8 8"]
    """In the order of their tokens."""
    questions: tuple[Question, ...]
    is_prose: np.ndarray
    """Whether a token is prose and follows prose. These tokens are targets of the language loss."""


@cache
def world(side: Side) -> World:
    """The training side or the test side. They have nothing in common.

    A fixed permutation splits pictures and keys. Prose is split by its content.

    >>> train, test = world("train"), world("test")
    >>> len(train.keys), len(test.keys), len(train.images), len(test.images)
    (14061, 3515, 1438, 359)
    """
    from sklearn.datasets import load_digits

    rng = np.random.default_rng(0)
    keys = ["".join(letters).encode() for letters in product(string.ascii_uppercase, repeat=3)]
    images, labels = load_digits(return_X_y=True)
    order, key_order = rng.permutation(len(images)), rng.permutation(len(keys))
    cuts = (int(len(things) * TEST_SHARE) for things in (images, keys))
    part = [slice(cut, None) if side == "train" else slice(0, cut) for cut in cuts]
    return World(
        prose=np.frombuffer(own_prose()[side], np.uint8).astype(np.int64),
        images=(images.reshape(-1, 8, 8) / 8.0 - 1.0)[order[part[0]]].astype(np.float32),
        labels=labels[order[part[0]]],
        keys=tuple(keys[i] for i in key_order[part[1]]),
    )


def write_document(
    world: World, length: int, records: int, questions: int, rng: np.random.Generator
) -> Document:
    """A document of exactly `length` tokens.

    Raises:
        TypeError, ValueError: more questions than records, or no room for at least a byte of prose.

    >>> from dataclasses import replace
    >>> dots = replace(world("test"), prose=np.full(100, ord(".")))
    >>> document = write_document(dots, 60, 2, 1, np.random.default_rng(0))
    >>> "".join("#" if t == IMAGE_TOKEN else chr(t) for t in document.tokens)
    '[UBB#].......[CCD#]...................................?CCD=6'
    """
    check_document(length, records, questions)
    n = length - records * RECORD - questions * QUESTION
    start = rng.integers(len(world.prose) - n + 1)
    prose = world.prose[start : start + n]
    keys = [world.keys[i] for i in rng.choice(len(world.keys), records, replace=False)]
    pictures = rng.choice(len(world.images), records, replace=records > len(world.images))
    gaps = np.sort(rng.integers(0, n + 1, records))  # each record stands before this byte of prose

    tokens: list[int] = []
    is_prose: list[bool] = []
    places: list[int] = []
    for key, begin, end in zip([b"", *keys], [0, *gaps], [*gaps, n]):
        if key:
            places.append(len(tokens) + 1 + KEY_LETTERS)
            tokens += record_tokens(key)
            is_prose += [False] * RECORD
        tokens += prose[begin:end].tolist()
        is_prose += ([False] + [True] * (end - begin - 1))[: end - begin]
    asked: list[Question] = []
    for i in rng.choice(records, questions, replace=False):
        digit = int(world.labels[pictures[i]])
        tokens += [*question_tokens(keys[i]), ord("0") + digit]
        asked.append(Question(keys[i], len(tokens) - 2, places[i], digit))
    is_prose += [False] * (questions * QUESTION)
    return Document(
        np.array(tokens), world.images[pictures], tuple(asked), np.array(is_prose, bool)
    )


def record_tokens(key: bytes) -> list[int]:
    """The tokens of a picture and its key."""
    return [ord("["), *key, IMAGE_TOKEN, ord("]")]


def question_tokens(key: bytes) -> list[int]:
    """The tokens of a question, without its answer."""
    return [ord("?"), *key, ord("=")]


@dataclass(frozen=True)
class Batch:
    """Documents of one length, packed, in the form that a model takes."""

    tokens: Int[Tensor, " T"]
    targets: Int[Tensor, " T"]
    weights: Float[Tensor, " T"]
    """The weights of the prose in a batch sum to 1, those of the answers to `pack`'s `answers`."""
    cu_seqlens: tuple[int, ...]
    images: Pictures
    places: Int[Tensor, " questions"]
    """The packed positions of the "=" of each question."""
    digits: Int[Tensor, " questions"]
    distances: Int[Tensor, " questions"]

    def part(self, number: int, parts: int) -> Batch:
        """One of `parts` shares of the documents, of nearly the same size, with their weights.

        With fewer documents than parts, some parts are empty.
        """
        if parts == 1:
            return self
        documents = len(self.cu_seqlens) - 1
        first, last = (documents * n // parts for n in (number, number + 1))
        start, stop = self.cu_seqlens[first], self.cu_seqlens[last]
        asked = (self.places >= start) & (self.places < stop)
        borders = tuple(border - start for border in self.cu_seqlens[first : last + 1])
        own = self.rows(torch.arange(start, stop, device=self.tokens.device))
        return replace(
            own, cu_seqlens=borders, places=self.places[asked] - start, digits=self.digits[asked],
            distances=self.distances[asked],
        )  # fmt: skip

    def sharded(self, group: Group, block_size: int) -> Batch:
        """The tokens of this process, in a group that reads the batch together."""
        rank, count = rank_and_count(group)
        shards = Shards(self.cu_seqlens, count, block_size)
        return self.rows(shards.tokens(rank, self.tokens.device))

    def rows(self, tokens: Int[Tensor, " rows"]) -> Batch:
        """Some tokens, by their packed positions, and the pictures in them.

        Borders and questions stay those of the whole batch.
        """
        patches, grids = self.images.patches, self.images.grids
        each = len(patches) // max(1, len(grids))
        is_image = self.tokens == IMAGE_TOKEN
        seen = (is_image.cumsum(0) - 1)[tokens][is_image[tokens]]
        pictures = Pictures(
            patches.unflatten(0, (-1, each))[seen].flatten(0, 1) if len(grids) else patches,
            [grids[i] for i in seen.tolist()],
        )
        return replace(
            self, tokens=self.tokens[tokens], targets=self.targets[tokens],
            weights=self.weights[tokens], images=pictures,
        )  # fmt: skip


def pack(
    documents: list[Document], config: VisionConfig, answers: float = 1.0,
    device: torch.device | str = "cpu",
) -> Batch:  # fmt: skip
    """Pack documents into a batch. `answers` is the weight of all answers together."""
    borders = np.cumsum([0, *(len(d.tokens) for d in documents)])
    tokens = np.concatenate([d.tokens for d in documents])
    prose = np.concatenate([d.is_prose for d in documents])
    asked = [(start, q) for start, d in zip(borders, documents) for q in d.questions]
    places = np.array([start + q.place for start, q in asked], np.int64)
    targets, weights = np.full(len(tokens), IGNORE), np.zeros(len(tokens), np.float32)
    (predicted,) = np.nonzero(prose)
    targets[predicted - 1] = tokens[predicted]
    weights[predicted - 1] = 1.0 / max(1, len(predicted))
    targets[places] = tokens[places + 1]
    weights[places] = answers / max(1, len(places))
    pixels = torch.from_numpy(np.concatenate([d.images for d in documents])).to(device)
    return Batch(
        tokens=torch.from_numpy(tokens).to(device),
        targets=torch.from_numpy(targets).to(device),
        weights=torch.from_numpy(weights).to(device),
        cu_seqlens=tuple(borders.tolist()),
        images=cut(pixels[:, None, None], config),
        places=torch.from_numpy(places).to(device),
        digits=torch.tensor([q.digit for _, q in asked], device=device),
        distances=torch.tensor([q.distance for _, q in asked], device=device),
    )


def vision_of(config: ModelConfig) -> VisionConfig:
    """The sizes of the vision tower.

    Raises:
        ValueError: a model without a vision tower, which cannot read documents.
    """
    if config.vision is None:
        raise ValueError("vision must be given in a model that reads documents, got None")
    return config.vision


def check_document(length: int, records: int, questions: int, name: str = "length") -> None:
    """There are at most as many questions as records, and at least a byte of prose.

    Messages call the length `name`.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.
    """
    for what, value in ((name, length), ("records", records), ("questions", questions)):
        check_count(what, value, 1)
    if questions > records:
        raise ValueError(f"questions must be at most records = {records}, got {questions}")
    least = records * RECORD + questions * QUESTION + 1
    if length < least:
        raise ValueError(
            f"{name} must be at least {least} for {records} records and {questions} questions, "
            f"got {length}"
        )
