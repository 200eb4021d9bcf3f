"""The checks of a PagePool: its pages, its sequences, and the tokens that it is given (R20)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn

from msa import checks
from msa.cache_checks import check_apart, check_own_memory
from msa.page_book import LARGEST_INT32
from msa.paged_kv import PAGE_DIMS, PAGE_DTYPES, PagedKV, check_sequence


# -- pages and tokens -----------------------------------------------------------------------------
def check_pages(**pages: Any) -> None:
    """The three page arrays of a new pool fit together and can be written to."""
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
    if sizes["pages"] > LARGEST_INT32:
        raise ValueError(f"k_pages must have at most {LARGEST_INT32} pages, got {sizes['pages']}")


def check_changeable(cache: PagedKV) -> None:
    """The arrays of a pool can be written to, and no CUDA graph is captured.

    A graph would repeat the change of the arrays at each replay, but not that of the book.
    """
    check_writable(**{f"cache.{field.name}": getattr(cache, field.name) for field in fields(cache)})
    if checks.is_captured(cache.k_pages):
        raise ValueError(
            "sequence must not be changed by a PagePool while a CUDA graph is captured, got a call "
            "inside: reserve before, and write with msa.append_tokens inside"
        )


def check_writable(**arrays: Any) -> None:
    """Arrays that are not read-only, need no gradient, and can be written to in this mode."""
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


def check_table(batch: int, pages_per_sequence: int) -> None:
    """The table of a pool has at most LARGEST_INT32 entries."""
    if batch * pages_per_sequence > LARGEST_INT32:
        raise ValueError(
            f"batch must leave the page table with at most {LARGEST_INT32} entries, "
            f"got {batch} x {pages_per_sequence} pages per sequence: {batch * pages_per_sequence}"
        )


def refuse_table(batch: int, pages_per_sequence: int) -> NoReturn:
    """Name the sizes of a table for which there is no memory."""
    raise ValueError(
        f"batch must leave the page table with a size that fits into memory, got {batch} x "
        f"{pages_per_sequence} pages per sequence"
    ) from None


# -- sequences and lengths ------------------------------------------------------------------------
def read_sequences(sequence: Any, batch: int) -> list[int]:
    """Check one sequence, or several different ones; return them as a list of integers."""
    several = list(sequence) if isinstance(sequence, Sequence) else [sequence]
    for place, s in enumerate(several):
        check_sequence(s, batch)
        if s in several[:place]:
            raise ValueError(f"sequence must name each sequence once, got {s} twice")
    return [int(s) for s in several]


def check_held(sequence: Any, lengths: list[int]) -> None:
    """A sequence of the batch that has tokens."""
    check_sequence(sequence, len(lengths))
    if not lengths[sequence]:
        raise ValueError(f"sequence must have tokens, got {sequence}, an empty slot")


def read_slot(into: Any, lengths: list[int]) -> int:
    """Return the empty slot that is asked for, or the first one."""
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
    """Return a length for each sequence, from one number for all or a list of numbers."""
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
    """A truncated sequence gets no longer."""
    if length > there:
        raise ValueError(
            f"length must be at most the {there} tokens of sequence {sequence}, got {length}"
        )


def check_reserved(written: int, counted: int, sequence: int) -> None:
    """All reserved tokens are written, and no others."""
    if written != counted:
        raise ValueError(
            f"sequence {sequence} must have the {counted} tokens that are reserved for it, got "
            f"{written} in cache.lengths: write all of them first, or truncate it to "
            f"{min(written, counted)}"
        )
