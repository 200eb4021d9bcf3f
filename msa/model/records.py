"""The task: real pictures of digits, hidden under keys in real prose, and asked for at the end.

    ... for the loop to en[QKZ#]d early, and an else clause ... ?QKZ=7?BEM=2

The prose is that of Python's own reference, as bytes; # is one token, in whose place the vision
tower puts a handwritten digit (scikit-learn's `load_digits`). What a model has to learn: to read
pictures, and to find the one whose key it is asked for, however far back it stands. Training and
test share no picture, no key and no 32 bytes of prose in a row (`prose.py`).
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from msa.model import checks
from msa.model.config import VisionConfig
from msa.model.model import IGNORE
from msa.model.prose import TEST_SHARE, Side, own_prose
from msa.model.vision import Pictures, cut

IMAGE_TOKEN, VOCABULARY = 256, 257
KEY_LETTERS = 3
RECORD = len("[QKZ#]")
QUESTION = len("?QKZ=7")


@dataclass(frozen=True)
class World:
    """One side of the split: what documents are made of."""

    prose: Int[np.ndarray, " bytes"]
    images: Float[np.ndarray, "n 8 8"]
    """From -1 (paper) to 1 (ink)."""
    labels: Int[np.ndarray, " n"]
    keys: tuple[bytes, ...]


@dataclass(frozen=True)
class Question:
    """Where it is answered, and where the record lies."""

    key: bytes
    place: int
    """Of the "=": the token whose successor is the answer."""
    record: int
    """Of the picture that answers it."""
    digit: int

    @property
    def distance(self) -> int:
        """How many tokens back the picture stands."""
        return self.place - self.record


@dataclass(frozen=True)
class Document:
    """Tokens, the pictures in the order of their tokens, and the questions at the end."""

    tokens: Int[np.ndarray, " T"]
    images: Float[np.ndarray, "n 8 8"]
    questions: tuple[Question, ...]
    is_prose: np.ndarray
    """Which tokens are prose and follow on prose: those that can be foretold."""


@cache
def world(side: Side) -> World:
    """The training or the test side; they share nothing.

    Pictures and keys are split by a fixed permutation, prose by its content.

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
        TypeError, ValueError: more questions than records, or no room for prose between them.

    >>> from dataclasses import replace
    >>> dots = replace(world("test"), prose=np.full(100, ord(".")))
    >>> document = write_document(dots, 60, 2, 1, np.random.default_rng(0))
    >>> "".join("#" if t == IMAGE_TOKEN else chr(t) for t in document.tokens)
    '[UBB#].......[CCD#]...................................?CCD=6'
    """
    checks.check_document(length, records, questions, RECORD, QUESTION)
    n = length - records * RECORD - questions * QUESTION
    start = rng.integers(len(world.prose) - n + 1)
    prose = world.prose[start : start + n]
    keys = [world.keys[i] for i in rng.choice(len(world.keys), records, replace=False)]
    pictures = rng.choice(len(world.images), records, replace=records > len(world.images))
    gaps = np.sort(rng.integers(0, n + 1, records))  # before which byte of prose each record stands

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
    """A hidden picture under its key."""
    return [ord("["), *key, IMAGE_TOKEN, ord("]")]


def question_tokens(key: bytes) -> list[int]:
    """What the answer follows on."""
    return [ord("?"), *key, ord("=")]


@dataclass(frozen=True)
class Batch:
    """Documents of one length, packed, as a model takes them."""

    tokens: Int[Tensor, " T"]
    targets: Int[Tensor, " T"]
    weights: Float[Tensor, " T"]
    """All prose of a batch weighs 1, and so do all of its answers, times what was asked for."""
    cu_seqlens: tuple[int, ...]
    images: Pictures
    places: Int[Tensor, " questions"]
    """Packed places of the questions' "="."""
    digits: Int[Tensor, " questions"]
    distances: Int[Tensor, " questions"]

    def part(self, number: int, parts: int) -> Batch:
        """One of `parts` shares of the documents, alike in size; their weights stay as they are.

        There may be fewer documents than parts: then some have none.
        """
        if parts == 1:
            return self
        documents = len(self.cu_seqlens) - 1
        first, last = (documents * n // parts for n in (number, number + 1))
        start, stop = self.cu_seqlens[first], self.cu_seqlens[last]
        patches, grids = self.images.patches, self.images.grids
        seen = [int((self.tokens[:border] == IMAGE_TOKEN).sum()) for border in (start, stop)]
        each = len(patches) // len(grids)
        asked = (self.places >= start) & (self.places < stop)
        return Batch(
            tokens=self.tokens[start:stop],
            targets=self.targets[start:stop],
            weights=self.weights[start:stop],
            cu_seqlens=tuple(border - start for border in self.cu_seqlens[first : last + 1]),
            images=Pictures(patches[each * seen[0] : each * seen[1]], grids[slice(*seen)]),
            places=self.places[asked] - start,
            digits=self.digits[asked],
            distances=self.distances[asked],
        )


def pack(
    documents: list[Document], config: VisionConfig, answers: float = 1.0,
    device: torch.device | str = "cpu",
) -> Batch:  # fmt: skip
    """Documents one behind the other."""
    borders = np.cumsum([0, *(len(d.tokens) for d in documents)])
    tokens = np.concatenate([d.tokens for d in documents])
    prose = np.concatenate([d.is_prose for d in documents])
    asked = [(start, q) for start, d in zip(borders, documents) for q in d.questions]
    places = np.array([start + q.place for start, q in asked], np.int64)
    targets, weights = np.full(len(tokens), IGNORE), np.zeros(len(tokens), np.float32)
    (foretold,) = np.nonzero(prose)
    targets[foretold - 1] = tokens[foretold]
    weights[foretold - 1] = 1.0 / max(1, len(foretold))
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
