"""The prose of the task. It is split by content, so that the two sides share no text.

The prose is Python's own reference (`pydoc_data.topics`, a part of every Python). It repeats
itself: several topics contain the same chapters, and several chapters the same sentences. If it was
cut at one place, the training prose would contain a third of the test prose word for word. So each
paragraph is used once, a topic is on one side as a whole, and a paragraph of the training side is
left out if it contains `WINDOW` consecutive bytes of the test side.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Literal

Side = Literal["train", "test"]
WINDOW = 32
"""No sequence of so many bytes is on both sides."""
TEST_SHARE = 0.2
"""The share of topics on the test side."""
BETWEEN = b"\n\n"
"""The bytes between two paragraphs."""


@cache
def own_prose() -> dict[Side, bytes]:
    """Both sides of the reference of the running Python: about 270 kB and 70 kB.

    Releases of Python differ in a few sentences. In every release the sides share no text.
    """
    from pydoc_data import topics

    return split_prose(topics.topics)


def split_prose(topics: Mapping[str, str]) -> dict[Side, bytes]:
    """The training side and the test side of named texts.

    The name of a text decides its side, so a change of the text does not change its side.

    >>> again = "It ends the nearest enclosing loop."
    >>> split_prose({"break": again, "for": f"A loop.\\n\\nHere: {again}\\n\\nIt repeats a suite."})
    {'train': b'A loop.\\n\\nIt repeats a suite.', 'test': b'It ends the nearest enclosing loop.'}
    """
    sides: dict[Side, list[bytes]] = {"train": [], "test": []}
    for name, paragraph in _distinct_paragraphs(topics):
        sides[side_of(name)].append(paragraph)
    test = BETWEEN.join(sides["test"])
    seen, train = set(windows(test)), b""
    for paragraph in sides["train"]:
        longer = train + paragraph + BETWEEN
        new = longer[max(0, len(train) - WINDOW + 1) :]  # holds every window that this one adds
        if seen.isdisjoint(windows(new)):
            train = longer
    return {"train": train.removesuffix(BETWEEN), "test": test}


def side_of(name: str) -> Side:
    """The side of a text by its name. It is the same in every process and release of Python.

    >>> side_of("break"), side_of("for")
    ('test', 'train')
    """
    return "test" if zlib.crc32(name.encode()) < TEST_SHARE * 2**32 else "train"


def windows(text: bytes) -> Iterator[bytes]:
    """Every sequence of `WINDOW` consecutive bytes; none if the text is shorter."""
    return (text[i : i + WINDOW] for i in range(len(text) - WINDOW + 1))


def _distinct_paragraphs(topics: Mapping[str, str]) -> Iterator[tuple[str, bytes]]:
    """Each paragraph once, with the first name that has it, in the order of the names."""
    seen: set[str] = set()
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name].strip()):
            if paragraph and paragraph not in seen:
                seen.add(paragraph)
                yield name, paragraph.encode()
