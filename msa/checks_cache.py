"""The checks of a paged cache and of the pool behind it (R20), in the manner of `checks`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from msa import checks

if TYPE_CHECKING:
    from msa.ir import PagedKV

PAGE_DIMS = {
    "k_pages": "pages Bk Hkv D",
    "v_pages": "pages Bk Hkv Dv",
    "k_idx_pages": "pages Bk Di",
}
CACHE_DIMS = PAGE_DIMS | {"page_table": "B table", "lengths": "B"}
SCALE_DIMS = {"k": "pages Hkv", "v": "pages Hkv", "k_idx": "pages"}
TOKEN_DIMS = {"k": "n Hkv D", "v": "n Hkv Dv", "k_idx": "n Di"}
PAGE_DTYPES = (*checks.FLOAT_DTYPES, checks.EIGHT_BITS)


def check_arrays(
    cache: PagedKV, sizes: dict[str, int], counted_in: tuple[str, ...] = checks.INTEGER_DTYPES
) -> None:
    """Page shapes agree; the sizes found are added to `sizes`.

    `counted_in` are the dtypes that the table and the lengths may have.
    """
    for name, dims in CACHE_DIMS.items():
        array = getattr(cache, name)
        if name in PAGE_DIMS:
            checks.check_array(f"cache.{name}", array, PAGE_DTYPES)
        else:
            checks.check_integers(f"cache.{name}", array, counted_in)
        checks.check_shape(f"cache.{name}", array, dims, sizes)


def check_cache(
    cache: PagedKV, sizes: dict[str, int], counted_in: tuple[str, ...] = checks.INTEGER_DTYPES
) -> None:
    """What a caller gives: the arrays, and scales beside 8-bit pages alone."""
    check_arrays(cache, sizes, counted_in)
    check_scales(cache, sizes)


def check_contents(cache: PagedKV, sizes: dict[str, int]) -> None:
    """Every page that a sequence needs is in its table, in range, and has good scales.

    `sizes` holds Bk, pages and n, the number of queries per sequence. Waits for the device once.
    """
    table, lengths, *bad = checks.read_together(
        [cache.page_table, cache.lengths, *_pages_with_bad_scales(cache, sizes)]
    )
    for s, length in enumerate(lengths.tolist()):
        if length < 0 or 0 < length < sizes["n"]:
            raise ValueError(
                f"cache.lengths must be 0 or at least the {sizes['n']} queries, got {length} "
                f"in sequence {s}"
            )
        own = check_row(table[s], length, s, sizes)
        if any(pages[s].any() for pages in bad):
            check_own_scales(cache, own, s)


def _pages_with_bad_scales(cache: PagedKV, sizes: dict[str, int]) -> list[Any]:
    """Where the table, as far as it is in use, names a page with a scale of no use.

    One array [B, table] for each kind of page with scales; on the device.
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


def check_own_scales(cache: PagedKV, own: np.ndarray, sequence: int) -> None:
    """The scales of a sequence's own pages, which the host knows, are finite and positive."""
    for name in SCALE_DIMS:
        scales = getattr(cache, f"{name}_scales")
        if scales is None or not len(own):
            continue
        checks.check_plain(f"cache.{name}_scales", scales)
        found = checks.to_numpy(scales[checks.beside(scales, own)])
        bad = ~((found > 0) & (found < np.inf))
        if bad.any():
            block = int(np.argwhere(bad)[0, 0])
            raise ValueError(
                f"cache.{name}_scales must be finite and positive, got {found[bad][0]} "
                f"in page {own[block]}, block {block} of sequence {sequence}"
            )


def with_index_dtypes(cache: PagedKV) -> PagedKV:
    """The table and the lengths in dtypes that backends count with."""
    others = {
        name: array.long() if checks.is_torch(array) else array.astype(np.int64)
        for name in ("page_table", "lengths")
        if checks.dtype_name(array := getattr(cache, name)) not in checks.INDEX_DTYPES
    }
    return replace(cache, **others) if others else cache


