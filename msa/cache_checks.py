"""The checks of a PagedKV that is given to `decode`, `append_tokens` or a pool (R2, R20)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np

from msa import checks, chips
from msa.paged_kv import (
    CACHE_DIMS,
    PAGE_DIMS,
    SCALE_DIMS,
    TOKEN_DIMS,
    PagedKV,
    check_arrays,
    check_own_scales,
    check_row,
    check_scaled,
)
from msa.selection import Selection, check_canonical
from msa.sequences import Sequences, check_borders


# -- shapes, dtypes and places --------------------------------------------------------------------
def check_cache(
    cache: PagedKV, sizes: dict[str, int], counted_in: tuple[str, ...] = checks.INTEGER_DTYPES
) -> None:
    """The arrays agree in shape, and only 8-bit pages have scales; fills `sizes`."""
    check_arrays(cache, sizes, counted_in)
    check_scales(cache, sizes)
    if cache.shared is not None:
        checks.check_array("cache.shared", cache.shared, ("uint8",))
        checks.check_shape("cache.shared", cache.shared, "pages", sizes)
        checks.check_same_place(**{"cache.k_pages": cache.k_pages, "cache.shared": cache.shared})


def check_scales(cache: PagedKV, sizes: dict[str, int]) -> None:
    """8-bit pages have scales, and other pages have none."""
    for name, dims in SCALE_DIMS.items():
        check_scaled(cache, name)
        pages, scales = getattr(cache, f"{name}_pages"), getattr(cache, f"{name}_scales")
        if scales is None:
            continue
        if not checks.is_eight_bits(pages):
            raise ValueError(
                f"cache.{name}_scales must be None where cache.{name}_pages has dtype "
                f"{pages.dtype}, got {checks.kind(scales)}"
            )
        checks.check_array(f"cache.{name}_scales", scales, ("float32",))
        checks.check_shape(f"cache.{name}_scales", scales, dims, sizes)


def check_queries(cache: PagedKV, q: Any, q_idx: Any | None) -> None:
    """Queries have the dtype of the pages, or any dtype where these have 8 bits.

    All arrays are on one device. Keys and values have 8 bits together or not at all. Without q_idx
    index keys may have any dtype.
    """
    pages = {f"cache.{name}": getattr(cache, name) for name in PAGE_DIMS}
    k, v, k_idx = pages.values()
    main = {"cache.k_pages": k, "cache.v_pages": v}
    wide = not (checks.is_eight_bits(k) or checks.is_eight_bits(v))
    checks.check_same_dtype(**({"q": q} | main if wide else main))
    if q_idx is not None and not checks.is_eight_bits(k_idx):
        checks.check_same_dtype(q_idx=q_idx, **{"cache.k_idx_pages": k_idx})
    names = (*CACHE_DIMS, *(f"{name}_scales" for name in SCALE_DIMS))
    parts = {f"cache.{name}": getattr(cache, name) for name in names}
    parts = {name: array for name, array in parts.items() if array is not None}
    queries = {"q": q} if q_idx is None else {"q": q, "q_idx": q_idx}
    checks.check_same_place(**queries, **parts)


def check_given_ids(ids: Any, q: Any, sizes: dict[str, int]) -> None:
    """Block ids for a step of decoding fit its queries; what they hold is not read."""
    checks.check_plain("selection", ids)
    if checks.dtype_name(ids) != "int32":
        raise TypeError(f"selection must have dtype int32, got {ids.dtype}")
    checks.check_shape("selection", ids, "B n Hkv k", sizes)
    checks.check_at_most("selection.shape[3]", sizes["k"], LARGEST_TOP_K=checks.LARGEST_TOP_K)
    checks.check_same_place(q=q, selection=ids)


def check_id_contents(ids: Any, lengths: list[int], block_size: int) -> None:
    """Ids [B, n, Hkv, k] of the sequences that are not empty have R8's form."""
    slots = [s for s, length in enumerate(lengths) if length > 0]
    n = ids.shape[1]
    cu_k = tuple(accumulate((lengths[s] for s in slots), initial=0))
    sequences = Sequences(tuple(n * i for i in range(len(slots) + 1)), cu_k)
    live = ids[checks.beside(ids, np.array(slots, np.int64))]
    packed = live.reshape(-1, *ids.shape[2:])
    check_canonical(Selection(packed, sequences, block_size), "selection")


