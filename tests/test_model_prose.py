"""The prose of the task: no sequence of bytes is on both sides, for any texts."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from msa.training.prose import BETWEEN, WINDOW, own_prose, side_of, split_prose, windows

NAMES = ("break", "for", "if", "specialnames", "types", "while")
SENTENCE = "The break statement terminates the nearest enclosing loop."
PARAGRAPHS = (
    SENTENCE,
    f"As said: {SENTENCE}",
    SENTENCE[:WINDOW],
    SENTENCE[1:WINDOW],
    "=" * 80,
    "a",
)


def topics():
    paragraph = st.sampled_from(PARAGRAPHS) | st.text("ab \n", max_size=2 * WINDOW)
    text = st.lists(paragraph, max_size=5).map("\n\n".join)
    return st.dictionaries(st.sampled_from(NAMES), text)


def test_both_sides_have_names():
    assert {side_of(name) for name in NAMES} == {"train", "test"}


@given(topics())
@example({"break": SENTENCE, "for": f"A loop.\n\n{SENTENCE}"})  # the same paragraph
@example({"break": SENTENCE, "for": f"A loop. {SENTENCE}"})  # within another one
@example(
    {"break": f"a\n\n{SENTENCE[:-5]}", "for": f"a\n\n{SENTENCE[: WINDOW - 2]}"}
)  # over a border
@example({"break": f"{SENTENCE}\n\nb", "for": f"{SENTENCE[-WINDOW + 1 :]}\n\nc\n\nd"})
def test_no_stretch_stands_on_both_sides(texts):
    sides = split_prose(texts)
    assert set(windows(sides["train"])).isdisjoint(windows(sides["test"]))
    for side, prose in sides.items():
        own = "\n\n".join(texts[name] for name in texts if side_of(name) == side)
        assert all(paragraph in own.encode() for paragraph in prose.split(BETWEEN))


@given(topics())
def test_no_paragraph_is_used_twice(texts):
    for prose in split_prose(texts).values():
        used = prose.split(BETWEEN) if prose else []
        assert len(used) == len(set(used))


def test_what_neither_side_repeats_is_kept():
    texts = {"break": SENTENCE, "for": "A loop.", "if": "A branch."}
    assert split_prose(texts) == {"train": b"A loop.\n\nA branch.", "test": SENTENCE.encode()}


def test_this_python():
    sides = own_prose()
    assert set(windows(sides["train"])).isdisjoint(windows(sides["test"]))
    assert len(sides["train"]) > 250_000 and len(sides["test"]) > 60_000
