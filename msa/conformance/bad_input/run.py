"""Check the error of a case, and that it is raised before any function of a backend is called."""

from __future__ import annotations

from typing import Any
from unittest import mock

from msa import dispatch
from msa.conformance.backends import Subject
from msa.conformance.bad_input import BadInput
from msa.conformance.bad_input.kit import Kit
from msa.conformance.tolerances import require


class Untouched:
    """Takes the place of a backend. It raises an error when one of its functions is used."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"work began: {name} was called")


def try_bad_input(subject: Subject, bad: BadInput) -> None:
    """Make the call, and check the type and message of its error.

    Raises:
        Disagreement: no error, another type of error, or parts of the message are missing.
    """

    def load(name: str) -> Any:
        dispatch.load_backend(name)  # this call checks the name
        return Untouched()

    try:
        with mock.patch("msa.entry.load_backend", load):
            bad.call(Kit(subject))
    except (ValueError, TypeError) as error:
        message = str(error)
        right = type(error) is bad.error
        require(right, f"{bad.name} must raise {bad.error.__name__}, got {error!r}")
        missing = [part for part in bad.says if part not in message]
        require(not missing, f"{bad.name}: the message must say {missing}, got {message!r}")
    else:
        require(False, f"{bad.name} must raise {bad.error.__name__}, got no error")
