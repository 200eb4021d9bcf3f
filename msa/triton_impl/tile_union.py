"""The other loop order: the union of the blocks of neighbouring queries (R9).

    for each tile of neighbouring queries, each group:
        for each block b that one of the tile's queries selected, ascending:
            ids += b;  masks += bits of the queries that selected b
    split form, where the union is long: blocks that too few queries share leave it; they become a
    Selection of their own, `remote`, to be attended to KV-outer

What the fast form changes:
 1. All pairs in place of lists: each edge of the tile is compared with all others, a few at a time.
    A thread has some of the edges and compares them with all others itself, so no sum crosses
    threads. A block's mask is the sum of the bits of the edges that have its id. The edge of the
    first query that selected a block writes it (its writer); the block's place is the number of
    writers with smaller ids.
 2. In the split form only blocks with enough bits have a writer. The others stay in the queries'
    rows of `remote`, and a prefix sum along each row closes the gaps there.
 3. The rule of the split form is applied to parts of a tile, where these are what a kernel computes
    together: a block can stay in the union for the queries of one part and leave it for the others.
 4. All pairs of more than PAIRED edges would take too long. There, each block that the tile can see
    is looked up in each query's row by bisection, for rows ascend: more blocks, but few steps each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor

from msa.ir import Selection, TileUnion
from msa.triton_impl.bits import count_bits
from msa.triton_impl.launch import contiguous, pad, require_top_k
from msa.triton_impl.places import on_its_device
from msa.triton_impl.tables import tile_table
from msa.triton_impl.tile_verbs import wait_for_threads
from msa.triton_impl.topk import NO_BLOCK
from msa.triton_impl.tuning import EVERY_LAUNCH

PAIRED = 1024
"""Edges of a tile that are compared in pairs, at most; the split form has no other way."""


@triton.jit
def union_kernel(indices, tiles, ids, masks, counts, remote, remote_counts, whole, pairs,
                 HKV: tl.constexpr, TOP_K: tl.constexpr, P: tl.constexpr, BT: tl.constexpr,
                 CHUNK: tl.constexpr, SPLIT: tl.constexpr, SHARE: tl.constexpr):  # fmt: skip
    """One tile of up to BT queries and one group: E = BT * P edges.

    Parameters:
        indices: [Tq, Hkv, k], int32; the selection
        tiles: [tiles, 5], int32; a `tile_table`
        ids: [tiles, Hkv, E], int32; the blocks of each union, ascending, then -1, written
        masks: [tiles, Hkv, E], int32; bit i: query i of the tile selected the block, written
        counts: [tiles, Hkv], int32; blocks of each union, written
        remote: [Tq, Hkv, k], int32; each query's other blocks, then -1, written with SPLIT only
        remote_counts: [Tq, Hkv], int32; other blocks of each query, written with SPLIT only
        whole, pairs: int; the limits of `split_tiles`, read with SPLIT only
        HKV: groups
        TOP_K, P: k, and rounded up to a power of two
        BT: queries of a tile, rounded up to a power of two
        CHUNK: edges that all edges are compared with at a time
        SPLIT: bool; blocks that few queries share leave a long union
        SHARE: queries of a part of the tile, each with a rule of its own; read with SPLIT only
    """
    E: tl.constexpr = BT * P
    i_t, i_r = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, stop = tl.load(tiles + i_t * 5), tl.load(tiles + i_t * 5 + 1)
    indices += (start.to(tl.int64) * HKV + i_r) * TOP_K
    ids += (i_t * HKV + i_r) * E
    masks += (i_t * HKV + i_r) * E
    o_e = tl.arange(0, E)
    o_i, o_s = o_e // P, o_e % P  # [E] query and slot
    m_e = (start + o_i < stop) & (o_s < TOP_K)
    b_id = tl.load(indices + o_i * (HKV * TOP_K) + o_s, mask=m_e, other=-1)  # [E]
    m_e = b_id >= 0
    b_mask = tl.zeros([E], tl.int32)
    for first in range(0, E, CHUNK):
        o_f = first + tl.arange(0, CHUNK)
        o_j = o_f // P
        m_f = (start + o_j < stop) & (o_f % P < TOP_K)
        b_other = tl.load(indices + o_j * (HKV * TOP_K) + o_f % P, mask=m_f, other=-2)
        b_bit = tl.full([CHUNK, 1], 1, tl.int32) << o_j[:, None]
        b_mask += tl.sum(tl.where(b_other[:, None] == b_id[None, :], b_bit, 0), 0)
    b_mask = tl.where(m_e, b_mask, 0)
    b_own = tl.full([E], 1, tl.int32) << o_i  # the bit of each edge's query
    if SPLIT:
        b_kept = tl.zeros([E], tl.int32)
        for i_p in tl.static_range(BT // SHARE):
            m_part = m_e & (o_i // SHARE == i_p)
            b_part = b_mask & (((1 << SHARE) - 1) << (i_p * SHARE))
            n = tl.sum((m_part & ((b_part & (b_own - 1)) == 0)).to(tl.int32))
            least = tl.where(n <= whole, 1, tl.where(n <= pairs, 2, 3))
            b_kept += tl.where(count_bits(b_part.to(tl.uint32)) >= least, b_part, 0)
        b_mask = b_kept
    m_near = m_e & ((b_mask & b_own) != 0)
    m_writes = m_near & ((b_mask & (b_own - 1)) == 0)
    n = tl.sum(m_writes.to(tl.int32))
    tl.store(ids + o_e, tl.where(m_writes, b_id, NO_BLOCK))
    wait_for_threads()
    b_place = tl.zeros([E], tl.int32)
    for first in range(0, E, CHUNK):
        b_other = tl.load(ids + first + tl.arange(0, CHUNK))
        b_place += tl.sum((b_other[:, None] < b_id[None, :]).to(tl.int32), 0)
    wait_for_threads()
    tl.store(ids + b_place, b_id, mask=m_writes)
    tl.store(masks + b_place, b_mask, mask=m_writes)
    tl.store(ids + o_e, tl.full([E], -1, tl.int32), mask=o_e >= n)
    tl.store(masks + o_e, tl.zeros([E], tl.int32), mask=o_e >= n)
    tl.store(counts + i_t * HKV + i_r, n)
    if SPLIT:
        remote += (start.to(tl.int64) * HKV + i_r) * TOP_K
        o_q, o_p = tl.arange(0, BT)[:, None], tl.arange(0, P)[None, :]
        b_far = tl.reshape((m_e & ~m_near).to(tl.int32), [BT, P])
        b_n = tl.sum(b_far, 1)  # [BT]
        b_place = o_q * (HKV * TOP_K) + tl.cumsum(b_far, 1) - 1
        tl.store(remote + b_place, tl.reshape(b_id, [BT, P]), mask=b_far > 0)
        m_rest = (start + o_q < stop) & (o_p >= b_n[:, None]) & (o_p < TOP_K)
        p_rest = remote + o_q * (HKV * TOP_K) + o_p
        tl.store(p_rest, tl.full([BT, P], -1, tl.int32), mask=m_rest)
        o_t = start + tl.arange(0, BT)
        tl.store(remote_counts + o_t.to(tl.int64) * HKV + i_r, b_n, mask=o_t < stop)


@triton.jit
def long_union_kernel(indices, tiles, ids, masks, counts, U, HKV: tl.constexpr,
                      TOP_K: tl.constexpr, P: tl.constexpr, HALVINGS: tl.constexpr,
                      BK: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """One tile and one group, W of the blocks that it sees at a time.

    Parameters:
        indices: [Tq, Hkv, k], int32; the selection
        tiles: [tiles, 5], int32; a `tile_table`
        ids: [tiles, Hkv, U], int32; the blocks of each union, ascending, then -1, written
        masks: [tiles, Hkv, U], int32; bit i: query i of the tile selected the block, written
        counts: [tiles, Hkv], int32; blocks of each union, written
        U: int; width of ids and masks
        HKV: groups
        TOP_K, P: k, and rounded up to a power of two
        HALVINGS: log2(P)
        BK: keys of a block
        W: blocks of one step
    """
    i_t, i_r = tl.program_id(0), tl.program_id(1)
    p_tile = tiles + i_t * 5
    start, stop, own = tl.load(p_tile), tl.load(p_tile + 1), tl.load(p_tile + 2)
    n_blocks = (own + stop - start - 1 - tl.load(p_tile + 3)) // BK + 1
    i_x = i_t.to(tl.int64) * HKV + i_r
    ids += i_x * U
    masks += i_x * U
    n = 0
    for first in range(0, n_blocks, W):
        o_b = first + tl.arange(0, W)
        b_mask = tl.zeros([W], tl.int32)
        for i in range(0, stop - start):
            p_row = indices + ((start + i).to(tl.int64) * HKV + i_r) * TOP_K
            b_below = tl.zeros([W], tl.int32)  # ids of the row below o_b; P - 1 at most
            for i_half in tl.static_range(HALVINGS):
                half = P >> (i_half + 1)
                o_s = b_below + half - 1
                b_id = tl.load(p_row + o_s, mask=o_s < TOP_K, other=-1)
                b_below += tl.where((b_id >= 0) & (b_id < o_b), half, 0)
            b_id = tl.load(p_row + b_below, mask=b_below < TOP_K, other=-1)
            b_mask |= (b_id == o_b).to(tl.int32) << i
        m_in = b_mask != 0
        b_place = n + tl.cumsum(m_in.to(tl.int32), 0) - 1
        tl.store(ids + b_place, o_b, mask=m_in)
        tl.store(masks + b_place, b_mask, mask=m_in)
        n += tl.sum(m_in.to(tl.int32))
    tl.store(counts + i_x, n)
    for first in range(n, U, W):
        o_u = first + tl.arange(0, W)
        tl.store(ids + o_u, tl.full([W], -1, tl.int32), mask=o_u < U)
        tl.store(masks + o_u, tl.zeros([W], tl.int32), mask=o_u < U)


def pair_options(edges: int) -> dict[str, int]:
    """How `union_kernel` compares the edges of a tile: four of them by each thread.

    >>> pair_options(64), pair_options(1024)
    ({'CHUNK': 32, 'num_warps': 1}, {'CHUNK': 32, 'num_warps': 8})
    """
    return {"CHUNK": min(edges, 32), "num_warps": max(1, edges // 128)}


@dataclass(frozen=True)
class SplitUnion:
    """The blocks of each tile that the tile walks, and each query's other blocks.

    This form belongs to the triton backend alone. It is a `TileUnion` whose width the host need not
    read, and in which blocks that few queries share may be missing. These are in `remote`: each
    query's other blocks, ascending, then -1; None if every block is walked.
    """

    block_ids: Int[Tensor, "tiles Hkv E"]
    row_masks: Int[Tensor, "tiles Hkv E"]
    counts: Int[Tensor, "tiles Hkv"]
    tile_size: int
    remote: Selection | None
    remote_counts: Int[Tensor, "Tq Hkv"] | None


def union_width(selection: Selection, tile_size: int) -> int:
    """Places for the blocks of one tile's whole union: as many as edges, or as there are blocks."""
    edges = pad(tile_size, 1) * pad(selection.top_k, 1)
    if edges > PAIRED:
        edges = min(edges, selection.sequences.max_blocks(selection.block_size))
    return max(edges, 2)


