"""Equal shares of the edges of a reverse index, one for each program (R13, R14).

    program p has the edges cuts[p] ... cuts[p + 1]     # cuts[p] = min(p * share, edges)
    for each row that has edges among them:
        item row + p = (row, those edges)

A walk along all edges moves to the next row or to the next program at each border of items, so
row + p is another number for each item, and no prefix sum over items is needed. The items of a row
lie side by side, because only the last programs can be without edges. All others have the same
number of edges, whatever the lengths of rows are. A row has several items only if a cut lies inside
it, so the items are hardly more than the rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from msa.ir import ReverseIndex, Selection
from msa.triton_impl.reverse_index import reverse_edges


@dataclass(frozen=True)
class EdgeShares:
    """A reverse index that is cut into one share of edges for each program; tensors of int64."""

    cuts: Int[Tensor, " programs_plus_1"]
    """Program p has the edges cuts[p] ... cuts[p + 1]."""
    first_rows: Int[Tensor, " programs"]
    """The row of each program's first edge."""
    item_bounds: Int[Tensor, "2 rows"]
    """The first item of each row, and the item behind its last one."""
    reverse_index: ReverseIndex

    @property
    def items(self) -> int:
        """Room for the items: no item has a greater number."""
        return self.item_bounds.shape[1] + len(self.first_rows)


def share_edges(selection: Selection, programs: int) -> EdgeShares:
    """The reverse index of a selection in equal shares, without waiting for the device.

    >>> from msa.ir import Sequences
    >>> chosen = torch.tensor([[[0, -1]], [[0, 1]], [[0, 1]]], dtype=torch.int32)
    >>> shares = share_edges(Selection(chosen, Sequences.one(3, 3), 2), 2)
    >>> shares.cuts.tolist(), shares.first_rows.tolist()
    ([0, 3, 5], [0, 1])
    >>> shares.item_bounds.tolist()
    [[0, 2], [1, 3]]
    """
    index = reverse_edges(selection)
    offsets = index.row_offsets
    starts, stops = offsets[:-1], offsets[1:]
    share = (offsets[-1] + (programs - 1)) // programs
    cuts = torch.minimum(share * torch.arange(programs + 1, device=offsets.device), offsets[-1])
    first_rows = torch.searchsorted(offsets, cuts[:-1], right=True) - 1
    row = torch.arange(len(starts), device=offsets.device)
    item_starts = row + torch.searchsorted(cuts, starts, right=True) - 1
    item_stops = row + torch.searchsorted(cuts, stops - 1, right=True)
    item_stops = torch.where(starts < stops, item_stops, item_starts)
    return EdgeShares(cuts, first_rows, torch.stack([item_starts, item_stops]), index)
