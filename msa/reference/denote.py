"""The dense meaning of an index form: which token each query may read.

The theorem of the lowering is `mask_of(after) == mask_of(before)` at every arrow (R13, R14, R9).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool

from msa.ir import Array, ReverseIndex, Schedule, Selection, Sequences, TileUnion

Edges = list[tuple[int, int, int]]


def mask_of(
    form: Selection | ReverseIndex | Schedule | TileUnion,
) -> Bool[Array, "Tq Hkv Tk"]:
    """True where a query of a group reads a packed token: selected and not in the future (R3, R9).

    Raises:
        ValueError: if a form names a (query, group, block) twice, because then it has no mask.

    >>> from msa.ir import Selection, Sequences
    >>> chosen = np.array([[0, -1], [0, -1], [0, 1]], np.int32)[:, None]
    >>> mask_of(Selection(chosen, Sequences.one(3, 3), block_size=2))[:, 0].astype(int)
    array([[1, 0, 0],
           [1, 1, 0],
           [1, 1, 1]])
    """
    if isinstance(form, Selection):
        sequences, groups, edges = form.sequences, form.indices.shape[1], selection_edges(form)
    elif isinstance(form, TileUnion):
        sequences, groups, edges = form.sequences, form.block_ids.shape[1], union_edges(form)
    else:
        index = form.reverse_index if isinstance(form, Schedule) else form
        sequences, groups = index.sequences, index.counts.shape[1]
        edges = schedule_edges(form) if isinstance(form, Schedule) else reverse_edges(index)
        form = index
    return paint(edges, sequences, groups, form.block_size)


def paint(
    edges: Edges, sequences: Sequences, groups: int, block_size: int
) -> Bool[Array, "Tq Hkv Tk"]:
    """Draw each (query, group, block of its sequence) as the visible tokens of that block."""
    mask = np.zeros((sequences.total_q, groups, sequences.total_k), bool)
    positions = sequences.positions()
    first_key = [ks.start for qs, ks in sequences.spans() for _ in range(qs.start, qs.stop)]
    seen: set[tuple[int, int, int]] = set()
    for edge in edges:
        i, r, b = edge
        if edge in seen:
            raise ValueError(f"query {i}, group {r} reads block {b} twice")
        seen.add(edge)
        stop = min((b + 1) * block_size, positions[i] + 1)
        mask[i, r, first_key[i] + b * block_size : first_key[i] + stop] = True
    return mask


def selection_edges(selection: Selection) -> Edges:
    """Each valid entry is an edge."""
    found = np.argwhere(selection.indices >= 0).tolist()
    return [(i, r, int(selection.indices[i, r, s])) for i, r, s in found]


def row_edges(index: ReverseIndex, row: int, start: int, stop: int) -> Edges:
    """Edges `start : stop` of a row: its block, counted from the start of its own sequence."""
    cu_blocks = index.sequences.cu_blocks(index.block_size)
    group, block = divmod(row, cu_blocks[-1])
    sequence = int(np.searchsorted(cu_blocks, block, side="right")) - 1
    ids = index.query_ids[start:stop].tolist()
    return [(i, group, block - cu_blocks[sequence]) for i in ids]


def reverse_edges(index: ReverseIndex) -> Edges:
    """All rows of a reverse index."""
    offsets = index.row_offsets.tolist()
    return [
        edge
        for row, (start, stop) in enumerate(zip(offsets, offsets[1:]))
        for edge in row_edges(index, row, start, stop)
    ]


def schedule_edges(schedule: Schedule) -> Edges:
    """All work items of a schedule."""
    items = zip(schedule.rows.tolist(), schedule.starts.tolist(), schedule.stops.tolist())
    return [edge for item in items for edge in row_edges(schedule.reverse_index, *item)]


def union_edges(union: TileUnion) -> Edges:
    """Every set bit of every row mask."""
    edges = []
    for t, r, u in np.argwhere(union.block_ids >= 0).tolist():
        bits = int(union.row_masks[t, r, u])
        for i in range(int(union.stops[t] - union.starts[t])):
            if bits >> i & 1:
                edges.append((int(union.starts[t]) + i, r, int(union.block_ids[t, r, u])))
    return edges
