"""Lowering, second arrow: cut long rows into work items of bounded size (R14)."""

from __future__ import annotations

import torch

from msa.ir import ReverseIndex, Schedule


def schedule_chunks(reverse_index: ReverseIndex, chunk_size: int) -> Schedule:
    """Every row becomes ceil(length / chunk_size) items, in row order; an empty row has none (R14).

    Returns:
        rows int32, starts and stops int64, all [items].

    >>> from msa.ir import Selection, Sequences
    >>> from msa.torch_impl import reverse_selection
    >>> chosen = torch.tensor([[0, -1], [0, -1], [0, 1], [0, 1], [0, 2], [1, 2]], dtype=torch.int32)
    >>> index = reverse_selection(Selection(chosen[:, None], Sequences.one(6, 6), block_size=2))
    >>> schedule = schedule_chunks(index, chunk_size=4)
    >>> schedule.rows.tolist(), schedule.starts.tolist(), schedule.stops.tolist()
    ([0, 0, 1, 2], [0, 4, 5, 8], [4, 5, 8, 10])
    """
    offsets = reverse_index.row_offsets
    items_per_row = -(-offsets.diff() // chunk_size)
    rows = torch.repeat_interleave(items_per_row)
    first_item = items_per_row.cumsum(0) - items_per_row
    rank = torch.arange(len(rows), device=rows.device) - first_item[rows]
    starts = offsets[rows] + rank * chunk_size
    stops = torch.minimum(starts + chunk_size, offsets[rows + 1])
    return Schedule(rows.int(), starts, stops, chunk_size, reverse_index)