def check_index_pages(cache: PagedKV) -> None:
    """Index queries are rounded to 8 bits for index keys that have 8 bits already."""
    if not checks.is_eight_bits(cache.k_idx_pages):
        raise ValueError(
            "index_dtype must be None where cache.k_idx_pages has dtype "
            f"{cache.k_idx_pages.dtype}, got 'fp8_e4m3': make pages of 8 bits"
        )


def read_query_borders(cu_seqlens_q: Any, batched: bool, sizes: dict[str, int]) -> tuple[int, ...]:
    """Where the queries of each sequence of a cache start and end.

    `sizes` holds B, and n if the queries are batched, else Tq.
    """
    batch = sizes["B"]
    if batched:
        checks.check_absent("cu_seqlens_q", cu_seqlens_q, "tensors are batched")
        return tuple(sizes["n"] * s for s in range(batch + 1))
    if cu_seqlens_q is None:
        if batch != 1:
            raise ValueError(
                f"cu_seqlens_q must be given for packed queries of {batch} sequences, got None"
            )
        return (0, sizes["Tq"])
    borders = checks.read_borders("cu_seqlens_q", cu_seqlens_q)
    if len(borders) != batch + 1:
        raise ValueError(
            f"cu_seqlens_q must have {batch + 1} entries for the {batch} sequences of the cache, "
            f"got {len(borders)}"
        )
    check_borders("cu_seqlens_q", borders)
    if borders[-1] != sizes["Tq"]:
        raise ValueError(f"cu_seqlens_q must end with Tq = {sizes['Tq']}, got {borders[-1]}")
    return borders


def check_tokens(cache: PagedKV, with_lead: bool, sequences: int, tokens: dict[str, Any]) -> int:
    """New keys, values and index keys fit the pages; return how many each sequence gets.

    With a leading dim there is one entry of it for each of the sequences. Pages of 8 bits take
    tokens of any KERNEL_DTYPES, those of k and v alike.
    """
    sizes = {"S": sequences}
    for name, dims in PAGE_DIMS.items():
        sizes |= dict(zip(dims.split()[2:], getattr(cache, name).shape[2:]))
    for name, dims in TOKEN_DIMS.items():
        pages = {f"cache.{name}_pages": getattr(cache, f"{name}_pages")}
        if getattr(cache, f"{name}_scales") is None:
            checks.check_array(name, tokens[name])
            checks.check_same_dtype(**pages, **{name: tokens[name]})
        else:
            checks.check_array(name, tokens[name], checks.KERNEL_DTYPES)
        checks.check_same_place(**pages, **{name: tokens[name]})
        checks.check_shape(name, tokens[name], f"S {dims}" if with_lead else dims, sizes)
    checks.check_same_dtype(k=tokens["k"], v=tokens["v"])
    return sizes["n"]


def check_written(cache: PagedKV) -> None:
    """`append_tokens` can write each entry of the arrays separately, and round to their dtype."""
    for name in (*PAGE_DIMS, *(f"{name}_scales" for name in SCALE_DIMS), "lengths"):
        array = getattr(cache, name)
        if array is None:
            continue
        check_own_memory(f"cache.{name}", array)
        if checks.is_eight_bits(array) and checks.is_interpreted():
            raise TypeError(
                f"cache.{name} must not be of 8 bits under TRITON_INTERPRET=1, for Triton's "
                f"interpreter rounds to them wrongly, got {array.dtype}: use PagePool.append"
            )
    check_apart(**{f"cache.{name}": getattr(cache, name) for name in PAGE_DIMS})


