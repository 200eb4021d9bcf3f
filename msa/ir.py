"""The intermediate forms: what one step of the lowering passes to the next.

Every form is a frozen dataclass whose meaning is a set of (query, group, block) edges, so that a
reader can ask for the dense mask of any of them (`msa.reference.mask_of`). A form holds NumPy
arrays or torch tensors. The letters are those of the spec:

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

from dataclasses import dataclass

from jaxtyping import Float, Int

from msa.checks.arrays import Array
from msa.paged_kv import PagedKV
from msa.selection import Selection
from msa.sequences import Sequences

__all__ = [
    "Array",
    "BlockScores",
    "Output",
    "PagedKV",
    "Partials",
    "ReverseIndex",
    "Schedule",
    "Selection",
    "Sequences",
    "TileUnion",
]


@dataclass(frozen=True)
class BlockScores:
    """The index branch's score of every block (R4, R5): -inf where a block is not visible.

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
class ReverseIndex:
    """The Selection seen from the keys: which queries read a block (R13), in CSR form.

    Row `r * total_blocks + b` belongs to group r and block b; the blocks of all sequences are
    numbered consecutively (`Sequences.cu_blocks`). Row x owns edges `row_offsets[x] : row_offsets[x
    + 1]`.
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
    """The results of attention (R9, R10, R12), together with the Selection that it used.

    `out` and `lse` have the layout of q: packed [Tq, Hq, Dv] or batched [B, T, Hq, Dv].
    The Selection is always packed (R8). `kl` is the alignment loss, or None (R17).

    >>> reference.combine_partials(partials).out[5, 0]  # the mean of values 2, 3, 4, 5
    array([3.5])
    """

    out: Float[Array, "*q Hq Dv"]
    lse: Float[Array, "*q Hq"]
    selection: Selection | None = None
    kl: Float[Array, ""] | None = None
