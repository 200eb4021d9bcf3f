"""A pool of pages, given out to sequences as they grow (R2): what serving needs beside `decode`.

Two classes, because two clocks tick here. `PagedKV` is a view, arrays and nothing else: it is
what `decode` takes, and what a CUDA graph can be captured over, for its arrays stay where they are
while tables and lengths change inside them. `PagePool` is the book-keeping on the host: which page
is whose, and which are free. It never has to read anything back from the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from msa import checks, checks_cache, eight_bits
from msa.ir import Array, PagedKV


class PagePool:
    """Keys, values and index keys of a batch of sequences, each in pages of its own.

    The caller makes the pages, and so says of which library they are, of what dtype and on which
    device; the pool writes into them, and nowhere but in the pages of the sequence that grows.
    A page holds one block, so the block size is that of the pages. Nothing that was written is
    ever moved; a page comes back into the pool when its sequence is freed.

    Pages of torch.float8_e4m3fn, those of k and v or those of index keys or all of them, get scales
    from the pool, and tokens are rounded as they are written (`msa.eight_bits`): half the bytes of
    float16 to hold and to read. `cache_quality` says what it costs.

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
        scales = (_scales(pages) for pages in (k_pages, v_pages, k_idx_pages))
        self.cache = PagedKV(k_pages, v_pages, k_idx_pages, table, lengths, *scales)

    @property
    def lengths(self) -> list[int]:
        """The tokens of each sequence, from the host's book."""
        return self._lengths.tolist()

    @property
    def free_pages(self) -> int:
        """How many pages are nobody's."""
        return len(self._free)

    def reserve(self, sequence: int | Sequence[int], n: int) -> None:
        """Give one sequence, or each of several, the pages of n more tokens. All of it or nothing.

        For callers whose own code on the device writes these tokens and raises `cache.lengths`, as
        a captured CUDA graph does: the table is ready for them, and `lengths`, the host's book,
        counts them already. `append` is this and the writing; called next, it goes on behind them.
        Where pages have scales, these are the writer's, too (`msa.eight_bits` has the rule).

        Args:
            sequence: which one, 0 to batch - 1, or a list of different ones.
            n: new tokens of each, at least 0.

        Raises:
            TypeError, ValueError: no such sequence, n below 0, a table that is too short, a pool
                without enough free pages (R20).

        >>> k_pages, v_pages = np.zeros((2, 3, 2, 1, 1))  # three pages of two tokens
        >>> pool = PagePool(k_pages, v_pages, np.zeros((3, 2, 1)), batch=1)
        >>> pool.reserve(0, 3)
        >>> pool.lengths, pool.free_pages, pool.cache.page_table[0].tolist(), pool.cache.lengths
        ([3], 1, [0, 1, -1], array([0], dtype=int32))
        >>> k_pages[0] = 5.0  # two of the three: the work of the caller
        >>> pool.cache.lengths[0] += 2
        >>> pool.cache.flat(0)[0].ravel()
        array([5., 5.])
        """
        checks.check_count("n", n, 0)
        self._reserve(checks_cache.read_sequences(sequence, len(self._lengths)), int(n))

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
                of sequences [S, n, ...]. For pages of 8 bits in float16, bfloat16 or float32.

        Raises:
            TypeError, ValueError: no such sequence, tokens that do not fit the pages, a table
                that is too short, a pool without enough free pages (R20).
        """
        known = checks_cache.read_sequences(sequence, len(self._lengths))
        ids = np.array(known, np.int64)
        new = {"k": k, "v": v, "k_idx": k_idx}
        n = checks_cache.check_tokens(self.cache, isinstance(sequence, Sequence), len(ids), new)
        before = self._lengths[ids]
        self._reserve(known, n)
        positions, block = before[:, None] + np.arange(n), self.cache.k_pages.shape[1]
        page = self._table[ids[:, None], positions // block].astype(np.int64).ravel()
        self._write(new, page, (positions % block).ravel())
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

    def _reserve(self, sequences: list[int], n: int) -> None:
        """Pages for n more tokens each, in the table; the host's lengths count them."""
        block, ids = self.cache.k_pages.shape[1], np.array(sequences, np.int64)
        before = self._lengths[ids]
        after = before.astype(np.int64) + n
        have, want = -(-before // block), -(-after // block)
        for s, length, needed in zip(sequences, after.tolist(), want.tolist()):
            checks_cache.check_width(self._table.shape[1], needed, length, s)
        checks_cache.check_room(int((want - have).sum()), self.free_pages, n, sequences)

        spans = zip(sequences, have.tolist(), want.tolist())
        entries = [(s, b) for s, start, stop in spans for b in range(start, stop)]
        self._enter(entries, [self._free.pop() for _ in entries])
        self._lengths[ids] = after

    def _write(self, new: dict[str, Array], page: np.ndarray, offset: np.ndarray) -> None:
        """Tokens into pages of their own dtype, or of 8 bits (`eight_bits`)."""
        cache = self.cache
        where = tuple(_beside(cache.k_pages, x) for x in (page, offset))
        places = None
        for name, tokens in new.items():
            pages, scales = getattr(cache, f"{name}_pages"), getattr(cache, f"{name}_scales")
            tokens = tokens.reshape(-1, *pages.shape[2:])
            if scales is None:
                pages[where] = tokens.detach() if checks.is_torch(tokens) else tokens
                continue
            if places is None:
                known = vars(eight_bits.Places.of(page, offset)).values()
                places = eight_bits.Places(*(_beside(pages, x) for x in known))
            eight_bits.write_tokens(pages, scales, tokens, places)

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


def _scales(pages: Array) -> Array | None:
    """Ones for each page, and head if there are any; for pages of 8 bits only."""
    if not checks.is_eight_bits(pages):
        return None
    return _beside(pages, np.ones((len(pages), *pages.shape[2:-1]), np.float32))


def _beside(like: Array, array: np.ndarray) -> Array:
    """An array of the host in the library, and on the device, of `like`."""
    if not checks.is_torch(like):
        return array
    import torch

    return torch.from_numpy(array).to(like.device)
