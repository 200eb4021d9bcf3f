"""Unions that are split by parts of a tile, and slots beside the result of a walk (R9, R16)."""

from __future__ import annotations

from itertools import accumulate

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from msa.checks import is_interpreted
from msa.ir import Output, Selection, Sequences
from msa.loop_order import SHARED
from msa.triton_impl.combine import Slots, weigh_slots
from msa.triton_impl.tile_union import split_tiles

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [
    pytest.mark.skipif(not (CUDA or is_interpreted()), reason="needs a GPU or the interpreter"),
    *[pytest.mark.gpu] * CUDA,
]


# -- unions split by parts of a tile --------------------------------------------------------------
@st.composite
def selections(draw):
    """Selections of up to three blocks of twelve, of sequences that end inside tiles."""
    lengths = draw(st.lists(st.integers(0, 11), min_size=1, max_size=3))
    rows = st.lists(st.integers(0, 11), min_size=1, max_size=3, unique=True).map(sorted)
    n_q, groups = sum(lengths), draw(st.integers(1, 2))
    chosen = draw(st.lists(rows, min_size=n_q * groups, max_size=n_q * groups))
    ids = torch.tensor([row + [-1] * (3 - len(row)) for row in chosen], dtype=torch.int32)
    borders = (0, *accumulate(lengths)), (0, *accumulate(12 * 4 for _ in lengths))
    ids = ids.view(n_q, groups, 3).to(DEVICE)
    return Selection(ids, Sequences(*borders), 4)


def split_by_lists(rows, share, limits):
    """Of the rows of one tile: the queries of each block of the union, and what each row loses."""
    whole, pairs = limits
    union, lost = {}, [[] for _ in rows]
    for first in range(0, len(rows), share):
        part = range(first, min(first + share, len(rows)))
        blocks = sorted({b for i in part for b in rows[i]})
        readers = {b: [i for i in part if b in rows[i]] for b in blocks}
        least = 1 if len(readers) <= whole else 2 if len(readers) <= pairs else 3
        for block, who in readers.items():
            if len(who) >= least:
                union.setdefault(block, []).extend(who)
            else:
                for i in who:
                    lost[i].append(block)
    return dict(sorted(union.items())), lost


@pytest.mark.parametrize("limits", [SHARED, (0, 0), (2, 4)])
@pytest.mark.parametrize(("size", "share"), [(4, 1), (4, 2), (8, 4), (8, 8)])
@given(selection=selections())
def test_the_rule_looks_at_each_part_of_a_tile(size, share, limits, selection):
    found = split_tiles(selection, size, limits, share)
    assert found.remote is not None and found.remote_counts is not None
    ids, remote = selection.indices.tolist(), found.remote.indices.tolist()
    tile = 0
    for queries, _ in selection.sequences.spans():
        for start in range(queries.start, queries.stop, size):
            part = range(start, min(start + size, queries.stop))
            for r in range(selection.indices.shape[1]):
                rows = [[b for b in ids[t][r] if b >= 0] for t in part]
                union, lost = split_by_lists(rows, share, limits)
                n = int(found.counts[tile, r])
                assert found.block_ids[tile, r, :n].tolist() == list(union)
                masks = [sum(1 << i for i in who) for who in union.values()]
                assert found.row_masks[tile, r, :n].tolist() == masks
                for t, blocks in zip(part, lost, strict=True):
                    assert remote[t][r] == blocks + [-1] * (3 - len(blocks))
                    assert found.remote_counts[t, r] == len(blocks)
            tile += 1


# -- the result of a walk as one more slot --------------------------------------------------------
@st.composite
def slots(draw):
    """Slots, some unused, and what a walk left; every number that must not be read is NaN."""
    n_q, groups, group = (draw(st.integers(1, n)) for n in (4, 2, 5))
    top_k, dim = draw(st.integers(1, 4)), 8
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    counts = torch.randint(0, top_k + 1, (n_q, groups), generator=random)
    shape = n_q, groups, top_k, group
    unused = (torch.arange(top_k) >= counts[..., None])[..., None].expand(shape)
    out = torch.randn(*shape, dim, generator=random)
    top, total = 30 * torch.randn(shape, generator=random), 1 + torch.rand(shape, generator=random)
    for x in (out, top, total):
        x[unused] = torch.nan
    walked = torch.randn(n_q, groups * group, dim, generator=random)
    tops = 30 * torch.randn(n_q, groups * group, generator=random)
    totals = 1 + torch.rand(n_q, groups * group, generator=random)
    empty = torch.rand(n_q, groups, generator=random) < 0.3  # KV-outer has done all blocks
    empty = (empty & (counts > 0)).repeat_interleave(group, 1)
    walked[empty], totals[empty], tops[empty] = torch.nan, 0.0, torch.finfo(torch.float32).min
    return out, top, total, counts.int(), walked, tops, totals


@given(case=slots(), scale=st.sampled_from([0.125, 1.0]))
def test_the_walk_is_one_more_slot(case, scale):
    out, top, total, counts, walked, tops, totals = (x.to(DEVICE) for x in case)
    walk_lse = scale * tops.double() + totals.double().log()
    lse = walk_lse.float()
    into = Output(walked.clone(), lse.clone())
    weigh_slots(Slots(out, top, total, counts), scale, into, (tops, totals))
    top_k, group = top.shape[2:]
    used = torch.arange(top_k, device=DEVICE) < counts[..., None]
    parts = out.double().where(used[..., None, None], 0.0).transpose(2, 3).flatten(1, 2)
    lses = (scale * top.double() + total.double().log()).where(used[..., None], -torch.inf)
    lses = torch.cat([lses.transpose(2, 3).flatten(1, 2), walk_lse[..., None]], 2)
    own = walked.double().where((totals != 0)[..., None], 0.0)
    want = (lses.softmax(2)[..., None] * torch.cat([parts, own[:, :, None]], 2)).sum(2)
    torch.testing.assert_close(into.out.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(into.lse.double(), lses.logsumexp(2), rtol=1e-5, atol=1e-5)
    finished = (counts == 0).repeat_interleave(group, 1)
    assert torch.equal(into.out[finished], walked[finished])
    assert torch.equal(into.lse[finished], lse[finished])
