"""Lowering, second arrow: cut long rows into work items of bounded size (R14)."""

from __future__ import annotations

import numpy as np

from msa.ir import ReverseIndex, Schedule


def schedule_chunks(reverse_index: ReverseIndex, chunk_size: int) -> Schedule:
    """Every row becomes ceil(length / chunk_size) items, in row order; an empty row has none."""
    offsets = reverse_index.row_offsets.tolist()
    items = [
        (row, start, min(start + chunk_size, stop))
        for row, (first, stop) in enumerate(zip(offsets, offsets[1:]))
        for start in range(first, stop, chunk_size)
    ]
    table = np.array(items, np.int64).reshape(-1, 3)
    return Schedule(
        rows=table[:, 0].astype(np.int32),
        starts=table[:, 1],
        stops=table[:, 2],
        chunk_size=chunk_size,
        reverse_index=reverse_index,
    )
