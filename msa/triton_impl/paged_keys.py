"""Keys and values in the pages of a cache: where the kernels of a prefill find them.

A kernel reads block b of sequence s at page table[s, b] of pages [pages, Bk, Hkv, dim], with any
strides. Keys of packed tensors lie behind one another, so the same kernels read both:

    packed    address of key n of a block = first + n tokens
    paged     address of key n of a block = page + n tokens

The copy engine (TMA) reads a matrix. Pages are one if a page starts a whole number of token strides
behind the page before it: row = page + head + token, column = what is left of the head's offset.
This is so for pages in either order of tokens and heads, and for keys and values that lie beside
one another in one tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import triton
import triton.language as tl
from jaxtyping import Float, Float32, Int
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from msa.triton_impl.launch import can_describe, describe, pad
from msa.triton_impl.tile_verbs import along


@triton.jit
def load_page(p_table, i_b, stride_tb, PAGED: tl.constexpr):
    """The page of block i_b, from the row of its sequence; 0 for packed keys and for block -1."""
    if PAGED:
        return tl.load(p_table + along(i_b, stride_tb), mask=i_b >= 0, other=0).to(tl.int64)
    else:
        return tl.full((), 0, tl.int64)


@triton.jit
def key_offset(page, first, i_n, stride_p, stride_t, PAGED: tl.constexpr):
    """Elements before key i_n of a block, whose first key is the packed key `first`."""
    if PAGED:
        return along(page, stride_p) + along(i_n, stride_t)
    else:
        return along(first + i_n, stride_t)


@triton.jit
def whole_rows(offset, step):
    """How many rows of a matrix end before an offset in its memory; a row begins every `step`."""
    return offset // step


@triton.jit
def rest_of_row(offset, step):
    """The column at which an offset in the memory of such a matrix lies."""
    return offset % step


@triton.jit
def key_row(page, first, i_n, offset_h, stride_p, stride_t, PAGED: tl.constexpr):
    """Row and column of key i_n of a block in the matrix of a `page_matrix`, or of packed keys.

    offset_h: elements before the head, from the start of a token.
    """
    if PAGED:
        row = page * whole_rows(stride_p, stride_t) + whole_rows(offset_h, stride_t) + i_n
        return row.to(tl.int32), rest_of_row(offset_h, stride_t).to(tl.int32)
    else:
        return first + i_n, offset_h.to(tl.int32)


@triton.jit
def load_scale(scales, page, i_r, stride_p, stride_h, SCALED: tl.constexpr):
    """The factor of a page and head; 1 where the numbers have none."""
    if SCALED:
        return tl.load(scales + along(page, stride_p) + along(i_r, stride_h))
    else:
        return 1.0


@dataclass(frozen=True)
class Pages:
    """What the kernels read beside pages of keys and values."""

    table: Int[Tensor, "B columns"]
    k_scales: Float32[Tensor, "pages Hkv"] | None
    """None where the pages have no factors."""
    v_scales: Float32[Tensor, "pages Hkv"] | None
    mild: bool = False
    """Whether the factors of values are at least 2^-32 and at most 4, as `widen_pages` leaves them
    in bfloat16. Then outputs can be kept in units of one of them."""

    def after(self, sequence: int) -> Pages:
        """The same without the sequences before this one."""
        return replace(self, table=self.table[sequence:])


def page_arguments(
    pages: Pages | None, k: Float[Tensor, "*where Hkv D"], v: Float[Tensor, "*where Hkv Dv"]
) -> tuple[object, ...]:
    """The arguments of a kernel that say where pages lie, from `table` to `stride_vsh`."""
    if pages is None:
        return k, k, v, *[0] * 8  # not read
    scales = (k, v) if pages.k_scales is None else (pages.k_scales, pages.v_scales)
    return (
        pages.table, *scales, k.stride(0), v.stride(0), *pages.table.stride(),
        *scales[0].stride()[:2], *scales[1].stride()[:2],
    )  # fmt: skip


@dataclass(frozen=True)
class IndexPages:
    """What the kernels read beside pages of index keys."""

    table: Int[Tensor, "B columns"]
    scales: Float32[Tensor, " pages"] | None
    """None where the pages are not of 8 bits."""


def index_arguments(
    pages: IndexPages | None, k_idx: Float[Tensor, "*where Di"], scale: float,
    q_idx: Float[Tensor, "Tq Hkv Di"],
) -> tuple[object, ...]:  # fmt: skip
    """The arguments of `scan_kernel` from `table` to `stride_sp`."""
    steps = q_idx.stride()[:2]
    if pages is None:
        return k_idx, k_idx, scale, *steps, 0, k_idx.stride(0), 0, 0, 0  # only k_idx is read
    scales = k_idx if pages.scales is None else pages.scales
    return (
        pages.table, scales, scale, *steps, *k_idx.stride()[:2], *pages.table.stride(),
        scales.stride(0),
    )  # fmt: skip


def index_descriptor(
    k_idx: Float[Tensor, "*where Di"], keys: int, pages: IndexPages | None
) -> TensorDescriptor | None:
    """A descriptor of index keys, packed or in pages; None where the copy engine cannot."""
    if pages is None:
        return describe(k_idx, keys) if can_describe(k_idx, k_idx.shape[-1]) else None
    matrix = page_matrix(k_idx)
    return None if matrix is None else describe_matrix(matrix, keys, k_idx.shape[-1])


def page_matrix(pages: Float[Tensor, "pages Bk *head dim"]) -> Float[Tensor, "rows columns"] | None:
    """The pages as a matrix with one row for each token stride; None if the copy engine cannot.

    The engine counts rows in 32 bits. It needs rows that start at multiples of 16 bytes.

    >>> import torch
    >>> both = torch.empty(3, 2, 8, 2 * 16)  # pages, heads, tokens; keys and values side by side
    >>> keys = both[..., :16].transpose(1, 2)
    >>> keys.shape, matrix_sizes(keys)
    (torch.Size([3, 8, 2, 16]), (48, 16))
    """
    sizes = matrix_sizes(pages)
    if not pages.is_cuda or sizes is None:
        return None
    return pages.as_strided(sizes, (pages.stride(1), 1))


def matrix_sizes(pages: Float[Tensor, "pages Bk *head dim"]) -> tuple[int, int] | None:
    """The sizes of a `page_matrix`, if the pages lie as the copy engine wants it."""
    (count, block), dim = pages.shape[:2], pages.shape[-1]
    step_p, step_t = pages.stride()[:2]
    size = pages.element_size()
    fits = (
        count > 0
        and dim == pad(dim)
        and pages.stride(-1) == 1
        and pages.data_ptr() % 16 == 0
        and step_t > 0
        and step_p % step_t == 0
        and step_t * size % 16 == 0
        and step_t * size < 2**40
    )
    if not fits:
        return None
    offsets = [h * pages.stride(2) for h in range(pages.shape[2])] if pages.dim() == 4 else [0]
    rows = (count - 1) * (step_p // step_t) + max(x // step_t for x in offsets) + block
    columns = max(x % step_t for x in offsets) + dim
    starts_aligned = all(x % step_t * size % 16 == 0 for x in offsets)
    return (rows, columns) if columns <= step_t and rows < 2**31 and starts_aligned else None


def describe_matrix(matrix: Float[Tensor, "rows columns"], keys: int, dim: int) -> TensorDescriptor:
    """A `page_matrix`, read in tiles of some keys of one head."""
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [keys, dim])
