"""The documents: the sides share nothing, and every question can be answered from the document."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msa.model.model import IGNORE
from msa.training.documents import (
    IMAGE_TOKEN,
    QUESTION,
    RECORD,
    pack,
    world,
    write_document,
)
from msa.training.evaluate import unseen_documents
from msa.training.presets import PRESETS

SIDES = {side: world(side) for side in ("train", "test")}
KEYS = {side: set(w.keys) for side, w in SIDES.items()}
IMAGES = {
    side: {image.tobytes(): int(label) for image, label in zip(w.images, w.labels)}
    for side, w in SIDES.items()
}
PROSE = {side: bytes(w.prose.tolist()) for side, w in SIDES.items()}
TOWER = PRESETS["tiny"].model.vision


@st.composite
def documents(draw):
    side = draw(st.sampled_from(["train", "test"]))
    records = draw(st.integers(1, 12))
    questions = draw(st.integers(1, records))
    length = records * RECORD + questions * QUESTION + draw(st.integers(1, 300))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    keys = SIDES[side].keys[: draw(st.sampled_from([records, records + 1, None]))]
    few = replace(SIDES[side], keys=keys)  # so few that none can be spared
    return side, records, write_document(few, length, records, questions, rng), length


def read_by_hand(document):
    """The contents of a document: {key: picture} of the records, [(key, digit)] of the questions,
    and
    the prose between them."""
    tokens, asked = document.tokens.tolist(), len(document.questions) * QUESTION
    body, end = tokens[: len(tokens) - asked], bytes(tokens[len(tokens) - asked :])
    found, prose, last = {}, [], 0
    places = [i for i, token in enumerate(body) if token == IMAGE_TOKEN]
    for place, image in zip(places, document.images):
        assert (body[place - 4], body[place + 1]) == (ord("["), ord("]"))
        found[bytes(body[place - 3 : place])] = image
        prose.append(bytes(body[last : place - 4]))
        last = place + 2
    assert len(places) == len(document.images)
    questions = [(end[i + 1 : i + 4], chr(end[i + 5])) for i in range(0, asked, QUESTION)]
    assert all(end[i : i + 1] + end[i + 4 : i + 5] == b"?=" for i in range(0, asked, QUESTION))
    return found, questions, b"".join(prose) + bytes(body[last:])


@given(documents())
def test_every_question_is_answerable(drawn):
    side, records, document, length = drawn
    found, questions, _ = read_by_hand(document)
    assert len(document.tokens) == length
    assert len(found) == records  # no key twice
    assert len({key for key, _ in questions}) == len(questions)
    for (key, digit), question in zip(questions, document.questions):
        assert key == question.key
        assert IMAGES[side][found[key].tobytes()] == int(digit) == question.digit
        tokens = document.tokens
        assert (tokens[question.place], tokens[question.record]) == (ord("="), IMAGE_TOKEN)
        assert chr(tokens[question.place + 1]) == digit
        assert bytes(tokens[question.record - 3 : question.record].tolist()) == key
        assert question.distance == question.place - question.record > 0


@given(documents())
def test_a_document_is_made_of_its_own_side_alone(drawn):
    side, _, document, _ = drawn
    other = "test" if side == "train" else "train"
    found, _, prose = read_by_hand(document)
    assert prose in PROSE[side]
    assert set(found) <= KEYS[side]
    assert not set(found) & KEYS[other]
    for image in found.values():
        assert image.tobytes() in IMAGES[side]
        assert image.tobytes() not in IMAGES[other]


def test_the_sides_share_no_key_and_no_picture_and_leave_none_out():
    assert not KEYS["train"] & KEYS["test"]
    assert len(KEYS["train"] | KEYS["test"]) == 26**3
    assert not IMAGES["train"].keys() & IMAGES["test"].keys()
    assert sum(len(w.images) for w in SIDES.values()) == 1797


def test_a_batch_asks_for_prose_and_answers_alone():
    written = unseen_documents(200, 3, 2, 4)
    batch = pack(written, TOWER, answers=0.5)
    tokens, targets = batch.tokens, batch.targets
    assert batch.cu_seqlens == (0, 200, 400, 600, 800)
    known = targets != IGNORE
    assert torch.equal(targets[known], tokens.roll(-1)[known])
    assert torch.equal(known, batch.weights > 0)
    answers = torch.zeros_like(known)
    answers[batch.places] = True
    assert batch.weights[answers].sum() == pytest.approx(0.5)
    assert batch.weights[known & ~answers].sum() == pytest.approx(1.0)
    assert torch.equal(tokens[batch.places + 1] - ord("0"), batch.digits)
    asked = [q for document in written for q in document.questions]
    assert batch.distances.tolist() == [q.distance for q in asked]
    for start, document in zip(batch.cu_seqlens, written):
        text, own = document.tokens, known[start : start + 200]
        followed = np.nonzero(own.numpy())[0] + 1
        pictures = np.nonzero(text == IMAGE_TOKEN)[0]
        unforeseen = {j for i in pictures for j in range(i - 4, i + 3)}  # and the byte behind it
        unforeseen |= set(range(len(text) - 2 * QUESTION, len(text)))
        unforeseen -= {q.place + 1 for q in document.questions}
        assert set(followed.tolist()) == set(range(1, len(text))) - unforeseen
    assert len(batch.images.grids) == 12
    again = pack(unseen_documents(200, 3, 2, 4), TOWER, answers=0.5)
    assert torch.equal(again.tokens, tokens)
    assert not torch.equal(pack(unseen_documents(200, 3, 2, 4, seed=1), TOWER).tokens, tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"questions": 3}, "questions must be at most records = 2, got 3"),
        ({"length": 18}, "length must be at least 19 for 2 records and 1 questions, got 18"),
        ({"records": 0}, "records must be at least 1, got 0"),
    ],
)
def test_documents_that_cannot_be_are_named(change, message):
    given = {"length": 40, "records": 2, "questions": 1} | change
    with pytest.raises(ValueError, match=message):
        write_document(SIDES["test"], **given, rng=np.random.default_rng(0))
