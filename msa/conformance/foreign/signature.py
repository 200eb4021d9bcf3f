"""Conventions: the arguments and results of the functions of one project.

An adapter turns a function of one convention into a function of this project's packed tensors:

    select              (q_idx, k_idx, sequences, config) -> ids [Tq, Hkv, k], in the given order
    sparse_attention    (q, k, v, selection, scale) -> out [Tq, Hq, Dv], lse [Tq, Hq] or None
    attention           (q, k, v, q_idx, k_idx, sequences, config) -> out, lse or None, ids or None

Adapters keep the ids in the order in which the function returned them, because R8 is about this
order. Arguments are laid out by `pages_and_rows`: shuffled pages, or rows of a batch, with rubbish
around them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Function = Callable[..., Any]
FunctionKind = Literal["select", "sparse_attention", "attention"]


@dataclass(frozen=True)
class Signature:
    """The arguments and the result of one function, in words, and its adapter."""

    adapter: Callable[[Function], Function]
    takes: str
    gives: str

    def __str__(self) -> str:
        return f"f({self.takes}) -> {self.gives}"


@dataclass(frozen=True)
class Convention:
    """The functions of one project, and what can be asked of them."""

    name: str
    signatures: dict[FunctionKind, Signature]
    order: str
    """The order of the ids that its attention is given."""
    sinks: bool = True
    """Whether sink blocks can be forced."""
    more_local: bool = True
    """Whether more local blocks than the own block can be forced."""
    full_rows: bool = False
    """Whether its attention needs an id at each of the first min(k, visible blocks) places."""
    left_padding: bool = False
    """Whether rows may start with padding."""
