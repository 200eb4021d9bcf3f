"""The checks of a paged cache and of the pool behind it (R20), in the manner of `checks`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
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
MOST = 2**31 - 1
"""Tables and lengths are int32."""


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
    if cache.shared is not None:
        checks.check_array("cache.shared", cache.shared, ("uint8",))
        checks.check_shape("cache.shared", cache.shared, "pages", sizes)
        checks.check_same_place(**{"cache.k_pages": cache.k_pages, "cache.shared": cache.shared})


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


def check_written(cache: PagedKV) -> None:
    """What `append_tokens` changes has a place for each entry, and can be rounded to."""
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
        if checks.is_eight_bits(pages[name]):
            checks.check_torch(name, pages[name])
        check_own_memory(name, pages[name])
    checks.check_same_dtype(k_pages=pages["k_pages"], v_pages=pages["v_pages"])
    checks.check_same_place(**pages)
    check_apart(**pages)
    check_writable(**pages)
    if sizes["pages"] > MOST:
        raise ValueError(f"k_pages must have at most {MOST} pages, got {sizes['pages']}")


def check_changeable(cache: PagedKV) -> None:
    """The arrays of a pool can be written to, and now: what is captured would be done again."""
    check_writable(**{f"cache.{field.name}": getattr(cache, field.name) for field in fields(cache)})
    if checks.is_captured(cache.k_pages):
        raise ValueError(
            "sequence must not be changed by a PagePool while a CUDA graph is captured, got a call "
            "inside: reserve before, and write with msa.append_tokens inside"
        )


def check_writable(**arrays: Any) -> None:
    """Whether writing will fail is known beforehand."""
    for name, array in arrays.items():
        if array is None:
            continue
        if not checks.is_torch(array):
            if not array.flags.writeable:
                raise ValueError(f"{name} must be writable, got a read-only array: copy it")
        elif array.requires_grad:
            raise ValueError(
                f"{name} must not require a gradient, for none flows through pages, "
                "got requires_grad=True: detach it"
            )
        elif array.is_inference():
            import torch

            if not torch.is_inference_mode_enabled():
                raise ValueError(
                    f"{name} must not be a tensor of torch.inference_mode outside of it, got one: "
                    "make the pool outside, or call it inside"
                )


def check_own_memory(name: str, array: Any) -> None:
    """Each number has a place of its own, so that writing one leaves the others as they are."""
    strides = array.stride() if checks.is_torch(array) else array.strides
    expanded = any(stride == 0 and size > 1 for stride, size in zip(strides, array.shape))
    if expanded and 0 not in array.shape:
        raise ValueError(
            f"{name} must have memory for each number, got strides {list(strides)}: an expanded "
            "array must be copied"
        )


def check_apart(**arrays: Any) -> None:
    """No two arrays start at the same place: what is written to one would be read from the other.

    Arrays that interleave, such as halves of one tensor, start at different places.
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


def check_held(sequence: Any, lengths: list[int]) -> None:
    """One of the batch's sequences that has tokens."""
    check_sequence(sequence, len(lengths))
    if not lengths[sequence]:
        raise ValueError(f"sequence must have tokens, got {sequence}, an empty slot")


def read_slot(into: Any, lengths: list[int]) -> int:
    """An empty slot: the one that is asked for, or the first."""
    if into is None:
        if all(lengths):
            raise ValueError(
                f"into must be an empty slot, got none left of {len(lengths)}: free a sequence, or "
                "make a pool of a larger batch"
            )
        return lengths.index(0)
    checks.check_count("into", into, 0)
    if into >= len(lengths):
        raise ValueError(f"into must be 0 to {len(lengths) - 1}, got {into}")
    if lengths[into]:
        raise ValueError(
            f"into must be an empty slot, got {into}, which has {lengths[into]} tokens: free it"
        )
    return int(into)


def read_lengths(length: Any, sequences: int) -> list[int]:
    """One length for all sequences, or one for each, as plain integers."""
    several = list(length) if isinstance(length, Sequence) else [length] * sequences
    if len(several) != sequences:
        raise ValueError(
            f"length must be one number, or one for each of the {sequences} sequences, "
            f"got {len(several)}"
        )
    for one in several:
        checks.check_count("length", one, 0)
    return [int(one) for one in several]


def check_length(length: int, there: int, sequence: int) -> None:
    """Truncating adds no tokens."""
    if length > there:
        raise ValueError(
            f"length must be at most the {there} tokens of sequence {sequence}, got {length}"
        )


def check_reserved(written: int, counted: int, sequence: int) -> None:
    """The tokens that were reserved are there, and no others."""
    if written != counted:
        raise ValueError(
            f"sequence {sequence} must have the {counted} tokens that are reserved for it, got "
            f"{written} in cache.lengths: write all of them first, or truncate it to "
            f"{min(written, counted)}"
        )


def check_total(length: int, new: int, sequence: int) -> None:
    """Lengths are int32."""
    if length + new > MOST:
        raise ValueError(
            f"n must leave sequence {sequence} with at most {MOST} tokens, got {new} more for "
            f"its {length}"
        )


def check_export(cache: PagedKV, pages: Any) -> None:
    """The pages of one sequence are of the sizes and dtypes of a pool's."""
    checks.check_count("pages.length", pages.length, 1)
    sizes = {"blocks": -(-int(pages.length) // cache.k_pages.shape[1])}
    for name, dims in PAGE_DIMS.items():
        _, *letters = dims.split()
        ours, theirs = getattr(cache, name), getattr(pages, name.removesuffix("_pages"))
        name = f"pages.{name.removesuffix('_pages')}"
        sizes |= dict(zip(letters, ours.shape[1:]))
        checks.check_array(name, theirs, PAGE_DTYPES)
        checks.check_same_dtype(**{"the pool's": ours, name: theirs})
        checks.check_shape(name, theirs, " ".join(("blocks", *letters)), sizes)
    for name, dims in SCALE_DIMS.items():
        theirs, name = getattr(pages, f"{name}_scales"), f"{name}_scales"
        if (getattr(cache, name) is None) != (theirs is None):
            wanted = "None" if theirs is not None else "given"
            raise ValueError(
                f"pages.{name} must be {wanted} as the pool's are, got {checks.kind(theirs)}"
            )
        if theirs is not None:
            checks.check_array(f"pages.{name}", theirs, ("float32",))
            dims = dims.replace("pages", "blocks")
            checks.check_shape(f"pages.{name}", theirs, dims, sizes)


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