def check_chip(cache: PagedKV) -> None:
    """The GPU has numbers of 8 bits if the pages do."""
    for name in PAGE_DIMS:
        pages = getattr(cache, name)
        if checks.is_eight_bits(pages) and pages.is_cuda:
            chips.check_eight_bits(
                f"cache.{name}", "of 16 or 32 bits", "float8_e4m3fn", pages.device
            )


def check_own_memory(name: str, array: Any) -> None:
    """Each number of the array has its own place in memory, unlike in expanded arrays."""
    strides = array.stride() if checks.is_torch(array) else array.strides
    expanded = any(stride == 0 and size > 1 for stride, size in zip(strides, array.shape))
    if expanded and 0 not in array.shape:
        raise ValueError(
            f"{name} must have memory for each number, got strides {list(strides)}: an expanded "
            "array must be copied"
        )


def check_apart(**arrays: Any) -> None:
    """No two arrays start at the same address, where one write would change both.

    Arrays that interleave, such as halves of one tensor, start at different addresses.
    """
    seen: dict[int, str] = {}
    for name, array in arrays.items():
        start = array.data_ptr() if checks.is_torch(array) else array.ctypes.data
        if 0 in array.shape or not start:  # without memory
            continue
        if start in seen:
            raise ValueError(
                f"{name} must have memory of its own, got that of {seen[start]}: make one array "
                "for each"
            )
        seen[start] = name


# -- what tables, lengths and scales hold ---------------------------------------------------------
def check_contents(
    cache: PagedKV, sizes: dict[str, int], counts: Sequence[int] | None = None
) -> list[int]:
    """Each sequence has a page in range for each block, with scales that can be used.

    `sizes` holds Bk, pages and n, the number of queries per sequence; a sequence of length 0 is an
    empty slot. With `counts`, the queries of each sequence, all of them are tokens of it. Returns
    the lengths. Waits for the device once.
    """
    table, lengths, *bad = checks.read_together(
        [cache.page_table, cache.lengths, *_pages_with_bad_scales(cache, sizes)]
    )
    for s, length in enumerate(lengths.tolist()):
        n, empty = (sizes["n"], "0 or ") if counts is None else (counts[s], "")
        if length < 0 or (length < n and (length or not empty)):
            raise ValueError(
                f"cache.lengths must be {empty}at least the {n} queries, got {length} "
                f"in sequence {s}"
            )
        own = check_row(table[s], length, s, sizes)
        if any(pages[s].any() for pages in bad):
            check_own_scales(cache, own, s)
    return lengths.tolist()


def _pages_with_bad_scales(cache: PagedKV, sizes: dict[str, int]) -> list[Any]:
    """Where the part of the table in use names a page whose scale is not finite and positive.

    One array [B, table] on the device for each kind of page with scales.
    """
    found = []
    for name in SCALE_DIMS:
        scales = getattr(cache, f"{name}_scales")
        if scales is None or not sizes["pages"]:
            continue
        import torch

        good = ((scales > 0) & (scales < float("inf"))).reshape(len(scales), -1).all(1)
        place = torch.arange(cache.page_table.shape[1], device=scales.device)
        used = place * sizes["Bk"] < cache.lengths.long()[:, None]
        found.append(used & ~good[cache.page_table.long().clamp(0, len(scales) - 1)])
    return found


def with_index_dtypes(cache: PagedKV) -> PagedKV:
    """The same cache with its table and lengths in int32 or int64, as backends read them."""
    others = {
        name: array.long() if checks.is_torch(array) else array.astype(np.int64)
        for name in ("page_table", "lengths")
        if checks.dtype_name(array := getattr(cache, name)) not in checks.INDEX_DTYPES
    }
    return replace(cache, **others) if others else cache
