"""PagePool: a pool of pages that sequences take as they grow, for serving with `decode` (R2).

There are two classes, because the device and the host advance at different times. `PagedKV` holds
arrays alone. `decode` takes it, and a CUDA graph can be captured over it: its arrays keep their
memory while tables and lengths change in them (`msa.page_arrays`). `PagePool` records on the host
which sequence holds which page and which pages are free (`msa.page_book`). It reads lengths back
from the device only after `reserve`, because it cannot see when reserved tokens are written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from jaxtyping import Float

from msa import checks, page_arrays, page_checks
from msa.cache_checks import check_tokens
from msa.checks.arrays import Array
from msa.page_arrays import SequencePages
from msa.page_book import Change, PageBook
from msa.paged_kv import PagedKV, check_sequence


class PagePool:
    """Keys, values and index keys of a batch of sequences, each in pages of its own.

    The caller makes the pages, and chooses their library, dtype and device. The pool writes into
    the pages of the sequence that grows, and into no others. A page holds one block, so the block
    size is that of the pages. A page returns to the pool when no sequence holds it any more.

    Forked sequences hold the same pages. A full page is never written again, so only the last page
    is copied, when it is written to: the first `append` or `reserve` of a sequence whose shared
    last page is not full gives this sequence a copy, and the other sequences keep the page. The
    last sequence to hold it writes without a copy. `append_tokens` does not write to a shared page.

    Pages of torch.float8_e4m3fn get scales from the pool, and tokens are rounded when they are
    written (`msa.eight_bits`). They take half the bytes of float16. k and v have such pages
    together or not at all, index keys independently of them. `cache_quality` measures the loss of
    precision.

    Each method does all that it is asked for, or raises and changes nothing that can be read.

    Work on a GPU goes to the current stream, in the order of the calls. So on one stream a page may
    be given back while kernels that read it still wait: they run before the kernels that write into
    it again. A stream that reads the cache beside this one must be waited for
    (`torch.cuda.Stream.wait_stream`) before the next call of the pool, and must itself wait for the
    pool's calls. Two threads must not call one pool at a time.

    Args:
        k_pages, v_pages, k_idx_pages: [pages, Bk, Hkv, D], [pages, Bk, Hkv, Dv], [pages, Bk, Di].
        batch: how many sequences the pool has room for; all of them are empty slots at first.
        pages_per_sequence: the width of the page table; None means all pages of the pool.

    Raises:
        TypeError, ValueError: pages that do not fit together, or cannot be written, such as
            read-only arrays and tensors that require a gradient; counts below 1; a page table
            that is too large (R20).

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
        k_pages: Float[Array, "pages Bk Hkv D"], v_pages: Float[Array, "pages Bk Hkv Dv"],
        k_idx_pages: Float[Array, "pages Bk Di"], *, batch: int,
        pages_per_sequence: int | None = None,
    ) -> None:  # fmt: skip
        page_checks.check_pages(k_pages=k_pages, v_pages=v_pages, k_idx_pages=k_idx_pages)
        checks.check_count("batch", batch, 1)
        pages, block = k_pages.shape[:2]
        if pages_per_sequence is None:
            pages_per_sequence = max(1, pages)
        checks.check_count("pages_per_sequence", pages_per_sequence, 1)
        page_checks.check_table(batch, pages_per_sequence)
        try:
            self._book = PageBook(pages, batch, pages_per_sequence, block)
        except MemoryError:
            page_checks.refuse_table(batch, pages_per_sequence)
        self._reserved: set[int] = set()
        """Sequences with reserved tokens, which the caller may not have written yet."""
        table, lengths = self._book.table.copy(), self._book.lengths.astype(np.int32)
        table, lengths, shared = (
            checks.beside(k_pages, x) for x in (table, lengths, np.zeros(pages, np.uint8))
        )
        scales = (page_arrays.make_scales(x) for x in (k_pages, v_pages, k_idx_pages))
        self.cache = PagedKV(k_pages, v_pages, k_idx_pages, table, lengths, *scales, shared=shared)

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each sequence, reserved ones included."""
        return self._book.lengths.tolist()

    @property
    def free_pages(self) -> int:
        """How many pages no sequence holds."""
        return len(self._book.free)

    def reserve(self, sequence: int | Sequence[int], n: int) -> None:
        """Give one sequence, or each of several, the pages of n more tokens, all or none.

        This is for callers whose own code on the device writes the tokens and raises
        `cache.lengths`, as a captured CUDA graph does with `append_tokens`. The table names their
        pages, no other sequence holds these, and `lengths` counts the tokens already. Where pages
        have scales, the caller's code writes the scales as well (`msa.eight_bits` has the rule).

        `append` reserves and writes. `append`, `fork` and `export` need the reserved tokens to be
        written, and read `cache.lengths` back to check it. `truncate` removes reserved tokens too.

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
        >>> pool.truncate(0, 2)  # the third will not come
        >>> pool.lengths, pool.free_pages, pool.cache.page_table[0].tolist(), pool.cache.lengths
        ([2], 2, [0, -1, -1], array([2], dtype=int32))
        """
        checks.check_count("n", n, 0)
        known = page_checks.read_sequences(sequence, len(self._book.lengths))
        with self._counted(self._book.grow(known, int(n)), lengths=False):
            pass
        if n:
            self._reserved.update(known)

    def append(
        self,
        sequence: int | Sequence[int], k: Float[Array, "*S n Hkv D"],
        v: Float[Array, "*S n Hkv Dv"], k_idx: Float[Array, "*S n Di"],
    ) -> None:  # fmt: skip
        """Write n more tokens of one sequence, or of each of S sequences, all or none.

        Gradients do not flow through pages. The tokens may be views of the pool's pages.

        Args:
            sequence: which one, 0 to batch - 1, or a list of S different ones.
            k, v, k_idx: [n, Hkv, D], [n, Hkv, Dv], [n, Di] in the dtype of the pages; for a list
                of sequences [S, n, ...]. For pages of 8 bits in float16, bfloat16 or float32.

        Raises:
            TypeError, ValueError: no such sequence, tokens that do not fit the pages, a table
                that is too short, a pool without enough free pages, reserved tokens that have not
                been written (R20).
        """
        known = page_checks.read_sequences(sequence, len(self._book.lengths))
        ids = np.array(known, np.int64)
        new = {"k": k, "v": v, "k_idx": k_idx}
        n = check_tokens(self.cache, isinstance(sequence, Sequence), len(ids), new)
        self._check_written(known)
        new = page_arrays.apart(self.cache, new)
        positions = self._book.lengths[ids, None] + np.arange(n)
        with self._counted(self._book.grow(known, n)):
            page = self._book.table[ids[:, None], positions // self._book.block]
            offset = positions % self._book.block
            page, offset = page.astype(np.int64).ravel(), offset.ravel()
            page_arrays.write_tokens(self.cache, new, page, offset)

    def truncate(self, sequence: int | Sequence[int], length: int | Sequence[int]) -> None:
        """Keep the first tokens of one sequence, or of each of several, after rejected drafts.

        The pages behind them are given back. Numbers in the last page beyond the length are not
        read again. A page of 8 bits keeps its scale (`msa.eight_bits`): the tokens that stay keep
        their values, and the next tokens of this page are rounded with at least that scale.

        Args:
            sequence: which one, 0 to batch - 1, or a list of different ones.
            length: how many tokens stay: one number for all sequences, or a list with one for
                each; at most the number of tokens that are written.

        Raises:
            TypeError, ValueError: no such sequence, a length below 0 or beyond its tokens (R20).

        >>> k_pages, v_pages = np.zeros((2, 3, 2, 1, 1))  # three pages of two tokens
        >>> pool = PagePool(k_pages, v_pages, np.zeros((3, 2, 1)), batch=1)
        >>> k = np.array([1.0, 2.0, 3.0, 4.0, 5.0])[:, None, None]
        >>> pool.append(0, k, k, k[:, 0])  # one token, and four drafts
        >>> pool.truncate(0, 2)  # of which one was right
        >>> pool.append(0, -k[2:3], -k[2:3], -k[2:3, 0])
        >>> pool.cache.flat(0)[0].ravel(), pool.free_pages
        (array([ 1.,  2., -3.]), 1)
        """
        known = page_checks.read_sequences(sequence, len(self._book.lengths))
        wanted = page_checks.read_lengths(length, len(known))
        for s, after, written in zip(known, wanted, self._written(known)):
            page_checks.check_length(after, min(written, int(self._book.lengths[s])), s)
        with self._counted(self._book.shrink(known, wanted)):
            pass
        self._reserved.difference_update(known)

    def fork(self, sequence: int, into: int | None = None) -> int:
        """Make a second sequence of the same tokens in the same pages, as for beams or a prefix.

        Nothing is copied now. The docstring of the class says when the last page is copied.

        Args:
            sequence: which one, 0 to batch - 1; not an empty one.
            into: an empty slot of the batch; None means the first one.

        Returns:
            The slot that was taken.

        Raises:
            TypeError, ValueError: no such sequence, an empty one, reserved tokens that have not
                been written, no empty slot (R20).

        >>> k_pages, v_pages = np.zeros((2, 4, 2, 1, 1))  # four pages of two tokens
        >>> pool = PagePool(k_pages, v_pages, np.zeros((4, 2, 1)), batch=2)
        >>> k = np.array([1.0, 2.0, 3.0])[:, None, None]
        >>> pool.append(0, k, k, k[:, 0])
        >>> pool.fork(0), pool.cache.page_table[:, :2].tolist(), pool.free_pages
        (1, [[0, 1], [0, 1]], 2)
        >>> pool.append(1, -k[:1], -k[:1], -k[:1, 0])  # behind three tokens: page 1 is copied
        >>> pool.cache.page_table[:, :2].tolist(), pool.free_pages
        ([[0, 1], [0, 2]], 1)
        >>> pool.cache.flat(0)[0].ravel(), pool.cache.flat(1)[0].ravel()
        (array([1., 2., 3.]), array([ 1.,  2.,  3., -1.]))
        """
        page_checks.check_held(sequence, self.lengths)
        into = page_checks.read_slot(into, self.lengths)
        self._check_written([int(sequence)])
        with self._counted(self._book.share(int(sequence), into)):
            pass
        return into

    def export(self, sequence: int) -> SequencePages:
        """Copy out the pages of a sequence, with index keys, scales and length.

        The copies are of the library and on the device of the pool.

        Raises:
            TypeError, ValueError: no such sequence, an empty one, reserved tokens that have not
                been written (R20).

        >>> k_pages, v_pages = np.ones((2, 4, 2, 1, 1))  # four pages of two tokens
        >>> pool = PagePool(k_pages, v_pages, np.ones((4, 2, 1)), batch=2)
        >>> k = np.array([1.0, 2.0, 3.0])[:, None, None]
        >>> pool.append(0, k, k, k[:, 0])
        >>> pages = pool.export(0)
        >>> pages.length, pages.k_idx[..., 0].tolist()
        (3, [[1.0, 2.0], [3.0, 0.0]])
        >>> pool.free(0)
        >>> pool.import_(pages, into=1), pool.lengths  # of this pool or of any other like it
        (1, [0, 3])
        >>> pool.cache.flat(1)[2].ravel()
        array([1., 2., 3.])
        """
        page_checks.check_held(sequence, self.lengths)
        self._check_written([int(sequence)])
        length = int(self._book.lengths[sequence])
        own = self._book.table[sequence, : self._book.blocks(length)]
        return page_arrays.take_out(self.cache, own, length)

    def import_(self, pages: SequencePages, into: int | None = None) -> int:
        """Copy exported pages, bit for bit, into free pages of this pool.

        They may come from another device or library. Block size, heads, dims and dtypes must be
        those of this pool; the numbers of pages and of sequences may differ.

        Args:
            pages: from `export`.
            into: an empty slot of the batch; None means the first one.

        Returns:
            The slot that was taken.

        Raises:
            TypeError, ValueError: pages that do not fit this pool's, no empty slot, a table that is
                too short, a pool without enough free pages (R20).
        """
        checks.check_type("pages", pages, SequencePages)
        page_arrays.check_export(self.cache, pages)
        into = page_checks.read_slot(into, self.lengths)
        change = self._book.grow([into], int(pages.length))
        own = np.array([page for *_, page in change.entries], np.int64)
        parts = page_arrays.apart(self.cache, page_arrays.arrays_of(pages))
        with self._counted(change):
            page_arrays.put_in(self.cache, own, parts)
        return into

    def free(self, sequence: int) -> None:
        """Empty the slot of a sequence, and give back its pages that no other sequence holds.

        An empty slot stays as it is.

        Raises:
            TypeError, ValueError: no such sequence (R20).
        """
        check_sequence(sequence, len(self._book.lengths))
        with self._counted(self._book.shrink([int(sequence)], [0])):
            pass
        self._reserved.discard(int(sequence))

    # -- the book and the arrays ------------------------------------------------------------------
    @contextmanager
    def _counted(self, change: Change, lengths: bool = True) -> Iterator[None]:
        """Make a change in the book, then in the arrays; pages are written in between.

        Tables and lengths come last: until then no call reads what was written. If anything fails,
        the change in the book is undone.
        """
        page_checks.check_changeable(self.cache)
        turned = self._book.apply(change)
        try:
            page_arrays.copy_pages(self.cache, change.copies)
            yield
            page_arrays.enter(self.cache, change, turned, lengths)
        except BaseException:
            self._book.apply(change.inverse())
            raise

    def _written(self, sequences: list[int]) -> list[int]:
        """The number of written tokens, read from the device only where tokens were reserved."""
        counted = self._book.lengths[sequences].tolist() if sequences else []
        if self._reserved.isdisjoint(sequences):
            return counted
        page_checks.check_changeable(self.cache)
        written = checks.to_numpy(self.cache.lengths)
        return [int(written[s]) if s in self._reserved else n for s, n in zip(sequences, counted)]

    def _check_written(self, sequences: list[int]) -> None:
        """Check that all reserved tokens have been written."""
        for s, written in zip(sequences, self._written(sequences)):
            page_checks.check_reserved(written, int(self._book.lengths[s]), s)
        self._reserved.difference_update(sequences)
