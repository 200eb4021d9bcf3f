"""A pool of pages, given out to sequences as they grow (R2): what serving needs beside `decode`.

Two classes, because the device and the host advance at different times. `PagedKV` is a view,
arrays and nothing else: it is what `decode` takes, and what a CUDA graph can be captured over, for
its arrays stay where they are while tables and lengths change inside them (`msa.page_arrays`).
`PagePool` keeps the book of them on the host: which sequence holds which page, and which pages are
free (`msa.page_book`). It reads lengths back from the device only where tokens were reserved, for
it cannot see when these are written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from jaxtyping import Float

from msa import checks, page_arrays, page_checks
from msa.checks.arrays import Array
from msa.page_arrays import SequencePages
from msa.page_book import Change, PageBook
from msa.paged_kv import PagedKV, check_sequence, check_tokens


class PagePool:
    """Keys, values and index keys of a batch of sequences, each in pages of its own.

    The caller makes the pages, and so says of which library they are, of what dtype and on which
    device; the pool writes into them, and nowhere but in the pages of the sequence that grows.
    A page holds one block, so the block size is that of the pages. A page comes back into the pool
    when no sequence holds it any more.

    Sequences that are forked hold the same pages. Nobody writes to a full page any more, so only
    the last page has to be copied, on write: the first `append` or `reserve` of a sequence whose
    last page is neither full nor its own gives this sequence a copy, and the others keep the page;
    the last one to hold it writes without copying. Until then `append_tokens` leaves it alone.

    Pages of torch.float8_e4m3fn, those of k and v or those of index keys or all of them, get scales
    from the pool, and tokens are rounded as they are written (`msa.eight_bits`): half the bytes of
    float16 to hold and to read. `cache_quality` says what it costs.

    Each method does all that it is asked for, or raises and changes nothing that can be read.

    Work on a GPU goes to the current stream, in the order of the calls. So on one stream a page may
    be given back while kernels that read it still wait: they run before any that write into it
    again. The pool knows of no other stream: one that reads the cache has to be waited for
    (`torch.cuda.Stream.wait_stream`) before the next call of the pool, and the other way round. Nor
    may two threads call one pool at a time.

    Args:
        k_pages, v_pages, k_idx_pages: [pages, Bk, Hkv, D], [pages, Bk, Hkv, Dv], [pages, Bk, Di].
        batch: how many sequences there is room for; all of them are empty slots at first.
        pages_per_sequence: the width of the page table; None: all the pages there are.

    Raises:
        TypeError, ValueError: pages that do not fit together, or cannot be written, such as
            read-only arrays and tensors that require a gradient; counts below 1 (R20).

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
        page_checks.check_pages(k_pages=k_pages, v_pages=v_pages, k_idx_pages=k_idx_pages)
        checks.check_count("batch", batch, 1)
        pages, block = k_pages.shape[:2]
        if pages_per_sequence is None:
            pages_per_sequence = max(1, pages)
        checks.check_count("pages_per_sequence", pages_per_sequence, 1)
        page_checks.check_table(batch, pages_per_sequence)
        self._book = PageBook(pages, batch, pages_per_sequence, block)
        self._reserved: set[int] = set()
        """Sequences with tokens that others write, and may not have written yet."""
        table, lengths = self._book.table.copy(), self._book.lengths.astype(np.int32)
        table, lengths, shared = (
            checks.beside(k_pages, x) for x in (table, lengths, np.zeros(pages, np.uint8))
        )
        scales = (page_arrays.make_scales(x) for x in (k_pages, v_pages, k_idx_pages))
        self.cache = PagedKV(k_pages, v_pages, k_idx_pages, table, lengths, *scales, shared=shared)

    @property
    def lengths(self) -> list[int]:
        """The tokens of each sequence, from the host's book."""
        return self._book.lengths.tolist()

    @property
    def free_pages(self) -> int:
        """How many pages are nobody's."""
        return len(self._book.free)

    def reserve(self, sequence: int | Sequence[int], n: int) -> None:
        """Give one sequence, or each of several, the pages of n more tokens. All of it or nothing.

        For callers whose own code on the device writes these tokens and raises `cache.lengths`, as
        a captured CUDA graph does with `append_tokens`: the table is ready for them, the pages are
        this sequence's own, and `lengths`, the host's book, counts them already. Where pages have
        scales, these are the writer's, too (`msa.eight_bits` has the rule).

        `append` is this and the writing; called next, it goes on behind the tokens. These must have
        been written by then, as for `fork` and `export`, and the pool reads `cache.lengths` back to
        see that. `truncate` gives up what was reserved in excess.

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
        """Keep the first tokens of one sequence, or of each of several: drafts that were rejected.

        The pages behind them are given back. What still stands in the last page beyond the length
        is not read again. A page of 8 bits keeps its scale (`msa.eight_bits`): the tokens that stay
        stand for the same numbers as before, and those that follow in this page are rounded as if
        behind those that went.

        Args:
            sequence: which one, 0 to batch - 1, or a list of different ones.
            length: the tokens that stay, of each sequence alike or in a list with one for each; at
                most as many as there are. Tokens reserved, but not written, are not there.

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
        """A second sequence of the same tokens, in the same pages: beams, or a prefix for many.

        Nothing is copied now; see the class for when the last page is.

        Args:
            sequence: which one, 0 to batch - 1; not an empty one.
            into: an empty slot of the batch; None: the first there is.

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
        """The pages of a sequence, copied out: index keys, scales and length included.

        Of the library and on the device of the pool.

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
        """Take in what a pool has exported: the same bits, in free pages of this one.

        From another device or library they are copied over. Block size, heads, dims and dtypes must
        be those of this pool; the two pools may have other numbers of pages and sequences.

        Args:
            pages: from `export`.
            into: an empty slot of the batch; None: the first there is.

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
        """Give a sequence's pages back, but those that others hold, too; its slot is empty then.

        An empty slot stays as it is.

        Raises:
            TypeError, ValueError: no such sequence (R20).
        """
        check_sequence(sequence, len(self._book.lengths))
        with self._counted(self._book.shrink([int(sequence)], [0])):
            pass
        self._reserved.discard(int(sequence))

    # -- the book and the arrays -------------------------------------------------------------------
    @contextmanager
    def _counted(self, change: Change, lengths: bool = True) -> Iterator[None]:
        """A change, in the book and in the arrays, with what is written to the pages in between.

        Tables and lengths come last: until then no call reads what was written. If anything fails,
        the book takes the change back.
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
        """The tokens that are there; the device is asked only about those that were reserved."""
        counted = self._book.lengths[sequences].tolist() if sequences else []
        if self._reserved.isdisjoint(sequences):
            return counted
        page_checks.check_changeable(self.cache)
        written = checks.to_numpy(self.cache.lengths)
        return [int(written[s]) if s in self._reserved else n for s, n in zip(sequences, counted)]

    def _check_written(self, sequences: list[int]) -> None:
        """What was reserved has been written since."""
        for s, written in zip(sequences, self._written(sequences)):
            page_checks.check_reserved(written, int(self._book.lengths[s]), s)
        self._reserved.difference_update(sequences)
