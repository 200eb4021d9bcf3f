"""What a project's functions are given and what they give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Function = Callable[..., Any]
Kind = Literal["select", "sparse_attention", "attention"]


@dataclass(frozen=True)
class Signature:
    """What one function is given by keyword and position, and what it gives."""

    adapter: Callable[[Function], Function]
    takes: str
    gives: str

    def __str__(self) -> str:
        return f"f({self.takes}) -> {self.gives}"


@dataclass(frozen=True)
class Convention:
    """What a project's functions look like, and what can be said in their words."""

    name: str
    signatures: dict[Kind, Signature]
    order: str
    """Of the ids that go into its attention."""
    sinks: bool = True
    """Whether first blocks can be asked for."""
    more_local: bool = True
    """Whether more than the own block can be asked for."""
    full_rows: bool = False
    """Whether its attention takes an id at each of the first min(k, visible blocks) places."""
    left_padding: bool = False
    """Whether rows may start with padding."""
