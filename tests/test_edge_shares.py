"""Equal shares of edges: every edge is in one item, and each item has its own number (R13)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import msa
from msa.ir import Selection, Sequences
from msa.triton_impl import tuning
from msa.triton_impl.hopper.edge_shares import share_edges
from msa.triton_impl.item_sums import sum_items, sum_parts
from msa.triton_impl.launch import INTERPRETED
from msa.triton_impl.reverse_index import reverse_edges
from msa.triton_impl.schedule import schedule_edges

pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="kernels need a GPU or TRITON_INTERPRET",
)
DEVICE = "cpu" if INTERPRETED else "cuda"
CONFIG = msa.MSAConfig(block_size=16, top_k=3)


def selection(lengths, groups, seed):
    """A random selection of `top_k` visible blocks, some places empty, of packed sequences."""
    random = torch.Generator().manual_seed(seed)
    stops = torch.tensor([0, *lengths]).cumsum(0).tolist()
    sequences = Sequences(tuple(stops), tuple(stops))
    parts = [torch.zeros(0, groups, CONFIG.top_k, dtype=torch.int32)]
    for n in lengths:
        own = torch.arange(n)[:, None, None] // CONFIG.block_size
        order = torch.rand(n, groups, 8, generator=random).argsort(2)[:, :, : CONFIG.top_k]
        ids = torch.where(order <= own, order, 8).sort(2).values
        parts.append(torch.where(ids < 8, ids, -1).int())
    return Selection(torch.cat(parts).to(DEVICE), sequences, CONFIG.block_size)


def items_of(shares):
    """Every item that the programs walk to: number -> (row, first edge, stop)."""
    offsets, cuts = shares.reverse_index.row_offsets.tolist(), shares.cuts.tolist()
    found = {}
    for program, row in enumerate(shares.first_rows.tolist()):
        edge = cuts[program]
        while edge < cuts[program + 1]:
            stop = min(offsets[row + 1], cuts[program + 1])
            if edge < stop:
                assert row + program not in found
                found[row + program] = (row, edge, stop)
                edge = stop
            row += 1
    return found


@example([3, 0, 40], 2, 132, 0)
@example([0], 1, 4, 0)
@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=3), st.integers(1, 2), st.integers(1, 9),
    st.integers(0, 9),
)  # fmt: skip
def test_every_edge_is_in_one_item(lengths, groups, programs, seed):
    shares = share_edges(selection(lengths, groups, seed), programs)
    offsets, items = shares.reverse_index.row_offsets.tolist(), items_of(shares)
    sizes = shares.cuts.diff()
    assert len(sizes) == programs and sizes.max() == -(-offsets[-1] // programs)
    assert all(item < shares.items for item in items)
    edges = [edge for _, edge, stop in items.values() for edge in range(edge, stop)]
    assert edges == list(range(offsets[-1]))
    bounds = zip(*shares.item_bounds.tolist(), strict=True)
    for row, (start, stop) in enumerate(bounds):
        assert list(range(start, stop)) == [i for i in items if items[i][0] == row]


@pytest.mark.parametrize("programs", [1, 5, 40])
def test_sums_of_shares_are_those_of_chunks(programs):
    """Parts that count edges: both ways count the same for each token."""
    chosen = selection([37, 3, 90], 2, 1)
    sequences = chosen.sequences
    shares = share_edges(chosen, programs)
    parts = torch.full((shares.items, 16, 4), torch.nan, device=DEVICE)
    for item, (_, edge, stop) in items_of(shares).items():
        parts[item] = stop - edge
    schedule = schedule_edges(reverse_edges(chosen), tuning.CHUNK_EDGES)
    sizes = (schedule.stops - schedule.starts).float()
    outs = [torch.full((sequences.total_k, 2, 4), torch.nan, device=DEVICE) for _ in range(2)]
    sum_parts(parts, *shares.item_bounds, sequences, 16, outs[0], 2.0)
    sum_items(sizes[:, None, None].expand(-1, 16, 4).contiguous(), schedule, outs[1], 2.0)
    assert torch.equal(*outs) and outs[0].sum() > 0