def split_tiles(
    selection: Selection, tile_size: int, limits: tuple[int, int] | None = None,
    share: int | None = None,
) -> SplitUnion:  # fmt: skip
    """Unions of each tile's blocks, the long ones without the blocks that few queries share.

    limits (whole, pairs): a union of up to `whole` blocks keeps them all, one of up to `pairs`
    those of two queries or more, a longer one those of three or more. None keeps all. The rule
    looks at runs of `share` queries of a tile, each for itself; None: at the whole tile.
    Nothing here waits for the device.
    """
    indices, sequences = selection.indices, selection.sequences
    n_q, groups, top_k = indices.shape
    device = indices.device
    tiles = tile_table(sequences, tile_size, device)
    some, width = pad(tile_size, 1), pad(top_k, 1)
    paired = limits is not None or some * width <= PAIRED
    edges = max(some * width, 2) if paired else union_width(selection, tile_size)
    shape = (len(tiles), groups, edges)
    ids, masks = (torch.empty(shape, dtype=torch.int32, device=device) for _ in range(2))
    counts = torch.zeros(shape[:2], dtype=torch.int32, device=device)
    remote, remote_counts = ids, counts
    if limits:
        remote = torch.empty_like(indices)
        remote_counts = torch.empty((n_q, groups), dtype=torch.int32, device=device)
    if n_q and not paired:
        long_union_kernel[len(tiles), groups](
            indices, tiles, ids, masks, counts, edges, HKV=groups, TOP_K=top_k, P=width,
            HALVINGS=width.bit_length() - 1, BK=selection.block_size, W=512, **EVERY_LAUNCH,
        )  # fmt: skip
    elif n_q:
        union_kernel[len(tiles), groups](
            indices, tiles, ids, masks, counts, remote, remote_counts, *(limits or (0, 0)),
            HKV=groups, TOP_K=top_k, P=shape[2] // some, BT=some, SPLIT=limits is not None,
            SHARE=pad(share or tile_size, 1), **pair_options(shape[2]), **EVERY_LAUNCH,
        )  # fmt: skip
    if limits is None:
        return SplitUnion(ids, masks, counts, tile_size, None, None)
    rest = Selection(remote, sequences, selection.block_size)
    return SplitUnion(ids, masks, counts, tile_size, rest, remote_counts)


@on_its_device
def unite_tiles(selection: Selection, tile_size: int) -> TileUnion:
    """The union of the blocks of tile_size (1 to 31) neighbouring queries, with row masks (R9)."""
    require_top_k(selection.top_k)
    union = split_tiles(contiguous(selection), tile_size)
    width = int(union.counts.max()) if union.counts.numel() else 0
    tiles = tile_table(selection.sequences, tile_size, selection.indices.device)
    return TileUnion(
        starts=tiles[:, 0],
        stops=tiles[:, 1],
        block_ids=union.block_ids[..., :width],
        row_masks=union.row_masks[..., :width],
        tile_size=tile_size,
        sequences=selection.sequences,
        block_size=selection.block_size,
    )
