"""Stages of the contract that have no kernel here yet; they say so instead of falling back."""

from __future__ import annotations

from typing import Any, NoReturn


def decode_step(*args: Any, **kwargs: Any) -> NoReturn:
    """Decoding from a paged cache (R2): not yet.

    Raises:
        ValueError: always.
    """
    raise ValueError("backend='triton' has no decode_step yet; use backend='torch'")
