"""Docstrings on the reference pages: examples (`>>>`) become code blocks."""

from __future__ import annotations

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^( *)>>> .*(?:\n(?! *$).*)*", re.M)


def fence(text: str) -> str:
    """Put a fence around every paragraph that begins with `>>>`.

    >>> fence("Words.\\n\\n>>> 1 + 1\\n2").splitlines()
    ['Words.', '', '```pycon', '>>> 1 + 1', '2', '```']
    """
    return EXAMPLE.sub(lambda m: f"{m[1]}```pycon\n{m[0]}\n{m[1]}```", text)


class Doctests(griffe.Extension):
    """Applies `fence` to every docstring."""

    def on_object(self, *, obj: Any, **kwargs: Any) -> None:
        """Called for each object that was read."""
        if obj.docstring is not None:
            obj.docstring.value = fence(obj.docstring.value)
