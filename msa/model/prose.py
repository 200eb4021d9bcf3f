"""The prose of the task, split by content: what stands on one side stands nowhere on the other.

The prose is that of Python's own reference (`pydoc_data.topics`, which every Python ships). It
repeats itself: whole chapters stand under several topics, and sentences in several chapters. A cut
at some place would leave a third of the test prose word for word in the training prose. So each
paragraph is used once, a topic belongs to one side as a whole, and a paragraph of the training side
that repeats `WINDOW` bytes of the test side is left out.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Literal

Side = Literal["train", "test"]
WINDOW = 32
"""No stretch of so many bytes stands on both sides."""
TEST_SHARE = 0.2
"""Of the topics."""
BETWEEN = b"\n\n"
"""What stands between two paragraphs."""


@cache
def own_prose() -> dict[Side, bytes]:
    """Both sides of the running Python's reference: about 270 kB and 70 kB.

    Releases of Python differ in a few sentences; on each of them the sides share nothing.
    """
    from pydoc_data import topics

    return split_prose(topics.topics)


def split_prose(topics: Mapping[str, str]) -> dict[Side, bytes]:
    """The training and the test side of texts under names.

    The name of a text decides its side, so the side does not change when the text is edited.

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
    """The side of a text by its name, the same in every process and release of Python.

    >>> side_of("break"), side_of("for")
    ('test', 'train')
    """
    return "test" if zlib.crc32(name.encode()) < TEST_SHARE * 2**32 else "train"


def windows(text: bytes) -> Iterator[bytes]:
    """Every stretch of `WINDOW` bytes; of a shorter text none."""
    return (text[i : i + WINDOW] for i in range(len(text) - WINDOW + 1))


def _distinct_paragraphs(topics: Mapping[str, str]) -> Iterator[tuple[str, bytes]]:
    """Each paragraph once, under the first name that has it; in the order of the names."""
    seen: set[str] = set()
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name].strip()):
            if paragraph and paragraph not in seen:
                seen.add(paragraph)
                yield name, paragraph.encode()
