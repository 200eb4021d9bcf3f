"""Trying bad input: the error must come before any function of the backend is called."""

from __future__ import annotations

from typing import Any
from unittest import mock

from msa import dispatch
from msa.conformance.backends import Subject
from msa.conformance.bad_input import BadInput
from msa.conformance.bad_input.kit import Kit
from msa.conformance.tolerances import require


class Untouched:
    """Stands in for a backend: nothing of it may be asked for."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"work began: {name} was called")


def try_bad_input(subject: Subject, bad: BadInput) -> None:
    """The right error with the right words, while no function of the backend can be reached.

    Raises:
        Disagreement: if nothing was raised, or something else, or with a message that says less.
    """

    def load(name: str) -> Any:
        dispatch.load_backend(name)  # its own check of the name is wanted
        return Untouched()

    try:
        with mock.patch("msa.api.load_backend", load):
            bad.call(Kit(subject))
    except (ValueError, TypeError) as error:
        message = str(error)
        right = type(error) is bad.error
        require(right, f"{bad.name} must raise {bad.error.__name__}, got {error!r}")
        missing = [part for part in bad.says if part not in message]
        require(not missing, f"{bad.name}: the message must say {missing}, got {message!r}")
    else:
        require(False, f"{bad.name} must raise {bad.error.__name__}, got no error")
