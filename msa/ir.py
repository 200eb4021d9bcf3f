"""The intermediate forms: what travels between two steps of the lowering.

Every form is a frozen dataclass that says what it stands for, so that a reader can take any of
them and ask for its dense mask (`msa.reference.mask_of`). Arrays are NumPy arrays or torch tensors:
a form has no opinion. The letters are those of the spec:

    Tq, Tk   packed query and key tokens          Hq, Hkv, G  query heads, key/value heads, Hq / Hkv
    D, Dv    head size of q and k, of v           Bk, k       block size in tokens, blocks kept
    NB       blocks of the longest sequence       rows        Hkv x all blocks of all sequences

One example runs through this page: one sequence of six tokens, blocks of two, k = 2, one group.

>>> import numpy as np
>>> from msa import MSAConfig, reference
>>> sequences = Sequences.one(6, 6)
>>> chosen = [[0, -1], [0, -1], [0, 1], [0, 1], [0, 2], [1, 2]]
>>> selection = Selection(np.array(chosen, np.int32)[:, None], sequences, block_size=2)
>>> selection.validate()
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Float32, Int, Integer, UInt8

from msa import checks, checks_cache

Array = Any  # a NumPy array or a torch tensor


@dataclass(frozen=True)
class Sequences:
    """How several sequences lie packed behind one another (R1), queries being the last tokens (R2).

    The borders are plain integers on the host: hashable, printable, and read once per call. NumPy's
    are kept as Python's.

    Raises:
        TypeError, ValueError: no tuple of integers; borders that do not start at 0, decrease,
            differ in number, or give a sequence more queries than keys (R20).

    >>> chunk = Sequences((0, 2, 5), (0, 7, 10))  # 2 new tokens of 7, then 3 of 3
    >>> chunk.total_q, chunk.total_k, chunk.max_blocks(block_size=4)
    (5, 10, 2)
    >>> chunk.positions()
    [5, 6, 0, 1, 2]
    """

    cu_seqlens_q: tuple[int, ...]
    cu_seqlens_k: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, borders in checks.check_sequences(self).items():
            object.__setattr__(self, name, borders)

    @classmethod
    def one(cls, n_q: int, n_k: int) -> Sequences:
        """A single sequence of n_k tokens, the last n_q of which are queries."""
        return cls((0, n_q), (0, n_k))

    @classmethod
    def uniform(cls, batch: int, n_q: int, n_k: int) -> Sequences:
        """`batch` sequences of equal length: the batched layout [B, T, H, D], packed."""
        return cls(
            tuple(n_q * b for b in range(batch + 1)), tuple(n_k * b for b in range(batch + 1))
        )

    @property
    def batch(self) -> int:
        return len(self.cu_seqlens_q) - 1

    @property
    def total_q(self) -> int:
        """Tq."""
        return self.cu_seqlens_q[-1]

    @property
    def total_k(self) -> int:
        """Tk."""
        return self.cu_seqlens_k[-1]

    def spans(self) -> Iterator[tuple[slice, slice]]:
        """For each sequence the slice of its queries and the slice of its keys."""
        for s in range(self.batch):
            yield (
                slice(self.cu_seqlens_q[s], self.cu_seqlens_q[s + 1]),
                slice(self.cu_seqlens_k[s], self.cu_seqlens_k[s + 1]),
            )

    def tiles(self, size: int) -> Iterator[tuple[slice, slice, Sequences]]:
        """Runs of `size` packed queries, the keys they may see, and the problem that these form.

        By R2 such a run is again legal, a chunked prefill, so a tile needs no code of its own. A
        run may span several sequences.

        >>> for queries, keys, part in Sequences((0, 3, 5), (0, 3, 9)).tiles(2):
        ...     print(queries, keys, part.cu_seqlens_q, part.cu_seqlens_k)
        slice(0, 2, None) slice(0, 2, None) (0, 2) (0, 2)
        slice(2, 4, None) slice(0, 8, None) (0, 1, 2) (0, 3, 8)
        slice(4, 5, None) slice(3, 9, None) (0, 1) (0, 6)
        """
        cu_q, cu_k = self.cu_seqlens_q, self.cu_seqlens_k
        for start in range(0, self.total_q, size):
            stop = min(start + size, self.total_q)
            first, last = bisect_right(cu_q, start) - 1, bisect_left(cu_q, stop) - 1
            first_key = cu_k[first]
            last_key = cu_k[last + 1] - (cu_q[last + 1] - stop)  # what the last query sees
            inner_q = (b - start for b in cu_q[first + 1 : last + 1])
            inner_k = (b - first_key for b in cu_k[first + 1 : last + 1])
            part = Sequences((0, *inner_q, stop - start), (0, *inner_k, last_key - first_key))
            yield slice(start, stop), slice(first_key, last_key), part

    def positions(self) -> list[int]:
        """For each packed query its position p in its own sequence (R2)."""
        return [
            p
            for qs, ks in self.spans()
            for p in range(ks.stop - ks.start - (qs.stop - qs.start), ks.stop - ks.start)
        ]

    def cu_blocks(self, block_size: int) -> tuple[int, ...]:
        """Where each sequence's blocks start when all blocks are numbered through (R3)."""
        starts = [0]
        for _, ks in self.spans():
            starts.append(starts[-1] + -(-(ks.stop - ks.start) // block_size))
        return tuple(starts)

    def max_blocks(self, block_size: int) -> int:
        """NB: the number of blocks of the longest sequence."""
        return max((-(-(ks.stop - ks.start) // block_size) for _, ks in self.spans()), default=0)


@dataclass(frozen=True)
class BlockScores:
    """The index branch's opinion of every block (R4, R5): -inf where a block is not visible.

    >>> config = MSAConfig(block_size=2, top_k=2)
    >>> k_idx = np.arange(6.0)[:, None]
    >>> scores = reference.score_blocks(np.ones((6, 1, 1)), k_idx, sequences, config)
    >>> scores.values[4, 0]  # query 4 sees tokens 0..4: the best of each block is its last visible
    array([1., 3., 4.])
    """

    values: Float[Array, "Tq Hkv NB"]
    sequences: Sequences
    block_size: int


@dataclass(frozen=True)
class Selection:
    """For every query and group the blocks it reads: ascending, unique, then -1 (R8).

    Block ids count from the start of the query's own sequence; the last valid id is its own block.

    Raises:
        TypeError, ValueError: sequences that are no Sequences, a block size that is not 1 to
            LARGEST_BLOCK_SIZE (R20). The ids are looked at where they are used, or by `validate`.

    >>> selection.indices[5, 0]   # token 5 reads blocks 1 and 2
    array([1, 2], dtype=int32)
    >>> selection.counts[:, 0]
    array([1, 1, 2, 2, 2, 2])
    """

    indices: Int[Array, "Tq Hkv k"]
    sequences: Sequences
    block_size: int

    def __post_init__(self) -> None:
        checks.check_type("selection.sequences", self.sequences, Sequences)
        number = checks.check_block_size("selection.block_size", self.block_size)
        object.__setattr__(self, "block_size", number)

    @property
    def top_k(self) -> int:
        return int(self.indices.shape[-1])

    @property
    def counts(self) -> Int[Array, "Tq Hkv"]:
        """How many blocks each query really has."""
        return (self.indices >= 0).sum(-1)

    def validate(self) -> None:
        """Check the canonical form.

        Raises:
            TypeError, ValueError: naming the first entry that breaks R8.
        """
        checks.check_selection(self)


@dataclass(frozen=True)
class ReverseIndex:
    """The Selection seen from the keys: which queries read a block (R13), in CSR form.

    Row `r * total_blocks + b` belongs to group r and block b, blocks of all sequences numbered
    through (`Sequences.cu_blocks`). Row x owns edges `row_offsets[x] : row_offsets[x + 1]`.
    An edge's slot is the rank of the block in its query's selection.

    >>> index = reference.reverse_selection(selection)
    >>> index.row_offsets
    array([ 0,  5,  8, 10])
    >>> index.query_ids  # block 0 is read by 0..4, block 1 by 2, 3, 5, block 2 by 4, 5
    array([0, 1, 2, 3, 4, 2, 3, 5, 4, 5], dtype=int32)
    >>> index.slots      # for token 5 block 1 comes first, for 2 and 3 it comes second
    array([0, 0, 0, 0, 0, 1, 1, 0, 1, 1], dtype=int32)
    """

    row_offsets: Int[Array, " rows_plus_1"]
    query_ids: Int[Array, " edges"]
    slots: Int[Array, " edges"]
    counts: Int[Array, "Tq Hkv"]
    sequences: Sequences
    block_size: int
    top_k: int


@dataclass(frozen=True)
class Schedule:
    """The rows of a ReverseIndex cut into work items of at most `chunk_size` edges (R14).

    Item w covers edges `starts[w] : stops[w]`, all of row `rows[w]`.

    >>> schedule = reference.schedule_chunks(index, chunk_size=4)
    >>> schedule.rows, schedule.starts, schedule.stops
    (array([0, 0, 1, 2], dtype=int32), array([0, 4, 5, 8]), array([ 4,  5,  8, 10]))
    """

    rows: Int[Array, " items"]
    starts: Int[Array, " items"]
    stops: Int[Array, " items"]
    chunk_size: int
    reverse_index: ReverseIndex


@dataclass(frozen=True)
class Partials:
    """One softmax per edge and head, over the visible tokens of one block (R15).

    Slots at or beyond `counts` were never written and must not be read: they may hold anything.

    >>> ones = np.ones((6, 1, 1))
    >>> partials = reference.attend_chunks(ones, ones, np.arange(6.0)[:, None, None], schedule, 1.0)
    >>> partials.out[5, 0, :, 0]  # token 5: the mean of values 2, 3, and of values 4, 5
    array([2.5, 4.5])
    """

    out: Float[Array, "Tq Hq k Dv"]
    lse: Float[Array, "Tq Hq k"]
    counts: Int[Array, "Tq Hkv"]


@dataclass(frozen=True)
class TileUnion:
    """The other loop order (R9): each tile of neighbouring queries walks the union of its blocks.

    Tile t holds queries `starts[t] : stops[t]` of one sequence. Bit i of `row_masks[t, r, u]` says
    that query `starts[t] + i` selected block `block_ids[t, r, u]`. Ids ascend, then -1.

    >>> union = reference.unite_tiles(selection, tile_size=2)
    >>> union.block_ids[2, 0], union.row_masks[2, 0]  # block 0 for token 4, 1 for 5, 2 for both
    (array([0, 1, 2], dtype=int32), array([1, 2, 3], dtype=int32))
    """

    starts: Int[Array, " tiles"]
    stops: Int[Array, " tiles"]
    block_ids: Int[Array, "tiles Hkv U"]
    row_masks: Int[Array, "tiles Hkv U"]
    tile_size: int
    sequences: Sequences
    block_size: int


@dataclass(frozen=True)
class Output:
    """What attention gives (R9, R10, R12), together with the Selection that it used.

    `out` and `lse` have the layout of q: packed [Tq, Hq, Dv] or batched [B, T, Hq, Dv].
    The Selection is packed always (R8). `kl` is the alignment loss, where it was asked for (R17).

    >>> reference.combine_partials(partials).out[5, 0]  # the mean of values 2, 3, 4, 5
    array([3.5])
    """

    out: Float[Array, "*q Hq Dv"]
    lse: Float[Array, "*q Hq"]
    selection: Selection | None = None
    kl: Float[Array, ""] | None = None


@dataclass(frozen=True)
class PagedKV:
    """Keys, values and index keys in pages of one block each, in any physical order (R2, R20).

    Block b of sequence s lies in page `page_table[s, b]`; the first `lengths[s]` tokens are valid.
    Entries of the table beyond a sequence's last block are not read. Table and lengths hold
    integers of any dtype, int32 or int64 where `append_tokens` is to write them. A `PagePool` makes
    a cache and fills it.

    Pages of torch.float8_e4m3fn have scales, finite and positive, one for each page and head (for
    index keys, each page): a stored number stands for itself times the scale, in float32. k and v
    have 8 bits together or not at all, index keys independently of them.

    >>> pages = np.arange(6.0).reshape(3, 2, 1, 1)  # three pages of two tokens
    >>> table, lengths = np.array([[2, 0], [-1, -1]]), np.array([3, 0])
    >>> cache = PagedKV(pages, pages, pages[..., 0], table, lengths)
    """

    k_pages: Float[Array, "pages Bk Hkv D"]
    v_pages: Float[Array, "pages Bk Hkv Dv"]
    k_idx_pages: Float[Array, "pages Bk Di"]
    page_table: Integer[Array, "B table"]
    lengths: Integer[Array, " B"]
    k_scales: Float32[Array, "pages Hkv"] | None = None
    v_scales: Float32[Array, "pages Hkv"] | None = None
    k_idx_scales: Float32[Array, " pages"] | None = None
    shared: UInt8[Array, " pages"] | None = None
    """1 for a page that several sequences hold: `append_tokens` writes to none of these."""

    def read(self, name: Literal["k", "v", "k_idx"], where: Any) -> Float[Array, "*where dim"]:
        """What stands at an index into the pages of that name: times its scale, if there is one.

        The index leaves the last dim whole: page ids, or page ids and offsets, or these and heads.
        Nothing else is read. With scales the answer is float32.

        >>> import torch
        >>> small = torch.tensor([[1.5, 2.0], [7.0, 0.0]])[..., None].to(torch.float8_e4m3fn)
        >>> wide, scales = small.float()[..., None], torch.tensor([4.0, 0.5])
        >>> cache_8 = PagedKV(wide, wide, small, table, lengths, k_idx_scales=scales)
        >>> cache_8.read("k_idx", (torch.tensor([1, 0]), torch.tensor([0, 1]))).flatten()
        tensor([3.5000, 8.0000])
        """
        pages, scales = getattr(self, f"{name}_pages"), getattr(self, f"{name}_scales")
        if scales is None:
            return pages[where]
        scales = scales.reshape(len(scales), 1, *scales.shape[1:], 1)  # beside each token of a page
        every = (*pages.shape[:-1], 1)
        if not checks.is_torch(pages):
            return pages[where] * np.broadcast_to(scales, every)[where]
        import torch

        bits = pages.view(torch.uint8)  # not every release indexes 8-bit floats on a GPU
        return bits[where].view(pages.dtype).float() * scales.expand(every)[where]

    def live(self, n: int) -> tuple[list[int], Sequences]:
        """Which slots of the batch hold a sequence, and how the last n tokens of these lie packed.

        Reads the lengths back from the device.

        >>> cache.live(2)
        ([0], Sequences(cu_seqlens_q=(0, 2), cu_seqlens_k=(0, 3)))
        """
        lengths = self.lengths.tolist()
        slots = [s for s, length in enumerate(lengths) if length > 0]
        cu_k = accumulate((lengths[s] for s in slots), initial=0)
        return slots, Sequences(tuple(n * i for i in range(len(slots) + 1)), tuple(cu_k))

    def flat(
        self, sequence: int
    ) -> tuple[Float[Array, "Tk Hkv D"], Float[Array, "Tk Hkv Dv"], Float[Array, "Tk Di"]]:
        """k, v and k_idx of one sequence, copied out: what `attention` takes for chunked prefill.

        From pages of 8 bits they come in float32, exactly; give them q's dtype for `attention`.

        Raises:
            TypeError, ValueError: no such sequence, a table without its pages, pages of 8 bits
                without scales, or with scales that are not finite and positive (R20).

        >>> cache.flat(0)[0].ravel()
        array([4., 5., 0.])
        """
        sizes: dict[str, int] = {}
        checks_cache.check_arrays(self, sizes)  # the reference has 8-bit pages in float32
        sequence = checks_cache.check_sequence(sequence, sizes["B"])
        length, row = int(self.lengths[sequence]), checks.to_numpy(self.page_table[sequence])
        own = checks_cache.check_row(row, length, sequence, sizes)
        for name in ("k", "v", "k_idx"):
            checks_cache.check_scaled(self, name)
        checks_cache.check_own_scales(self, own, sequence)
        own = checks.beside(self.k_pages, own)
        k, v, k_idx = (
            numbers.reshape(-1, *numbers.shape[2:])[:length]
            for numbers in (self.read(name, own) for name in ("k", "v", "k_idx"))
        )
        return k, v, k_idx
