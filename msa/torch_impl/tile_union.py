"""The other loop order: the union of the blocks of neighbouring queries (R9)."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from msa.ir import Selection, Sequences, TileUnion
from msa.torch_impl.tiles import borders, owners


def unite_tiles(selection: Selection, tile_size: int) -> TileUnion:
    """The union of the blocks of tile_size (1 to 31) neighbouring queries, with row masks (R9).

    Tiles start at each sequence's first query; U is the width of the widest union.

    Returns:
        starts, stops int32 [tiles]; block_ids, row_masks int32 [tiles, Hkv, U].

    >>> chosen = torch.tensor([[0, -1], [0, -1], [0, 1], [0, 1], [0, 2], [1, 2]], dtype=torch.int32)
    >>> union = unite_tiles(Selection(chosen[:, None], Sequences.one(6, 6), 2), tile_size=2)
    >>> union.block_ids[2, 0], union.row_masks[2, 0]  # block 0 by token 4, 1 by 5, 2 by both
    (tensor([0, 1, 2], dtype=torch.int32), tensor([1, 2, 3], dtype=torch.int32))
    """
    ids, sequences = selection.indices, selection.sequences
    groups, widest = ids.shape[1], sequences.max_blocks(selection.block_size)
    starts, stops, tiles, bits = tile_borders(sequences, tile_size, ids.device)
    query, group, slot = (ids >= 0).nonzero(as_tuple=True)
    key = (tiles[query] * groups + group) * widest + ids[query, group, slot]
    entries, entry_of_edge = torch.unique(key, return_inverse=True)  # ascending
    # Every query has its own bit, so a sum is a union; sums of integers are the same in any order.
    masks = torch.zeros_like(entries).index_add_(0, entry_of_edge, bits[query])
    lane, block = entries // max(1, widest), entries % max(1, widest)
    first = torch.searchsorted(lane, torch.arange(len(starts) * groups, device=ids.device))
    place = torch.arange(len(lane), device=ids.device) - first[lane]
    width = int(place.max()) + 1 if len(place) else 0
    block_ids = torch.full((len(starts) * groups, width), -1, dtype=torch.int32, device=ids.device)
    row_masks = torch.zeros_like(block_ids)
    block_ids[lane, place] = block.int()
    row_masks[lane, place] = masks.int()
    return TileUnion(
        starts=starts.int(),
        stops=stops.int(),
        block_ids=block_ids.view(len(starts), groups, width),
        row_masks=row_masks.view(len(starts), groups, width),
        tile_size=tile_size,
        sequences=sequences,
        block_size=selection.block_size,
    )


def tile_borders(
    sequences: Sequences, tile_size: int, device: torch.device
) -> tuple[Int[Tensor, " tiles"], Int[Tensor, " tiles"], Int[Tensor, " Tq"], Int[Tensor, " Tq"]]:
    """First and last-plus-one query of every tile; the tile and the bit of every query.

    >>> starts, stops, tiles, bits = tile_borders(
    ...     Sequences((0, 3, 5), (0, 3, 5)), 2, torch.device("cpu"))
    >>> starts.tolist(), stops.tolist(), tiles.tolist(), bits.tolist()
    ([0, 2, 3], [2, 3, 5], [0, 0, 1, 2, 2], [1, 2, 1, 1, 2])
    """
    cu_q = sequences.cu_seqlens_q
    cu_tiles = [0]
    for qs, _ in sequences.spans():
        cu_tiles.append(cu_tiles[-1] - (qs.start - qs.stop) // tile_size)
    first_query, first_tile = borders(cu_q, device), borders(tuple(cu_tiles), device)
    of_tile, of_query = owners(tuple(cu_tiles), device), owners(cu_q, device)
    rank = torch.arange(cu_tiles[-1], device=device) - first_tile[of_tile]
    starts = first_query[of_tile] + rank * tile_size
    stops = torch.minimum(starts + tile_size, first_query[of_tile + 1])
    offset = torch.arange(cu_q[-1], device=device) - first_query[of_query]
    return starts, stops, first_tile[of_query] + offset // tile_size, 1 << offset % tile_size
