"""Functions that have different names in NumPy and torch, for arrays of both."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from msa.checks import is_torch
from msa.ir import Array


def like(model: Array, values: Iterable[int]) -> Array:
    """An int64 array of these values, of the same kind and device as `model`."""
    if is_torch(model):
        import torch

        return torch.tensor(list(values), dtype=torch.int64, device=model.device)
    return np.array(list(values), np.int64)


def where(condition: Array, yes: Any, no: Any) -> Array:
    """Choose elementwise between two arrays or numbers."""
    return _library(condition).where(condition, yes, no)


def sort(array: Array) -> Array:
    """Sort ascending along the last dim."""
    return array.sort(-1).values if is_torch(array) else np.sort(array, -1)


def argsort(array: Array) -> Array:
    """The places of the values of the last dim in ascending order; stable for equal values."""
    if is_torch(array):
        return array.argsort(dim=-1, stable=True)
    return np.argsort(array, -1, kind="stable")


def zeros_like(array: Array) -> Array:
    """An array of zeros of the same shape, kind and dtype."""
    return _library(array).zeros_like(array)


def take(array: Array, places: Array) -> Array:
    """array[..., places[...]] along the last dim."""
    if is_torch(array):
        return array.gather(-1, places.long())
    return np.take_along_axis(array, places, -1)


def widen(array: Array, width: int, fill: int) -> Array:
    """Extend the last dim to `width`, with `fill` in the new places."""
    if array.shape[-1] == width:
        return array
    more = (*array.shape[:-1], width - array.shape[-1])
    return join([array, _full(array, more, fill)], -1)


def join(parts: list[Array], dim: int) -> Array:
    """Concatenate along a dim."""
    if is_torch(parts[0]):
        import torch

        return torch.cat(parts, dim)
    return np.concatenate(parts, dim)


def stack(parts: list[Array], dim: int) -> Array:
    """Stack along a new dim."""
    if is_torch(parts[0]):
        import torch

        return torch.stack(parts, dim)
    return np.stack(parts, dim)


def as_int32(array: Array) -> Array:
    """Cast to int32, the dtype of selections and tables."""
    return array.int() if is_torch(array) else array.astype(np.int32)


def _full(model: Array, shape: tuple[int, ...], fill: int) -> Array:
    if is_torch(model):
        return model.new_full(shape, fill)
    return np.full(shape, fill, model.dtype)


def _library(array: Array) -> Any:
    if is_torch(array):
        import torch

        return torch
    return np
