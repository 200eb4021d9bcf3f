"""Lowering, first arrow: from the blocks of each query to the queries of each block (R13)."""

from __future__ import annotations

import torch

from msa.ir import ReverseIndex, Selection
from msa.torch_impl.tiles import borders, owners


def reverse_selection(selection: Selection) -> ReverseIndex:
    """The same edges sorted by group and block, queries ascending within each (R13).

    The edges of a selection are in the order of queries, so a stable sort by row is enough.

    Args:
        selection: indices int32 [Tq, Hkv, k].

    Returns:
        row_offsets int64 [rows + 1], query_ids and slots int32 [edges], counts [Tq, Hkv].

    >>> from msa.ir import Sequences
    >>> chosen = torch.tensor([[0, -1], [0, -1], [0, 1], [0, 1], [0, 2], [1, 2]], dtype=torch.int32)
    >>> index = reverse_selection(Selection(chosen[:, None], Sequences.one(6, 6), block_size=2))
    >>> index.row_offsets
    tensor([ 0,  5,  8, 10])
    >>> index.query_ids
    tensor([0, 1, 2, 3, 4, 2, 3, 5, 4, 5], dtype=torch.int32)
    >>> index.slots
    tensor([0, 0, 0, 0, 0, 1, 1, 0, 1, 1], dtype=torch.int32)
    """
    ids, sequences, block_size = selection.indices, selection.sequences, selection.block_size
    _, groups, top_k = ids.shape
    cu_blocks = sequences.cu_blocks(block_size)
    first_block = borders(cu_blocks, ids.device)[owners(sequences.cu_seqlens_q, ids.device)]
    group = torch.arange(groups, device=ids.device)
    rows = (group * cu_blocks[-1])[:, None] + first_block[:, None, None] + ids
    edges = (ids.flatten() >= 0).nonzero()[:, 0]
    sorted_rows, order = torch.sort(rows.flatten()[edges], stable=True)
    edges = edges[order]
    every_row = torch.arange(groups * cu_blocks[-1] + 1, device=ids.device)
    return ReverseIndex(
        row_offsets=torch.searchsorted(sorted_rows, every_row),
        query_ids=(edges // (groups * top_k)).int(),
        slots=(edges % top_k).int(),
        counts=selection.counts,
        sequences=sequences,
        block_size=block_size,
        top_k=top_k,
    )
