"""The other loop order: the union of the blocks of neighbouring queries (R9)."""

from __future__ import annotations

import numpy as np

from msa.ir import Selection, TileUnion


def unite_tiles(selection: Selection, tile_size: int) -> TileUnion:
    """Each tile lists every block that one of its queries reads, with one bit per query."""
    groups = selection.indices.shape[1]
    tiles = [
        (start, min(start + tile_size, qs.stop))
        for qs, _ in selection.sequences.spans()
        for start in range(qs.start, qs.stop, tile_size)
    ]
    unions: list[list[dict[int, int]]] = []
    for start, stop in tiles:
        masks: list[dict[int, int]] = [{} for _ in range(groups)]
        for i in range(start, stop):
            for r in range(groups):
                for b in selection.indices[i, r].tolist():
                    if b >= 0:
                        masks[r][b] = masks[r].get(b, 0) | 1 << (i - start)
        unions.append(masks)
    width = max((len(m) for masks in unions for m in masks), default=0)
    block_ids = np.full((len(tiles), groups, width), -1, np.int32)
    row_masks = np.zeros((len(tiles), groups, width), np.int32)
    for t, masks in enumerate(unions):
        for r, mask in enumerate(masks):
            for u, b in enumerate(sorted(mask)):
                block_ids[t, r, u], row_masks[t, r, u] = b, mask[b]
    borders = np.array(tiles, np.int32).reshape(-1, 2)
    return TileUnion(
        starts=borders[:, 0],
        stops=borders[:, 1],
        block_ids=block_ids,
        row_masks=row_masks,
        tile_size=tile_size,
        sequences=selection.sequences,
        block_size=selection.block_size,
    )
