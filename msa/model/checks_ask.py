"""The checks of what users bring to `msa ask`: texts, keys and pictures, in the manner of R20."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

KEY = re.compile("[A-Z]{3}")
LEAST_INK = 0.1
"""The least contrast, of 1, that a picture must have."""


def check_words(words: Sequence[str]) -> None:
    """An option of several values is given once: a second one would replace the first."""
    for option in ("--image", "--question"):
        if words.count(option) > 1:
            raise ValueError(f"{option} must be given once, its values behind it, got it again")


def read_text(path: Path) -> bytes:
    """The bytes of a document."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"document must be a readable file, got {path}: {error.strerror}"
        ) from None
    if not text:
        raise ValueError(f"document must have at least one byte, got the empty file {path}")
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
    """Keys, each of which has a picture."""
    for key in questions:
        check_key("question", key)
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
