"""Bad input (R20), case by case: the call, its error, and what the message must say.

kit          good arguments, to be spoiled one at a time; torch_arrays: the same as torch tensors
configs, tensors, borders, selections, caches, array_types, choices, kernels, torch_tensors,
eight_bits   the cases by the argument that is wrong
collect      BAD_INPUTS: all of them
run          tries a case on a backend, no function of which may be called
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from msa.conformance.bad_input.kit import Arguments, Kit


@dataclass(frozen=True, repr=False)
class BadInput:
    """One way to go wrong."""

    name: str
    error: type[Exception]
    says: tuple[str, ...]
    """The argument, what was wanted, what came."""
    call: Callable[[Kit], Any]

    def __repr__(self) -> str:
        return f"BadInput({self.name!r})"


def attention(
    name: str,
    error: type[Exception],
    says: tuple[str, ...],
    changes: Callable[[Kit], Arguments],
) -> BadInput:
    """A call of msa.attention with some arguments replaced."""
    return BadInput(name, error, says, lambda kit: kit.attention(**changes(kit)))
