"""How a tensor lies in memory: the same numbers with other strides (R21)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from msa.checks import is_eight_bits, is_torch
from msa.conformance.cases import Brief
from msa.ir import Array

StrideKind = Literal[
    "plain", "permuted", "expanded", "columns", "every_second", "offset", "reversed"
]
KINDS: tuple[StrideKind, ...] = (
    "plain", "permuted", "expanded", "columns", "every_second", "offset", "reversed",
)  # fmt: skip
RUBBISH = 101
"""The value in memory around integers. Around floats it is NaN."""


@dataclass(frozen=True, repr=False)
class Stride(Brief):
    """One way in which a tensor can lie in memory.

    permuted      the dims have another order in memory, such as [heads, tokens, dim] that is read
                  as [tokens, heads, dim]
    expanded      one slice is read again and again, by a stride of 0
    columns       the tensor is a part of the columns of a wider tensor
    every_second  a row of rubbish lies between each two rows
    offset        the tensor starts behind other numbers in the same storage
    reversed      a dim is read backwards, by a negative stride (NumPy only; torch has none)

    >>> Stride("columns").lay(np.ones((2, 3)), floats=True).strides
    (48, 8)
    """

    kind: StrideKind = "plain"
    dim: int = 0
    """The dim that is meant; for `permuted` the rotation of the dims in memory. Wraps around."""

    def along(self, array: Array, floats: bool) -> int | None:
        """The dim that is meant, or None if there is none.

        The last dim of floats must stay contiguous. Integers, such as a page table, have no such
        rule.
        """
        free = array.ndim - floats
        return self.dim % free if free > 0 else None

    def values(self, array: Array, floats: bool = True) -> Array:
        """The numbers to lay out. For `expanded` they are made equal along the dim."""
        dim = self.along(array, floats)
        if self.kind != "expanded" or dim is None or not array.shape[dim]:
            return array
        return np.broadcast_to(np.take(array, [0], dim), array.shape).copy()

    def lay(self, array: Any, floats: bool) -> Any:
        """The same numbers, laid out in this way; for NumPy arrays and torch tensors."""
        if is_eight_bits(array):  # torch has few operations for 8-bit floats
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
    """A view of new memory that holds the array's numbers at `where`, and rubbish elsewhere."""
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
    """Reorder the dims, without a copy."""
    return array.permute(order) if is_torch(array) else array.transpose(order)


@cache
def strides(kinds: tuple[StrideKind, ...] = KINDS) -> SearchStrategy[Stride]:
    """Any of these ways."""
    return st.builds(Stride, st.sampled_from(kinds), st.integers(0, 3))
