"""`msa ask`: the user's own text and pictures, and what a trained model answers about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from msa.model import checks_ask, shown
from msa.model.shown import Question, ReadingOptions, Shown

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Int


@dataclass(frozen=True, kw_only=True)
class AskOptions(ReadingOptions):
    """Hide your own pictures of digits in your own text, and ask a trained model for them.

    A mark such as [QKZ] in the text says where the picture of key QKZ stands. Pictures without a
    mark are spread evenly over the text, each in front of the next word.
    """

    document: Path
    """The text, in UTF-8 or any encoding that has no zero bytes, at most 16 MiB. The shipped model
    was trained on English of at most 512 bytes."""
    image: tuple[str, ...]
    """KEY=FILE, one or more: a key of three capital letters and its picture, in any format that
    Pillow reads; dark ink on light paper or the reverse, one digit that fills most of it or not."""
    question: tuple[str, ...] = ()
    """The keys to ask for, each once; none given: all."""


@dataclass(frozen=True)
class Text:
    """A text with its records in place."""

    tokens: Int[np.ndarray, " T"]
    records: dict[str, int]
    """For each key, in the order of the text, the token of its picture."""
    marked: frozenset[str]
    """The keys that had a mark."""


def run(options: AskOptions) -> int:
    """Ask, print a table, write page and figure if asked."""
    from rich.console import Console

    console = Console()
    text, found = compute(options)
    for key, record in text.records.items():
        if key not in text.marked:
            console.print(f"The text has no mark \\[{key}]: its picture is token {record:,}.")
    shown.tell(found, options, console)
    return 0


def compute(options: AskOptions) -> tuple[Text, Shown]:
    """Put the pictures into the text, and let the model read it for each question by itself.

    Raises:
        ValueError: a text or a picture that cannot be read, a mark that stands twice; keys that are
            none, that are given or asked for twice, or asked for without a picture; a model or a
            backend that is not there; a file that cannot be written, or that is one of those read.
    """
    import numpy as np

    from msa.model.pictures import read_picture

    files = checks_ask.read_images(options.image)
    checks_ask.check_questions(options.question, files)
    shown.check_files(options, document=options.document, **files)
    text = compose(checks_ask.read_text(options.document), tuple(files))
    images = np.stack([read_picture(files[key]) for key in text.records])
    asked = options.question or tuple(files)
    model = shown.load_model(options)
    return text, shown.read(model, images, [put(text, key) for key in asked])


def put(text: Text, key: str) -> Question:
    """The question behind the text, as in training: its answer is the next token.

    >>> question = put(compose(b"a [QKZ]b", ["QKZ"]), "QKZ")
    >>> question.tokens.tolist()[-5:] == list(b"?QKZ="), question.place, question.record
    (True, 13, 6)
    """
    import numpy as np

    from msa.model.records import question_tokens

    tokens = np.concatenate([text.tokens, question_tokens(key.encode())])
    return Question(key, tokens, len(tokens) - 1, text.records[key], None)


def compose(text: bytes, keys: Sequence[str]) -> Text:
    """Put the record of each key where its mark stands, or else in front of a word.

    >>> text = compose(b"one two [QKZ]three four", ["QKZ", "BEM"])
    >>> "".join("#" if t > 255 else chr(t) for t in text.tokens)
    'one two [QKZ#]three [BEM#]four'
    >>> text.records, sorted(text.marked)
    ({'QKZ': 12, 'BEM': 24}, ['QKZ'])
    """
    import numpy as np

    from msa.model.records import KEY_LETTERS, record_tokens

    places = find_marks(text, keys)
    marked = frozenset(places)
    places |= spread(text, [key for key in keys if key not in marked])
    tokens: list[int] = []
    records: dict[str, int] = {}
    read = 0
    for key in sorted(places, key=places.__getitem__):
        tokens += text[read : places[key]]
        records[key] = len(tokens) + 1 + KEY_LETTERS
        tokens += record_tokens(key.encode())
        read = max(read, places[key] + (len(mark(key)) if key in marked else 0))
    return Text(np.array([*tokens, *text[read:]]), records, marked)


def mark(key: str) -> bytes:
    """What stands for a record in a user's text."""
    return f"[{key}]".encode()


def find_marks(text: bytes, keys: Sequence[str]) -> dict[str, int]:
    """Where the mark of each key begins, of those that have one.

    Raises:
        ValueError: a mark that stands twice.
    """
    for key in keys:
        checks_ask.check_marks(key, text.count(mark(key)))
    return {key: text.index(mark(key)) for key in keys if mark(key) in text}


def spread(text: bytes, keys: Sequence[str]) -> dict[str, int]:
    """Places for records without a mark: in even steps, each moved on to the next word.

    >>> spread(b"aaaa bbbb cccc dddd", ["QKZ", "BEM", "XUT"])
    {'QKZ': 5, 'BEM': 10, 'XUT': 15}
    """
    places: dict[str, int] = {}
    for i, key in enumerate(keys, start=1):
        begin = i * len(text) // (len(keys) + 1)
        spaces = [n for n in (text.find(b" ", begin - 1), text.find(b"\n", begin - 1)) if n >= 0]
        places[key] = min(spaces) + 1 if spaces else len(text)
    return places
