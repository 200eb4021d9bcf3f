"""Paged caches in the layouts of other projects, and back to PagedKV. A page is one block.

    here           k, v each [pages, Bk, Hkv, D]; k_idx [pages, Bk, Di]; a table and lengths
    official MSA   k, v each [pages, Hkv, Bk, D]
    vLLM           k | v in one array [pages, Hkv, Bk, 2 D]
    FlashInfer     k, v in one array [pages, 2, Bk, Hkv, D] (NHD) or [pages, 2, Hkv, Bk, D] (HND)
    SGLang         slots of tokens [slots, Hkv, D], and for each request the slot of each token
    TensorRT-LLM   NHD or HND with smaller pages, several to a block

The `from_` functions make views, not copies, wherever strides allow it. Then numbers that are
written to the other cache later are seen here too. Index keys have one head, so they have the same
layout everywhere. Pages of 8 bits are refused, since each project scales them differently.

>>> import numpy as np
>>> from msa import PagedKV
>>> k = np.arange(12.0).reshape(3, 2, 2, 1)  # three pages of two tokens with two heads of size 1
>>> table, lengths = np.array([[2, 0]]), np.array([3])
>>> cache = PagedKV(k, -k, k[:, :, 0], table, lengths)
>>> cache.flat(0)[0][..., 0]  # the keys of tokens 0, 1, 2: two heads each
array([[ 8.,  9.],
       [10., 11.],
       [ 0.,  1.]])
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float, Int

from msa.integrations import arrays, messages
from msa.ir import Array, PagedKV

Order = Literal["NHD", "HND"]


# -- official MSA ---------------------------------------------------------------------------------
def to_official(
    cache: PagedKV,
) -> tuple[Float[Array, "pages Hkv Bk D"], Float[Array, "pages Hkv Bk Dv"]]:
    """Pages of K and V with heads before tokens. The results are views.

    >>> k_pages, v_pages = to_official(cache)
    >>> k_pages[2, 1, :, 0]  # page 2, head 1: its two tokens
    array([ 9., 11.])
    """
    messages.check_no_scales(cache)
    return cache.k_pages.swapaxes(1, 2), cache.v_pages.swapaxes(1, 2)


def from_official(
    k_pages: Float[Array, "pages Hkv Bk D"], v_pages: Float[Array, "pages Hkv Bk Dv"],
    k_idx_pages: Float[Array, "pages Bk Di"], page_table: Int[Array, "B table"],
    lengths: Int[Array, " B"],
) -> PagedKV:  # fmt: skip
    """The same pages as PagedKV. Its arrays are views.

    >>> back = from_official(*to_official(cache), cache.k_idx_pages, table, lengths)
    >>> bool((back.k_pages == cache.k_pages).all())
    True
    """
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        messages.check_rank(name, pages, "pages Hkv Bk D")
    k, v = k_pages.swapaxes(1, 2), v_pages.swapaxes(1, 2)
    return PagedKV(k, v, k_idx_pages, page_table, lengths)


# -- vLLM -----------------------------------------------------------------------------------------
def to_vllm(cache: PagedKV) -> Float[Array, "pages Hkv Bk both"]:
    """K and V of a token side by side in one array. The result is a copy.

    >>> to_vllm(cache)[2, 1, 0]  # page 2, head 1, first token: key, value
    array([ 9., -9.])
    """
    return arrays.join(list(to_official(cache)), -1)


def from_vllm(
    kv_pages: Float[Array, "pages Hkv Bk both"], k_idx_pages: Float[Array, "pages Bk Di"],
    block_table: Int[Array, "B table"], seq_lens: Int[Array, " B"], head_dim: int | None = None,
) -> PagedKV:  # fmt: skip
    """The same pages as PagedKV. Its arrays are views.

    Args:
        head_dim: D, needed only if values have another size.

    >>> back = from_vllm(to_vllm(cache), cache.k_idx_pages, table, lengths)
    >>> bool((back.v_pages == cache.v_pages).all())
    True
    """
    messages.check_rank("kv_pages", kv_pages, "pages Hkv Bk both")
    dim = kv_pages.shape[-1] // 2 if head_dim is None else head_dim
    k, v = kv_pages[..., :dim], kv_pages[..., dim:]
    return from_official(k, v, k_idx_pages, block_table, seq_lens)


# -- FlashInfer -----------------------------------------------------------------------------------
def to_flashinfer(cache: PagedKV, order: Order = "NHD") -> Float[Array, "pages 2 x y D"]:
    """All K of a page, then all V, in one array. The result is a copy.

    Raises:
        ValueError: values have another size than keys.

    >>> to_flashinfer(cache)[2, :, 0, 1, 0]  # page 2, first token, head 1: key, value
    array([ 9., -9.])
    """
    messages.check_order(order)
    messages.check_no_scales(cache)
    messages.check_head_dims(cache.k_pages.shape[-1], cache.v_pages.shape[-1])
    both = arrays.stack([cache.k_pages, cache.v_pages], 1)
    return both if order == "NHD" else both.swapaxes(2, 3)


def from_flashinfer(
    kv_cache: Float[Array, "pages 2 x y D"], k_idx_pages: Float[Array, "pages Bk Di"],
    page_table: Int[Array, "B table"], lengths: Int[Array, " B"], order: Order = "NHD",
) -> PagedKV:  # fmt: skip
    """The same pages as PagedKV. Its arrays are views.

    >>> kv_cache = to_flashinfer(cache, "HND")
    >>> back = from_flashinfer(kv_cache, cache.k_idx_pages, table, lengths, "HND")
    >>> bool((back.k_pages == cache.k_pages).all())
    True
    """
    messages.check_order(order)
    messages.check_rank("kv_cache", kv_cache, "pages 2 x y D")
    both = kv_cache if order == "NHD" else kv_cache.swapaxes(2, 3)
    return PagedKV(both[:, 0], both[:, 1], k_idx_pages, page_table, lengths)


# -- SGLang ---------------------------------------------------------------------------------------
def to_sglang(
    cache: PagedKV,
) -> tuple[
    Float[Array, "slots Hkv D"],
    Float[Array, "slots Hkv Dv"],
    Float[Array, "slots Di"],
    Int[Array, "B tokens"],
]:
    """Buffers of token slots (views), and req_to_token, the slot of each token of each request.

    >>> k_buffer, _, _, req_to_token = to_sglang(cache)
    >>> req_to_token, k_buffer[req_to_token[0, :3], 0, 0]
    (array([[4, 5, 0, 1]], dtype=int32), array([ 8., 10.,  0.]))
    """
    messages.check_no_scales(cache)
    pages = cache.k_pages, cache.v_pages, cache.k_idx_pages
    k, v, k_idx = (x.reshape(-1, *x.shape[2:]) for x in pages)
    return k, v, k_idx, _smaller(cache.page_table, cache.k_pages.shape[1])


def from_sglang(
    k_buffer: Float[Array, "slots Hkv D"], v_buffer: Float[Array, "slots Hkv Dv"],
    k_idx_buffer: Float[Array, "slots Di"], req_to_token: Int[Array, "B tokens"],
    lengths: Int[Array, " B"], block_size: int,
) -> PagedKV:  # fmt: skip
    """The same slots as pages of block_size tokens. The arrays are views.

    Raises:
        ValueError: the slots of a request do not form whole pages in order. Then copy them, or
            start SGLang with --page-size block_size.

    >>> back = from_sglang(*to_sglang(cache), lengths, block_size=2)
    >>> back.page_table, bool((back.k_pages == cache.k_pages).all())
    (array([[2, 0]], dtype=int32), True)
    """
    buffers = k_buffer, v_buffer, k_idx_buffer
    messages.check_divides("block_size", block_size, len(k_buffer))
    k, v, k_idx = (x.reshape(-1, block_size, *x.shape[1:]) for x in buffers)
    table = _larger("req_to_token", req_to_token, lengths, block_size)
    return PagedKV(k, v, k_idx, table, lengths)


# -- TensorRT-LLM, and pages of any smaller size ---------------------------------------------------
def to_smaller_pages(
    cache: PagedKV, page_size: int = 32, order: Order = "NHD"
) -> tuple[Float[Array, "pages x y D"], Float[Array, "pages x y Dv"], Int[Array, "B table"]]:
    """K and V in pages of page_size tokens (views), and a table of these pages.

    Raises:
        ValueError: the page size does not divide the block size.

    >>> k_pages, _, small_table = to_smaller_pages(cache, page_size=1)
    >>> k_pages.shape, small_table
    ((6, 1, 2, 1), array([[4, 5, 0, 1]], dtype=int32))
    """
    messages.check_order(order)
    messages.check_no_scales(cache)
    messages.check_divides("page_size", page_size, cache.k_pages.shape[1])
    k, v = (x.reshape(-1, page_size, *x.shape[2:]) for x in (cache.k_pages, cache.v_pages))
    if order == "HND":
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    return k, v, _smaller(cache.page_table, cache.k_pages.shape[1] // page_size)


def from_smaller_pages(
    k_pages: Float[Array, "pages x y D"], v_pages: Float[Array, "pages x y Dv"],
    k_idx_pages: Float[Array, "blocks Bk Di"], page_table: Int[Array, "B table"],
    lengths: Int[Array, " B"], order: Order = "NHD",
) -> PagedKV:  # fmt: skip
    """A PagedKV in which each block is made of several small pages.

    The block size is that of k_idx_pages. The arrays are views if order is NHD, else copies.

    Raises:
        ValueError: the pages of a block are not neighbours in order, or the first of them does not
            start at a multiple of the block size.

    >>> k_pages, v_pages, small_table = to_smaller_pages(cache, page_size=1)
    >>> back = from_smaller_pages(k_pages, v_pages, cache.k_idx_pages, small_table, lengths)
    >>> back.page_table, bool((back.k_pages == cache.k_pages).all())
    (array([[2, 0]], dtype=int32), True)
    """
    messages.check_order(order)
    messages.check_rank("k_pages", k_pages, "pages x y D")
    if order == "HND":
        k_pages, v_pages = k_pages.swapaxes(1, 2), v_pages.swapaxes(1, 2)
    page_size, block_size = k_pages.shape[1], k_idx_pages.shape[1]
    messages.check_divides("page_size", page_size, block_size)
    k, v = (x.reshape(-1, block_size, *x.shape[2:]) for x in (k_pages, v_pages))
    pages = -(-lengths // page_size)
    table = _larger("page_table", page_table, pages, block_size // page_size)
    return PagedKV(k, v, k_idx_pages, table, lengths)


# -- shared by all layouts ------------------------------------------------------------------------
def _smaller(table: Int[Array, "B table"], parts: int) -> Int[Array, "B longer"]:
    """A table of the parts of each page, in order. Unused entries become negative numbers."""
    each = table[..., None] * parts + arrays.like(table, range(parts))
    return arrays.as_int32(each.reshape(len(table), -1))


def _larger(
    name: str, table: Int[Array, "B table"], counts: Int[Array, " B"], parts: int
) -> Int[Array, "B shorter"]:
    """A table of the pages that every `parts` entries form.

    The first counts[b] entries of row b are checked to form whole pages.
    """
    columns = -(-table.shape[1] // parts)
    wide = arrays.widen(table, columns * parts, 0).reshape(len(table), columns, parts)
    page = wide[..., 0] // parts
    place = arrays.like(table, range(parts))
    wanted = (page[..., None] * parts + place).reshape(len(table), -1)[:, : table.shape[1]]
    used = arrays.like(table, range(table.shape[1])) < counts[:, None]
    messages.check_whole_pages(name, used & (wanted != table))
    return arrays.as_int32(page)
