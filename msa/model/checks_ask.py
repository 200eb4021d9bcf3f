"""The checks of what users bring to `msa ask`: texts, keys and pictures, in the manner of R20."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from msa import files

KEY = re.compile("[A-Z]{3}")
LEAST_INK = 0.1
"""The least contrast, of 1, that a picture must have."""
MOST_TEXT = 2**24
"""The most bytes of a document."""


def read_text(path: Path) -> bytes:
    """The bytes of a document, which no text has a zero among, unless it is UTF-16 or UTF-32."""
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
    """KEY=FILE, at least once, no key twice."""
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
    """Such as the model was trained with."""
    if not KEY.fullmatch(key):
        raise ValueError(f"{name} must have a key of three capital letters A-Z, got {key!r}")


def check_questions(questions: Iterable[str], known: Iterable[str]) -> None:
    """Keys, each of which has a picture, no key twice."""
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


def check_marks(key: str, marks: int) -> None:
    """A record stands in one place."""
    if marks > 1:
        raise ValueError(f"document must have the mark [{key}] at most once, got it {marks} times")


def check_ink(name: str, contrast: float) -> None:
    """Ink that differs from the paper."""
    if contrast < LEAST_INK:
        raise ValueError(
            f"{name} must show a digit, in ink that differs from the paper by at least "
            f"{LEAST_INK:.0%} of the way from black to white, got {contrast:.0%}"
        )


def no_picture(path: Path | str, reason: str) -> ValueError:
    """What to raise where Pillow could not read a file."""
    return ValueError(f"{path} must be a picture, got one that cannot be read: {reason}")
