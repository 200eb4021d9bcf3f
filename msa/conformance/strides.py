"""How one tensor lies in memory: the same numbers under other strides (R21)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from msa.checks import is_eight_bits, is_torch
from msa.conformance.cases import Brief
from msa.ir import Array

Kind = Literal["plain", "permuted", "expanded", "columns", "every_second", "offset", "reversed"]
KINDS: tuple[Kind, ...] = (
    "plain", "permuted", "expanded", "columns", "every_second", "offset", "reversed",
)  # fmt: skip
RUBBISH = 101
"""What lies around integers; floats have NaN there."""


@dataclass(frozen=True, repr=False)
class Stride(Brief):
    """One way to lie in memory.

    permuted      as [heads, tokens, dim] does that is read as [tokens, heads, dim]
    expanded      one slice read again and again, by a stride of 0
    columns       some of the columns of a wider tensor
    every_second  rows with rows of rubbish between them
    offset        behind other numbers of the same storage
    reversed      read backwards, by a negative stride (NumPy alone knows these)

    >>> Stride("columns").lay(np.ones((2, 3)), floats=True).strides
    (48, 8)
    """

    kind: Kind = "plain"
    dim: int = 0
    """Which one, or by how many dims the order in memory is rotated; wraps around."""

    def along(self, array: Array, floats: bool) -> int | None:
        """The dim that is meant. The last one of floats stays contiguous; None: there is no other.

        Integers, such as a page table, may lie in any way.
        """
        free = array.ndim - floats
        return self.dim % free if free > 0 else None

    def values(self, array: Array, floats: bool = True) -> Array:
        """What can lie so: where it is expanded, the same all along the dim."""
        dim = self.along(array, floats)
        if self.kind != "expanded" or dim is None or not array.shape[dim]:
            return array
        return np.broadcast_to(np.take(array, [0], dim), array.shape).copy()

    def lay(self, array: Any, floats: bool) -> Any:
        """The same numbers so laid out, of NumPy or of torch."""
        if is_eight_bits(array):  # which torch can hardly fill
            import torch

            return self.lay(array.view(torch.uint8), floats).view(array.dtype)
        dim = self.along(array, floats)
        if dim is None or self.kind == "plain":
            return array
        match self.kind:
            case "permuted":
                rotated = [(d + dim) % (array.ndim - floats) for d in range(array.ndim - floats)]
                order = rotated + [array.ndim - 1] * floats
                back = np.argsort(order).tolist()
                turned = permute(array, order)
                return permute(fresh(turned, turned.shape, ()), back)
            case "expanded":
                one = array[(slice(None),) * dim + (slice(0, 1),)]
                return (
                    one.expand(array.shape)
                    if is_torch(array)
                    else np.broadcast_to(one, array.shape)
                )
            case "columns":
                wide = (*array.shape[:-1], array.shape[-1] + 3)
                return fresh(array, wide, (..., slice(1, 1 + array.shape[-1])))
            case "every_second":
                wide = tuple(2 * n if d == dim else n for d, n in enumerate(array.shape))
                return fresh(array, wide, (slice(None),) * dim + (slice(None, None, 2),))
            case "offset":
                flat = array.reshape(-1)
                behind = fresh(flat, (len(flat) + 3,), (slice(3, None),))
                return behind.reshape(array.shape)
            case "reversed":
                if is_torch(array):
                    return array
                backwards = (slice(None),) * dim + (slice(None, None, -1),)
                return np.ascontiguousarray(array[backwards])[backwards]


def fresh(array: Any, shape: tuple[int, ...], where: Any) -> Any:
    """A view, at `where`, into new memory full of rubbish, that holds the array's numbers."""
    floats = array.dtype.is_floating_point if is_torch(array) else array.dtype.kind == "f"
    rubbish = float("nan") if floats else RUBBISH
    if is_torch(array):
        wide = array.new_full(tuple(shape), rubbish)
    else:
        wide = np.full(tuple(shape), rubbish, array.dtype)
    view = wide[where]
    view[...] = array
    return view


def permute(array: Any, order: list[int]) -> Any:
    """The dims in another order, without a copy."""
    return array.permute(order) if is_torch(array) else array.transpose(order)


def strides(kinds: tuple[Kind, ...] = KINDS) -> SearchStrategy[Stride]:
    """Any of them."""
    return st.builds(Stride, st.sampled_from(kinds), st.integers(0, 3))
