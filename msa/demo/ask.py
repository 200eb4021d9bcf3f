"""`msa ask`: questions to a trained model about the user's own text and pictures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int
from rich.console import Console

from msa import files
from msa.demo.options import ReadingOptions, check_files, load_model
from msa.demo.pictures import read_picture
from msa.demo.present import present
from msa.demo.questions import Comparison, DemoQuestion, compare
from msa.training.documents import KEY_LETTERS, question_tokens, record_tokens

KEY = re.compile(f"[A-Z]{{{KEY_LETTERS}}}")
MOST_TEXT = 2**24
"""The most bytes of a document."""


@dataclass(frozen=True, kw_only=True)
class AskOptions(ReadingOptions):
    """Hide your own pictures of digits in your own text, and ask a trained model for them.

    A mark such as [QKZ] in the text is the place for the picture of key QKZ. Pictures without a
    mark are spread evenly over the text, each before a word.
    """

    document: Path
    """The text file, in UTF-8 or another encoding without zero bytes, at most 16 MiB. The tiny
    model was trained on English text of at most 512 bytes."""
    image: tuple[str, ...]
    """One or more KEY=FILE: a key of three capital letters, and a picture of one digit. The picture
    has any size and any format that Pillow reads, with dark ink on light paper or the reverse."""
    question: tuple[str, ...] = ()
    """The keys to ask for, each once. Without this option, all keys are asked for."""


@dataclass(frozen=True)
class Text:
    """A text with its records in their places."""

    tokens: Int[np.ndarray, " T"]
    records: dict[str, int]
    """The position of the picture of each key, in the order of the text."""
    marked: frozenset[str]
    """The keys that had a mark."""


def run(options: AskOptions) -> int:
    """Ask all questions, print a table, and write the page and the figure of the options."""
    console = Console()
    text, comparison = compute(options)
    for key, record in text.records.items():
        if key not in text.marked:
            console.print(f"The text has no mark \\[{key}]: its picture is token {record:,}.")
    present(comparison, options, console)
    return 0


def compute(options: AskOptions) -> tuple[Text, Comparison]:
    """Put the pictures into the text, and let the model read the text once for each question.

    Raises:
        ValueError: a text or a picture that cannot be read; a mark that is in the text twice; a key
            that is not three capital letters, that is given or asked for twice, or that has no
            picture; a model or a backend that does not exist; an output file that cannot be
            written, or that is an input file.
    """
    pictures = read_images(options.image)
    check_questions(options.question, pictures)
    check_files(options, document=options.document, **pictures)
    text = compose(read_text(options.document), tuple(pictures))
    images = np.stack([read_picture(pictures[key]) for key in text.records])
    asked = options.question or tuple(pictures)
    model = load_model(options)
    return text, compare(model, images, [ask(text, key) for key in asked])


def ask(text: Text, key: str) -> DemoQuestion:
    """The question for a key, after the text as in training. Its answer is the next token.

    >>> question = ask(compose(b"a [QKZ]b", ["QKZ"]), "QKZ")
    >>> question.tokens.tolist()[-5:] == list(b"?QKZ="), question.place, question.record
    (True, 13, 6)
    """
    tokens = np.concatenate([text.tokens, question_tokens(key.encode())])
    return DemoQuestion(key, tokens, len(tokens) - 1, text.records[key], None)


def compose(text: bytes, keys: Sequence[str]) -> Text:
    """Put the record of each key in the place of its mark, or before a word if it has no mark.

    >>> text = compose(b"one two [QKZ]three four", ["QKZ", "BEM"])
    >>> "".join("#" if t > 255 else chr(t) for t in text.tokens)
    'one two [QKZ#]three [BEM#]four'
    >>> text.records, sorted(text.marked)
    ({'QKZ': 12, 'BEM': 24}, ['QKZ'])
    """
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
    """The mark of a key in the text."""
    return f"[{key}]".encode()


def find_marks(text: bytes, keys: Sequence[str]) -> dict[str, int]:
    """The position of each mark in the text, for the keys that have one.

    Raises:
        ValueError: a mark that is in the text twice.
    """
    for key in keys:
        marks = text.count(mark(key))
        if marks > 1:
            raise ValueError(
                f"document must have the mark [{key}] at most once, got it {marks} times"
            )
    return {key: text.index(mark(key)) for key in keys if mark(key) in text}


def spread(text: bytes, keys: Sequence[str]) -> dict[str, int]:
    """Places for records without a mark: at equal distances, each moved to the next word.

    >>> spread(b"aaaa bbbb cccc dddd", ["QKZ", "BEM", "XUT"])
    {'QKZ': 5, 'BEM': 10, 'XUT': 15}
    """
    places: dict[str, int] = {}
    for i, key in enumerate(keys, start=1):
        begin = i * len(text) // (len(keys) + 1)
        spaces = [n for n in (text.find(b" ", begin - 1), text.find(b"\n", begin - 1)) if n >= 0]
        places[key] = min(spaces) + 1 if spaces else len(text)
    return places


# -- the arguments --------------------------------------------------------------------------------
def read_text(path: Path) -> bytes:
    """The bytes of a document. A zero byte is refused: only UTF-16, UTF-32 and files without text
    have one.

    Raises:
        ValueError: a file that cannot be read, is empty or too large, or has a zero byte.
    """
    text = files.read_bytes("document", path, MOST_TEXT)
    if not text:
        raise ValueError(f"document must have at least one byte, got the empty file {path}")
    if b"\0" in text:
        raise ValueError(
            f"document must be a text, in UTF-8 or the like, got a zero byte at {text.index(0)} of "
            f"{path}"
        )
    return text


def read_images(entries: Sequence[str]) -> dict[str, Path]:
    """The file of each key, from entries KEY=FILE.

    Raises:
        ValueError: no entry, an entry of another form, or a key that is given twice.
    """
    if not entries:
        raise ValueError("image must be given at least once as KEY=FILE, got none")
    images: dict[str, Path] = {}
    for entry in entries:
        key, is_pair, file = entry.partition("=")
        if not is_pair or not file:
            raise ValueError(f"image must be KEY=FILE, got {entry!r}")
        check_key("image", key)
        if key in images:
            raise ValueError(f"image must name a key once, got {key} twice")
        images[key] = Path(file)
    return images


def check_key(name: str, key: str) -> None:
    """The key has the form of the keys in training."""
    if not KEY.fullmatch(key):
        raise ValueError(f"{name} must have a key of three capital letters A-Z, got {key!r}")


def check_questions(questions: Iterable[str], known: Iterable[str]) -> None:
    """Each question is a key that has a picture, and no key is asked for twice."""
    asked: set[str] = set()
    for key in questions:
        check_key("question", key)
        if key in asked:
            raise ValueError(f"question must name a key once, got {key} twice")
        asked.add(key)
        if key not in known:
            raise ValueError(
                f"question must be a key that has an image, {' or '.join(known)}, got {key!r}"
            )
