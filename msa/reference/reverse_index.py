"""Lowering, first arrow: from the blocks of each query to the queries of each block (R13)."""

from __future__ import annotations

import numpy as np

from msa.ir import ReverseIndex, Selection


def reverse_selection(selection: Selection) -> ReverseIndex:
    """The edges of a selection, sorted by group and block; queries stay in ascending order."""
    sequences, block = selection.sequences, selection.block_size
    cu_blocks = sequences.cu_blocks(block)
    groups = selection.indices.shape[1]
    rows: list[list[tuple[int, int]]] = [[] for _ in range(groups * cu_blocks[-1])]
    for s, (qs, _) in enumerate(sequences.spans()):
        for i in range(qs.start, qs.stop):
            for r in range(groups):
                for slot, b in enumerate(selection.indices[i, r].tolist()):
                    if b >= 0:
                        rows[r * cu_blocks[-1] + cu_blocks[s] + b].append((i, slot))
    edges = np.array([edge for row in rows for edge in row], np.int32).reshape(-1, 2)
    return ReverseIndex(
        row_offsets=np.cumsum([0, *map(len, rows)], dtype=np.int64),
        query_ids=edges[:, 0],
        slots=edges[:, 1],
        counts=selection.counts,
        sequences=sequences,
        block_size=block,
        top_k=selection.top_k,
    )