def check_scaled(cache: PagedKV, name: str) -> None:
    """8-bit pages come with scales."""
    pages, scales = getattr(cache, f"{name}_pages"), getattr(cache, f"{name}_scales")
    if checks.is_eight_bits(pages) and scales is None:
        raise ValueError(
            f"cache.{name}_scales must be given where cache.{name}_pages has dtype {pages.dtype}, "
            "got None"
        )


def check_scales(cache: PagedKV, sizes: dict[str, int]) -> None:
    """8-bit pages come with scales, and scales with 8-bit pages."""
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


def check_queries(cache: PagedKV, q: Any, q_idx: Any) -> None:
    """Queries have the dtype of what they meet, or any where that is of 8 bits; one place for all.

    Keys and values have 8 bits together or not at all.
    """
    pages = {f"cache.{name}": getattr(cache, name) for name in PAGE_DIMS}
    k, v, k_idx = pages.values()
    main = {"cache.k_pages": k, "cache.v_pages": v}
    wide = not (checks.is_eight_bits(k) or checks.is_eight_bits(v))
    checks.check_same_dtype(**({"q": q} | main if wide else main))
    if not checks.is_eight_bits(k_idx):
        checks.check_same_dtype(q_idx=q_idx, **{"cache.k_idx_pages": k_idx})
    names = (*CACHE_DIMS, *(f"{name}_scales" for name in SCALE_DIMS))
    parts = {f"cache.{name}": getattr(cache, name) for name in names}
    parts = {name: array for name, array in parts.items() if array is not None}
    checks.check_same_place(q=q, q_idx=q_idx, **parts)


def check_row(row: np.ndarray, length: int, sequence: int, sizes: dict[str, int]) -> np.ndarray:
    """The entries of the table that one sequence needs, in int64; `sizes` holds Bk and pages."""
    if length < 0:
        raise ValueError(f"cache.lengths must be at least 0, got {length} in sequence {sequence}")
    needed = -(-length // sizes["Bk"])
    check_width(len(row), needed, length, sequence)
    own = row[:needed]
    bad = np.flatnonzero((own < 0) | (own >= sizes["pages"]))
    if len(bad):
        raise ValueError(
            f"cache.page_table must hold pages 0 to {sizes['pages'] - 1}, got {own[bad[0]]} "
            f"for block {bad[0]} of sequence {sequence}"
        )
    return own.astype(np.int64)


def check_width(width: int, needed: int, length: int, sequence: int) -> None:
    """A row of the table has an entry for each block."""
    if needed > width:
        raise ValueError(
            f"cache.page_table must have {needed} entries for the {length} tokens of "
            f"sequence {sequence}, got {width}"
        )


def check_sequence(sequence: Any, batch: int) -> int:
    """One of the batch's sequences; no counting from the end."""
    number = checks.check_count("sequence", sequence, 0)
    if number >= batch:
        raise ValueError(f"sequence must be 0 to {batch - 1}, got {number}")
    return number


def check_pages(**pages: Any) -> None:
    """The three page arrays of an empty pool."""
    sizes: dict[str, int] = {}
    for name, dims in PAGE_DIMS.items():
        checks.check_array(name, pages[name], PAGE_DTYPES)
        checks.check_shape(name, pages[name], dims, sizes)
    checks.check_same_dtype(k_pages=pages["k_pages"], v_pages=pages["v_pages"])
    checks.check_same_place(**pages)


def read_sequences(sequence: Any, batch: int) -> list[int]:
    """One sequence, or several different ones, as plain integers."""
    several = list(sequence) if isinstance(sequence, Sequence) else [sequence]
    for place, s in enumerate(several):
        check_sequence(s, batch)
        if s in several[:place]:
            raise ValueError(f"sequence must name each sequence once, got {s} twice")
    return [int(s) for s in several]


def check_tokens(cache: PagedKV, with_lead: bool, sequences: int, tokens: dict[str, Any]) -> int:
    """New keys, values and index keys fit the pages; returns how many there are per sequence.

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


def check_room(needed: int, free: int, new: int, sequences: list[int]) -> None:
    """The pool is not full."""
    if needed > free:
        raise ValueError(
            f"k_pages must have {needed} free pages for {new} more tokens in each of the "
            f"sequences {sequences}, got {free}: free a sequence, or make a larger pool"
        )
