"""A pool of pages, given out to sequences as they grow (R2): what serving needs beside `decode`.

Two classes, because two clocks tick here. `PagedKV` is a view, five arrays and nothing else: it is
what `decode` takes, and what a CUDA graph can be captured over, for its arrays stay where they are
while tables and lengths change inside them. `PagePool` is the book-keeping on the host: which page
is whose, and which are free. It never has to read anything back from the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from msa import checks, checks_cache
from msa.ir import Array, PagedKV


class PagePool:
    """Keys, values and index keys of a batch of sequences, each in pages of its own.

    The caller makes the pages, and so says of which library they are, of what dtype and on which
    device; the pool writes into them, and nowhere but in the pages of the sequence that grows.
    A page holds one block, so the block size is that of the pages. Nothing that was written is
    ever moved; a page comes back into the pool when its sequence is freed.

    Args:
        k_pages, v_pages, k_idx_pages: [pages, Bk, Hkv, D], [pages, Bk, Hkv, Dv], [pages, Bk, Di].
        batch: how many sequences there is room for; all of them are empty slots at first.
        pages_per_sequence: the width of the page table; None: all the pages there are.

    Raises:
        TypeError, ValueError: pages that do not fit together, counts below 1 (R20).

    >>> k_pages, v_pages = np.zeros((2, 3, 2, 1, 1))  # three pages of two tokens
    >>> pool = PagePool(k_pages, v_pages, np.zeros((3, 2, 1)), batch=2)
    >>> k = np.array([5.0, 6.0, 7.0])[:, None, None]
    >>> pool.append(1, k, k, k[:, 0])  # three tokens take two pages
    >>> one = np.full((2, 1, 1, 1), 8.0)
    >>> pool.append([0, 1], one, one, one[..., 0])  # one more token for each sequence
    >>> pool.lengths, pool.free_pages
    ([1, 4], 0)
    >>> pool.cache.flat(1)[0].ravel()
    array([5., 6., 7., 8.])
    >>> pool.free(1)
    >>> pool.lengths, pool.free_pages
    ([1, 0], 2)
    """

    def __init__(
        self,
        k_pages: Float[Array, "pages Bk Hkv D"],
        v_pages: Float[Array, "pages Bk Hkv Dv"],
        k_idx_pages: Float[Array, "pages Bk Di"],
        *,
        batch: int,
        pages_per_sequence: int | None = None,
    ) -> None:
        checks_cache.check_pages(k_pages=k_pages, v_pages=v_pages, k_idx_pages=k_idx_pages)
        checks.check_count("batch", batch, 1)
        if pages_per_sequence is None:
            pages_per_sequence = max(1, len(k_pages))
        checks.check_count("pages_per_sequence", pages_per_sequence, 1)
        self._table = np.full((batch, pages_per_sequence), NO_PAGE, np.int32)
        self._lengths = np.zeros(batch, np.int32)
        self._free = list(range(len(k_pages)))[::-1]
        table, lengths = (_beside(k_pages, x.copy()) for x in (self._table, self._lengths))
        self.cache = PagedKV(k_pages, v_pages, k_idx_pages, table, lengths)

    @property
    def lengths(self) -> list[int]:
        """The tokens of each sequence, from the host's book."""
        return self._lengths.tolist()

    @property
    def free_pages(self) -> int:
        """How many pages are nobody's."""
        return len(self._free)

    def append(
        self,
        sequence: int | Sequence[int],
        k: Float[Array, "*S n Hkv D"],
        v: Float[Array, "*S n Hkv Dv"],
        k_idx: Float[Array, "*S n Di"],
    ) -> None:
        """Write n more tokens of one sequence, or of each of S sequences. All of it or nothing.

        Gradients do not flow through pages.

        Args:
            sequence: which one, 0 to batch - 1, or a list of S different ones.
            k, v, k_idx: [n, Hkv, D], [n, Hkv, Dv], [n, Di] in the dtype of the pages; for a list
                of sequences [S, n, ...].

        Raises:
            TypeError, ValueError: no such sequence, tokens that do not fit the pages, a table
                that is too short, a pool without enough free pages (R20).
        """
        known = checks_cache.read_sequences(sequence, len(self._lengths))
        ids = np.array(known, np.int64)
        new = {"k": k, "v": v, "k_idx": k_idx}
        n = checks_cache.check_tokens(self.cache, isinstance(sequence, Sequence), len(ids), new)
        block = self.cache.k_pages.shape[1]
        before = self._lengths[ids]
        after = before.astype(np.int64) + n
        have, want = -(-before // block), -(-after // block)
        for s, length, needed in zip(known, after.tolist(), want.tolist()):
            checks_cache.check_width(self._table.shape[1], needed, length, s)
        checks_cache.check_room(int((want - have).sum()), self.free_pages, n, known)

        spans = zip(known, have.tolist(), want.tolist())
        entries = [(s, b) for s, start, stop in spans for b in range(start, stop)]
        self._enter(entries, [self._free.pop() for _ in entries])
        positions = before[:, None] + np.arange(n)
        page = self._table[ids[:, None], positions // block].astype(np.int64)
        where = tuple(_beside(k, x.ravel()) for x in (page, positions % block))
        for name, tokens in new.items():
            pages = getattr(self.cache, f"{name}_pages")
            tokens = tokens.detach() if checks.is_torch(tokens) else tokens
            pages[where] = tokens.reshape(-1, *pages.shape[2:])
        self._lengths[ids] = after
        self.cache.lengths[_beside(k, ids)] = _beside(k, self._lengths[ids])

    def free(self, sequence: int) -> None:
        """Give a sequence's pages back; its place in the batch is an empty slot then.

        Raises:
            TypeError, ValueError: no such sequence (R20).
        """
        checks_cache.check_sequence(sequence, len(self._lengths))
        row = self._table[sequence]
        owned = row[row != NO_PAGE].tolist()
        self.cache.lengths[sequence] = self._lengths[sequence] = 0
        self._enter([(sequence, b) for b in range(len(owned))], [NO_PAGE] * len(owned))
        self._free += owned[::-1]

    def _enter(self, entries: list[tuple[int, int]], pages: list[int]) -> None:
        """Write pages into the table, on the host and beside the pages."""
        if not entries:
            return  # as in most steps of a generation
        rows, columns = np.array(entries, np.int64).T
        numbers = np.array(pages, np.int32)
        self._table[rows, columns] = numbers
        rows, columns, numbers = (_beside(self.cache.k_pages, x) for x in (rows, columns, numbers))
        self.cache.page_table[rows, columns] = numbers


NO_PAGE = -1
"""What the page table holds where a sequence has no block."""


def _beside(like: Array, integers: np.ndarray) -> Array:
    """Integers in the library, and on the device, of `like`."""
    if not checks.is_torch(like):
        return integers
    import torch

    return torch.from_numpy(integers).to(like.device)
