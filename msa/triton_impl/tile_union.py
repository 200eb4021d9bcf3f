"""The other loop order: the union of the blocks of neighbouring queries (R9).

    for each tile of neighbouring queries, each group:
        for each block b that one of the tile's queries selected, ascending:
            ids += b;  masks += bits of the queries that selected b
    split form, where the union is long: blocks that too few queries share leave it; they become a
    Selection of their own, `remote`, to be attended to KV-outer

What the fast form changes:
 1. All pairs in place of lists: each edge of the tile looks at all others, a few dozen at a time. A
    block's mask is the sum of the bits of the edges that carry its id; the edge of its first query
    speaks for the block; its place is the number of speakers with smaller ids.
 2. In the split form only blocks with enough bits have a speaker. The gaps that they leave in the
    other queries' rows are closed by a prefix sum along each row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor

from msa.ir import Selection, TileUnion
from msa.triton_impl.tiles import NO_BLOCK, count_bits, pad, tile_table


@triton.jit
def union_kernel(indices, tiles, ids, masks, counts, remote, remote_counts, whole, pairs,
                 HKV: tl.constexpr, TOP_K: tl.constexpr, P: tl.constexpr, BT: tl.constexpr,
                 CHUNK: tl.constexpr, SPLIT: tl.constexpr):  # fmt: skip
    """One tile of up to BT queries and one group: E = BT * P edges."""
    E: tl.constexpr = BT * P
    i_t, i_r = tl.program_id(0), tl.program_id(1)
    start, stop = tl.load(tiles + i_t * 5), tl.load(tiles + i_t * 5 + 1)
    indices += (start.to(tl.int64) * HKV + i_r) * TOP_K
    ids += (i_t.to(tl.int64) * HKV + i_r) * E
    masks += (i_t.to(tl.int64) * HKV + i_r) * E
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
        b_bit = tl.full([1, CHUNK], 1, tl.int32) << o_j[None, :]
        b_mask += tl.sum(tl.where(b_id[:, None] == b_other[None, :], b_bit, 0), 1)
    b_mask = tl.where(m_e, b_mask, 0)
    m_speaks = m_e & ((b_mask & ((tl.full([E], 1, tl.int32) << o_i) - 1)) == 0)
    n = tl.sum(m_speaks.to(tl.int32))
    m_near = m_e
    if SPLIT:
        least = tl.where(n <= whole, 1, tl.where(n <= pairs, 2, 3))
        m_near = m_e & (count_bits(b_mask.to(tl.uint32)) >= least)
        m_speaks = m_speaks & m_near
        n = tl.sum(m_speaks.to(tl.int32))
    tl.store(ids + o_e, tl.where(m_speaks, b_id, NO_BLOCK))
    tl.debug_barrier()
    b_place = tl.zeros([E], tl.int32)
    for first in range(0, E, CHUNK):
        b_other = tl.load(ids + first + tl.arange(0, CHUNK))
        b_place += tl.sum((b_other[None, :] < b_id[:, None]).to(tl.int32), 1)
    tl.debug_barrier()
    tl.store(ids + b_place, b_id, mask=m_speaks)
    tl.store(masks + b_place, b_mask, mask=m_speaks)
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
        tl.store(remote_counts + o_t * HKV + i_r, b_n, mask=o_t < stop)


@dataclass(frozen=True)
class SplitUnion:
    """The shared blocks of each tile, to be walked, and each query's other blocks.

    `remote` has each query's other blocks, ascending, then -1; None if every block is walked.
    """

    block_ids: Int[Tensor, "tiles Hkv E"]
    row_masks: Int[Tensor, "tiles Hkv E"]
    counts: Int[Tensor, "tiles Hkv"]
    tile_size: int
    remote: Selection | None
    remote_counts: Int[Tensor, "Tq Hkv"] | None


def split_tiles(
    selection: Selection, tile_size: int, limits: tuple[int, int] | None = None
) -> SplitUnion:
    """Unions of each tile's blocks, the long ones without the blocks that few queries share.

    limits (whole, pairs): a union of up to `whole` blocks keeps them all, one of up to `pairs`
    those of two queries or more, a longer one those of three or more. None keeps all.
    Nothing here waits for the device.
    """
    indices, sequences = selection.indices, selection.sequences
    n_q, groups, top_k = indices.shape
    device = indices.device
    tiles = tile_table(sequences, tile_size, device)
    some, width = pad(tile_size, 1), pad(top_k, 1)
    shape = (len(tiles), groups, max(some * width, 2))
    ids, masks = (torch.empty(shape, dtype=torch.int32, device=device) for _ in range(2))
    counts = torch.zeros(shape[:2], dtype=torch.int32, device=device)
    remote, remote_counts = ids, counts
    if limits:
        remote = torch.empty_like(indices)
        remote_counts = torch.empty((n_q, groups), dtype=torch.int32, device=device)
    if n_q:
        union_kernel[len(tiles), groups](
            indices, tiles, ids, masks, counts, remote, remote_counts, *(limits or (0, 0)),
            HKV=groups, TOP_K=top_k, P=shape[2] // some, BT=some, SPLIT=limits is not None,
            CHUNK=min(shape[2], 64), num_warps=1 if shape[2] <= 64 else 4,
        )  # fmt: skip
    if limits is None:
        return SplitUnion(ids, masks, counts, tile_size, None, None)
    rest = Selection(remote, sequences, selection.block_size)
    return SplitUnion(ids, masks, counts, tile_size, rest, remote_counts)


def unite_tiles(selection: Selection, tile_size: int) -> TileUnion:
    """The union of the blocks of tile_size (1 to 31) neighbouring queries, with row masks (R9)."""
    union = split_tiles(selection, tile_size)
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
