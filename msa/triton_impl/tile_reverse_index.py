"""Lowering of the backward: from unions of query tiles to "which tiles read a block" (R13, R14).

    for each tile of neighbouring queries, ascending, each group and each block b of its union:
        append (tile, place of b in the union) to row (group, b)
    cut the rows into work items

A tile takes the place of a query, so the reverse index and the schedule of the forward do all of
this. A tile is read in one long run of memory, and its row mask says which queries read the block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor

from msa.ir import Schedule, Selection, Sequences
from msa.triton_impl.reverse_index import reverse_edges
from msa.triton_impl.schedule import schedule_edges
from msa.triton_impl.tables import query_table, tile_table
from msa.triton_impl.tile_union import SplitUnion
from msa.triton_impl.tuning import EVERY_LAUNCH


@triton.jit
def load_edge(records, i_e):
    """Edge i_e: its tile's first query, that query's own key, the mask of rows that read it."""
    p_x = records + i_e * 4
    return tl.load(p_x), tl.load(p_x + 1), tl.load(p_x + 2)


@triton.jit
def record_kernel(query_ids, slots, offsets, masks, tiles, first_blocks, records, n_blocks, U,
                  HKV: tl.constexpr, B: tl.constexpr):  # fmt: skip
    """Write the records of B edges: what a program needs of an edge, side by side.

    Parameters:
        query_ids, slots: [edges], int32; tile of an edge, place of the block in its union
        offsets: [rows + 1], int64; where the edges of a row of the reverse index start
        masks: [tiles, Hkv, U], int32; bit i: query i of the tile selected the block
        tiles: [tiles, 5], int32; a `tile_table`
        first_blocks: [Tq], int32; number of the first block of each query's sequence
        records: [edges, 4], int32; see `TileEdges`, written
        n_blocks: int; blocks of all sequences
        U: int; width of masks
        HKV: groups
        B: edges of one program
    """
    o_e = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    m_e = o_e < tl.load(offsets + HKV * n_blocks)
    b_r = tl.zeros([B], tl.int32)  # rows are ordered by group
    for i_r in range(1, HKV):
        b_r += (o_e >= tl.load(offsets + i_r * n_blocks)).to(tl.int32)
    b_t = tl.load(query_ids + o_e, mask=m_e, other=0).to(tl.int64)
    b_u = tl.load(slots + o_e, mask=m_e, other=0)
    p_mask = masks + (b_t * HKV + b_r) * U + b_u
    b_q = tl.load(tiles + b_t * 5, mask=m_e, other=0)
    p_x = records + o_e * 4
    tl.store(p_x, b_q, mask=m_e)
    tl.store(p_x + 1, tl.load(tiles + b_t * 5 + 2, mask=m_e, other=0), mask=m_e)
    tl.store(p_x + 2, tl.load(p_mask, mask=m_e, other=0), mask=m_e)
    tl.store(p_x + 3, tl.load(first_blocks + b_q, mask=m_e, other=0), mask=m_e)


@dataclass(frozen=True)
class TileEdges:
    """Which tiles of `tile_size` queries read each block.

    This form is of the triton backend alone, for gradients and the alignment loss. `schedule` is
    the schedule of a selection whose queries are tiles. `records` has, in the order of its edges:
    the tile's first query, that query's own key, a mask with bit i set if query i of the tile reads
    the block, and the number of the sequence's first block.
    """

    tile_size: int
    records: Int[Tensor, "edges 4"]
    schedule: Schedule


def tile_sequences(sequences: Sequences, tile_size: int) -> Sequences:
    """The same sequences of keys, tiles in the place of queries.

    >>> tile_sequences(Sequences((0, 3, 4), (0, 5, 6)), 2)
    Sequences(cu_seqlens_q=(0, 2, 3), cu_seqlens_k=(0, 5, 6))
    """
    cu_q, cu_k = sequences.cu_seqlens_q, sequences.cu_seqlens_k
    starts = [0]
    for first, last in zip(cu_q, cu_q[1:]):
        starts.append(starts[-1] + -(-(last - first) // tile_size))
    return Sequences(tuple(starts), cu_k)


def reverse_union(union: SplitUnion, selection: Selection, chunk_size: int) -> TileEdges:
    """The tiles that read each block, in items of at most `chunk_size`."""
    sequences = tile_sequences(selection.sequences, union.tile_size)
    by_tile = Selection(union.block_ids, sequences, selection.block_size)
    index = reverse_edges(by_tile)
    n_edges, device = len(index.query_ids), union.block_ids.device
    records = torch.empty((n_edges, 4), dtype=torch.int32, device=device)
    if n_edges:
        tiles = tile_table(selection.sequences, union.tile_size, device)
        groups = union.block_ids.shape[1]
        record_kernel[triton.cdiv(n_edges, 512),](
            index.query_ids, index.slots, index.row_offsets, union.row_masks, tiles,
            query_table(selection.sequences, selection.block_size, device)[2], records,
            sequences.cu_blocks(selection.block_size)[-1], union.row_masks.shape[2],
            HKV=groups, B=512, **EVERY_LAUNCH,
        )  # fmt: skip
    return TileEdges(union.tile_size, records, schedule_edges(index, chunk_size))


def unite_all(
    sequences: Sequences, block_size: int, tile_size: int, groups: int, device: torch.device
) -> SplitUnion:
    """The union of a tile whose queries read every visible block; place b is block b."""
    start, stop, own, first_key, _ = tile_table(sequences, tile_size, device).unbind(1)
    shape = (len(start), groups, max(1, sequences.max_blocks(block_size)))
    query = torch.arange(tile_size, device=device)
    last = (own - first_key)[:, None] + query  # [tiles, tile_size] position of each query
    first = torch.arange(shape[2], device=device) * block_size
    reads = (first <= last[..., None]) & (query < (stop - start)[:, None])[..., None]
    masks = (reads << query[:, None]).sum(1, dtype=torch.int32)  # [tiles, NB]
    ids = torch.where(masks != 0, torch.arange(shape[2], device=device), -1).int()
    ids, masks = (x[:, None].expand(shape).contiguous() for x in (ids, masks))
    return SplitUnion(ids, masks, (ids >= 0).sum(2, dtype=torch.int32), tile_size, None, None)
