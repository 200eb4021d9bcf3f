"""What the host does before a launch: check the arguments, round sizes, describe tensors."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from msa import chips
from msa.checks import check_kernels, check_top_k, check_triton_device

INTERPRETED = bool(triton.knobs.runtime.interpret)

Form = TypeVar("Form", bound=Any)


# -- checks ---------------------------------------------------------------------------------------
def require_kernels(block_size: int, top_k: int = 1, **tensors: Tensor) -> None:
    """Check what these kernels need in addition: a GPU or the interpreter, a dtype, sizes.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came (R20).
    """
    check_kernels(block_size, top_k, **tensors)
    for tensor in tensors.values():
        check_triton_device(tensor, INTERPRETED)


def require_top_k(top_k: int) -> None:
    """Check a selection of which no block is read; only its size matters.

    Raises:
        ValueError: if a query has more blocks than the kernels have room for (R20).
    """
    check_top_k(top_k)


# -- sizes ----------------------------------------------------------------------------------------
def pad(size: int, least: int = 16) -> int:
    """The next power of two, at least `least`: tile sides are powers of two."""
    return max(least, 1 << max(size - 1, 0).bit_length())


def positions_of(group: int) -> int:
    """Neighbouring queries of one tile: with their heads 64 rows, at most 16 queries."""
    return max(1, min(16, 64 // pad(group, 1)))


def heads_of(group: int, positions: int, rows: int) -> int:
    """Heads of one program: with its query positions about `rows` rows, 16 at least.

    >>> heads_of(16, 4, 64), heads_of(64, 1, 32), heads_of(3, 2, 64)
    (16, 32, 8)
    """
    return max(min(pad(group, 1), rows // positions), 16 // positions, 1)


# -- tensors --------------------------------------------------------------------------------------
def is_exact(tensor: Tensor) -> str:
    """The input precision of tl.dot: float32 operands stay float32.

    16-bit operands are exact in either; AMD's gfx950 knows "ieee" only.
    """
    amd = chips.current().family.is_amd
    return "ieee" if amd or tensor.dtype == torch.float32 else "tf32"


def can_describe(tensor: Tensor, dim: int) -> bool:
    """Whether the bulk copy engine (TMA) can load tiles of a packed [T, (heads,) dim] tensor.

    The engine counts rows and columns in 32 bits. It needs rows that do not overlap and whose
    distance is less than 2^40 bytes and a multiple of 16. A head-major view and an expanded tensor
    do not meet this, so their tiles are loaded without the engine.
    """
    step, size = tensor.stride(0), tensor.element_size()
    return (
        tensor.is_cuda
        and chips.current().family.descriptors
        and dim == pad(dim)
        and tensor.data_ptr() % 16 == 0
        and 0 < len(tensor) < 2**31
        and tensor.shape[1:].numel() <= min(step, 2**31 - 1)
        and step * size % 16 == 0
        and step * size < 2**40
        and (tensor.dim() == 2 or tensor.stride(1) == dim)
    )


def describe(tensor: Tensor, rows: int) -> TensorDescriptor:
    """A packed [T, (heads,) dim] tensor as a matrix of T rows, read in tiles of `rows` by dim."""
    columns = tensor.shape[1:].numel()
    return TensorDescriptor(
        tensor, [len(tensor), columns], [tensor.stride(0), 1], [rows, tensor.shape[-1]]
    )


def contiguous(form: Form) -> Form:
    """The same form with every tensor contiguous, for kernels that compute offsets from shapes."""
    tensors = {f.name: getattr(form, f.name) for f in fields(form)}
    tensors = {name: x.contiguous() for name, x in tensors.items() if isinstance(x, Tensor)}
    return replace(form, **tensors)
