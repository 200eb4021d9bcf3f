"""PageBook: the host's record of which sequence holds which page of a `PagePool` (R2).

A `Change` is planned first, and refused if there is no room; planning changes nothing. Then
`PageBook.apply` makes it in the record. If the arrays on the device cannot be changed after that,
the inverse of the change undoes it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from msa.paged_kv import check_width

LARGEST_INT32 = 2**31 - 1
"""Page ids, lengths and the entries of a table are counted in int32."""
NO_PAGE = -1
"""What the page table holds where a sequence has no block."""


@dataclass(frozen=True)
class Change:
    """New values for some entries of the table and for some lengths.

    Where an entry changes from one page to another, the page is copied.
    """

    entries: list[tuple[int, int, int, int]]
    """(sequence, block, page before, page after)."""
    lengths: list[tuple[int, int, int]]
    """(sequence, length before, length after)."""

    @property
    def copies(self) -> list[tuple[int, int]]:
        """(page, its copy)."""
        return [(old, new) for _, _, old, new in self.entries if NO_PAGE not in (old, new)]

    def inverse(self) -> Change:
        """The change that undoes this one, last entry first, because free pages are a stack."""
        return Change(
            [(s, block, new, old) for s, block, old, new in reversed(self.entries)],
            [(s, after, before) for s, before, after in self.lengths],
        )


class PageBook:
    """Tables, lengths, and how many sequences hold each page; a page that none holds is free.

    >>> book = PageBook(pages=3, batch=2, width=2, block=4)
    >>> book.apply(book.grow([0], 6)), book.table.tolist(), book.holders
    ({}, [[0, 1], [-1, -1]], [1, 1, 0])
    >>> book.apply(book.share(0, 1)), book.table.tolist(), book.holders  # both pages become shared
    ({0: True, 1: True}, [[0, 1], [0, 1]], [2, 2, 0])
    >>> change = book.grow([0, 1], 1)  # the second may keep the page that the first leaves
    >>> change.copies, book.apply(change), book.table.tolist(), book.holders
    ([(1, 2)], {1: False}, [[0, 2], [0, 1]], [2, 1, 1])
    >>> book.apply(book.shrink([0], [4])), book.free, book.lengths
    ({}, [2], array([4, 7]))
    """

    def __init__(self, pages: int, batch: int, width: int, block: int) -> None:
        self.block = block
        self.table = np.full((batch, width), NO_PAGE, np.int32)
        self.lengths = np.zeros(batch, np.int64)
        self.holders = [0] * pages
        self.free = list(range(pages))[::-1]

    def grow(self, sequences: list[int], n: int) -> Change:
        """Plan n more tokens for each sequence; a shared last page that gets some is copied."""
        needed: list[tuple[int, int, int]] = []
        lengths: list[tuple[int, int, int]] = []
        left = Counter[int]()  # how many of its holders a page loses
        for s in sequences:
            before, width = int(self.lengths[s]), self.table.shape[1]
            have, want = self.blocks(before), self.blocks(before + n)
            check_width(width, want, before + n, s)
            check_total(before, n, s)
            if n and before % self.block:
                last = int(self.table[s, have - 1])
                if self.holders[last] - left[last] > 1:
                    left[last] += 1
                    needed.append((s, have - 1, last))
            needed += [(s, b, NO_PAGE) for b in range(have, want)]
            lengths.append((s, before, before + n))
        check_room(len(needed), len(self.free), n, sequences)
        pages = reversed(self.free)
        return Change([(*entry, page) for entry, page in zip(needed, pages)], lengths)

    def shrink(self, sequences: list[int], lengths: list[int]) -> Change:
        """Plan to keep so many tokens of each sequence."""
        entries: list[tuple[int, int, int, int]] = []
        changed: list[tuple[int, int, int]] = []
        for s, after in zip(sequences, lengths):
            before = int(self.lengths[s])
            blocks = range(self.blocks(after), self.blocks(before))
            entries += [(s, b, int(self.table[s, b]), NO_PAGE) for b in reversed(blocks)]
            changed.append((s, before, after))
        return Change(entries, changed)

    def share(self, sequence: int, into: int) -> Change:
        """Plan that an empty slot holds all pages of a sequence as well."""
        length = int(self.lengths[sequence])
        row = self.table[sequence, : self.blocks(length)].tolist()
        return Change([(into, b, NO_PAGE, p) for b, p in enumerate(row)], [(into, 0, length)])

    def apply(self, change: Change) -> dict[int, bool]:
        """Make a change; returns which pages become shared (True) or stop being so (False)."""
        turned: dict[int, bool] = {}
        for sequence, block, old, new in change.entries:
            if new != NO_PAGE:
                if not self.holders[new]:
                    self.free.pop()
                self.holders[new] += 1
                if self.holders[new] == 2:
                    turned[new] = True
            if old != NO_PAGE:
                self.holders[old] -= 1
                if self.holders[old] == 1:
                    turned[old] = False
                elif not self.holders[old]:
                    self.free.append(old)
            self.table[sequence, block] = new
        for sequence, _, after in change.lengths:
            self.lengths[sequence] = after
        return turned

    def blocks(self, length: int) -> int:
        """How many pages that many tokens take."""
        return -(-length // self.block)


# -- checks (R20) ---------------------------------------------------------------------------------
def check_total(length: int, new: int, sequence: int) -> None:
    """A length of a sequence fits into int32."""
    if length + new > LARGEST_INT32:
        raise ValueError(
            f"n must leave sequence {sequence} with at most {LARGEST_INT32} tokens, got {new} more "
            f"for its {length}"
        )


def check_room(needed: int, free: int, new: int, sequences: list[int]) -> None:
    """The pool has enough free pages."""
    if needed > free:
        raise ValueError(
            f"k_pages must have {needed} free pages for {new} more tokens in each of the "
            f"sequences {sequences}, got {free}: free a sequence, or make a larger pool"
        )
