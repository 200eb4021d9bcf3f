"""Lowering of the backward: from the unions of query tiles to "which tiles read a block" (R13, R14).

    for each tile of neighbouring queries, ascending, each group and each block b of its union:
        append (tile, place of b in the union) to row (group, b)
    cut the rows into work items

A tile stands where a query stood, so the reverse index and the schedule of the forward do all of it.
An edge of tiles is read in one long run of memory, and says by a row mask which queries count.
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
from msa.triton_impl.tile_union import SplitUnion
from msa.triton_impl.tiles import tile_table


@dataclass(frozen=True)
class TileEdges:
    """Who reads each block, by tiles of `union.tile_size` queries.

    `schedule` is that of a selection whose queries are tiles; a slot is a place in the union.
    """

    union: SplitUnion
    tiles: Int[Tensor, "tiles 5"]
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
    tiles = tile_table(selection.sequences, union.tile_size, union.block_ids.device)
    return TileEdges(union, tiles, schedule_edges(reverse_edges(by_tile), chunk_size))


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


@triton.jit
def load_edge(query_ids, slots, masks, tiles, i_e, i_r, U, HKV: tl.constexpr):
    """Edge i_e of group i_r: its tile's first query, that query's own key, the first key of its
    sequence, and the mask of its rows."""
    i_t = tl.load(query_ids + i_e)
    bits = tl.load(masks + (i_t.to(tl.int64) * HKV + i_r) * U + tl.load(slots + i_e))
    p_tile = tiles + i_t * 5
    return tl.load(p_tile), tl.load(p_tile + 2), tl.load(p_tile + 3), bits
