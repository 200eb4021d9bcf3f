"""Bad input (R20): a call, the error that it must raise, and what the message must say.

kit              good arguments, of which a case replaces one; torch_arrays: as torch tensors
configs          MSAConfig
tensors          shapes and dtypes of tensors
borders          cu_seqlens and msa.Sequences
selections       msa.Selection
caches           paged caches and page pools; eight_bits: caches of 8 bits; prefill: over them
array_types      masked arrays and other subclasses of NumPy arrays
torch_tensors    kinds of torch tensors
choices          the backend and its options; kernels: calls for which triton has no kernel
collect          the list of all cases
run              makes the call and checks the error
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from msa import moved
from msa.conformance.bad_input.kit import Arguments, Kit


@dataclass(frozen=True, repr=False)
class BadInput:
    """One wrong call and the error that it must raise."""

    name: str
    error: type[Exception]
    says: tuple[str, ...]
    """Parts of the message: the argument, what was wanted, what was given."""
    call: Callable[[Kit], Any]

    def __repr__(self) -> str:
        return f"BadInput({self.name!r})"


def attention(
    name: str, error: type[Exception], says: tuple[str, ...], changes: Callable[[Kit], Arguments],
) -> BadInput:  # fmt: skip
    """A case that calls msa.attention with some arguments replaced."""
    return BadInput(name, error, says, lambda kit: kit.attention(**changes(kit)))


__getattr__ = moved.names_of(__name__)
