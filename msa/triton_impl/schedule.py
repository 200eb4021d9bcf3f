"""Lowering, second arrow: cut long rows into work items of bounded size (R14).

    for each row of the reverse index, in order:
        for start in range(row start, row stop, chunk_size):
            item (row, start, min(start + chunk_size, row stop))

What the fast form changes:
 1. A row's first item is the number of items of the rows before it: one prefix sum.
 2. Rows are independent after that, and a program writes the items of R rows side by side.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from msa.ir import ReverseIndex, Schedule
from msa.triton_impl.launch import contiguous
from msa.triton_impl.places import on_its_device
from msa.triton_impl.tuning import EVERY_LAUNCH


@triton.jit
def items_kernel(offsets, item_stops, rows, starts, stops, n_rows, chunk, R: tl.constexpr):
    """The items of R rows.

    Parameters:
        offsets: [rows + 1], int64; where the edges of a row of the reverse index start
        item_stops: [rows], int64; the number of items of the rows 0 ... x
        rows: [items], int32; the row of each item, written
        starts, stops: [items], int64; the edges of each item, written
        n_rows: int; rows of the reverse index
        chunk: int; edges of an item, at most
        R: rows of one program
    """
    o_row = tl.program_id(0) * R + tl.arange(0, R)
    m_row = o_row < n_rows
    b_start = tl.load(offsets + o_row, mask=m_row, other=0)
    b_stop = tl.load(offsets + o_row + 1, mask=m_row, other=0)
    b_items = (b_stop - b_start + chunk - 1) // chunk  # [R]
    p_item = tl.load(item_stops + o_row, mask=m_row, other=0) - b_items
    for i in range(0, tl.max(b_items).to(tl.int32)):
        m_item = i < b_items
        b_first = b_start + i * chunk
        tl.store(rows + p_item + i, o_row, mask=m_item)
        tl.store(starts + p_item + i, b_first, mask=m_item)
        tl.store(stops + p_item + i, tl.minimum(b_first + chunk, b_stop), mask=m_item)


def schedule_edges(reverse_index: ReverseIndex, chunk_size: int) -> Schedule:
    """`schedule_chunks` without waiting for the device.

    It has as many items as there can be at most. Those after the real ones are empty (start =
    stop).
    """
    offsets = reverse_index.row_offsets
    device, n_rows = offsets.device, len(offsets) - 1
    edges = len(reverse_index.query_ids)
    most = min(n_rows, edges) + edges // chunk_size
    rows = torch.zeros(most, dtype=torch.int32, device=device)
    starts = torch.zeros(most, dtype=torch.int64, device=device)
    stops = torch.zeros(most, dtype=torch.int64, device=device)
    if most:
        item_stops = torch.cumsum((offsets.diff() + (chunk_size - 1)) // chunk_size, 0)
        items_kernel[triton.cdiv(n_rows, 128),](
            offsets, item_stops, rows, starts, stops, n_rows, chunk_size, R=128, **EVERY_LAUNCH
        )
    return Schedule(rows, starts, stops, chunk_size, reverse_index)


@on_its_device
def schedule_chunks(reverse_index: ReverseIndex, chunk_size: int) -> Schedule:
    """Every row becomes ceil(length / chunk_size) items, in row order; an empty row has none."""
    schedule = schedule_edges(contiguous(reverse_index), chunk_size)
    n = int((schedule.stops > schedule.starts).sum())
    return Schedule(
        schedule.rows[:n], schedule.starts[:n], schedule.stops[:n], chunk_size, reverse_index
    )
