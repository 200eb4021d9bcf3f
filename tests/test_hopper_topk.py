"""The Hopper top-k's arithmetic, on NumPy: ties, -inf, short rows, both ways through the rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton", minversion="3.6")

import numpy_gluon

from msa import MSAConfig
from msa.ir import Sequences
from msa.triton_impl.hopper import block_topk, plan
from msa.triton_impl.launch import pad


def expected(scores, own, sink, local, places, top_k):
    """One row of a selection from its scores, sink blocks left out (R6-R8)."""
    limit = min(max(own - local + 1 - sink, 0), len(scores))
    order = np.lexsort((np.arange(limit), -scores[:limit]))[:places]
    recent = range(max(own - local + 1, sink), own + 1)
    ids = sorted({*range(min(own + 1, sink)), *(order + sink).tolist(), *recent})
    return ids + [-1] * (top_k - len(ids))


@pytest.mark.parametrize(
    ("borders", "groups", "top_k", "sink", "local"),
    [
        (((0, 70), (0, 5000)), 4, 16, 0, 1),
        (((0, 40, 41, 90), (0, 20000, 20001, 23000)), 4, 16, 0, 1),
        (((0, 5), (0, 40000)), 3, 8, 2, 1),
        (((0, 300), (0, 300)), 5, 5, 1, 2),
        (((0, 9), (0, 20000)), 7, 33, 0, 1),
        (((0, 9), (0, 2600)), 1, 2, 1, 1),
    ],
)
@pytest.mark.parametrize("kind", ["ties", "distinct", "mostly -inf"])
@pytest.mark.parametrize("long", [0, 10**6], ids=["maxima", "direct"])
def test_rows_are_those_of_a_sort(borders, groups, top_k, sink, local, kind, long, monkeypatch):
    monkeypatch.setattr(plan, "LONG", long)
    block_size = 8 if long else 16
    sequences = Sequences(*borders)
    config = MSAConfig(block_size=block_size, top_k=top_k, sink_blocks=sink, local_blocks=local)
    places = top_k - config.forced_blocks
    found = plan.plan_scores(sequences, config, groups, 256, 2**29, torch.device("cpu"))
    (part,) = found.parts
    tiles = found.tiles.numpy()
    rng = np.random.default_rng(0)
    shape = (part.blocks // 8, 256, 8)
    scores = np.full(shape, np.nan, np.float32)  # what lies behind a tile's blocks in direct mode
    maxima = np.full(shape[:2], np.nan, np.float32)
    out = np.full((sequences.total_q, groups, top_k), 101, np.int32)
    want = out.copy()
    for start, stop, position, slab, blocks, *_ in tiles:
        x = {
            "ties": rng.integers(-2, 3, (256, blocks)),
            "distinct": rng.standard_normal((256, blocks)),
            "mostly -inf": np.where(rng.random((256, blocks)) < 0.02, 1.0, -np.inf),
        }[kind].astype(np.float32)
        own = (position + np.arange(256) // groups) // block_size
        limit = np.maximum(own - local + 1 - sink, 0)
        x[np.arange(blocks)[None, :] >= limit[:, None]] = -np.inf
        pieces = -(-blocks // 8)
        whole = np.full((256, pieces * 8), -np.inf, np.float32)
        whole[:, :blocks] = x
        slabs = slice(slab // 8, slab // 8 + pieces)
        scores[slabs] = whole.reshape(256, pieces, 8).transpose(1, 0, 2)
        maxima[slabs] = scores[slabs].max(2)
        for m in range(min((stop - start) * groups, 256 // groups * groups)):
            want[start + m // groups, m % groups] = expected(
                x[m], own[m], sink, local, places, top_k
            )
    kept = np.full((part.tiles * 256, max(places, 1)), -(2**30), np.int32)
    numpy_gluon.run(
        block_topk, "pick_kernel", (part.tiles, 8), scores, maxima, tiles, kept, out, HKV=groups,
        BK=block_size, TOP_K=top_k, SINK=sink, LOCAL=local, PLACES=places,
        LONG=part.long, LOG=pad(places).bit_length() - 1, ROWS=256, PIECE=8, WARPS=1,
    )  # fmt: skip
    np.testing.assert_array_equal(out, want)


PLANNED = [
    (Sequences.one(700, 70_000), 4, MSAConfig(128, 16), 2**22),
    (Sequences((0, 54, 54, 287, 288), (0, 1042, 1342, 4462, 4463)), 5, MSAConfig(64, 8, 2, 3),
     2**20),
    (Sequences((0, 9, 300), (0, 40_000, 41_000)), 100, MSAConfig(64, 4, 1, 1), 2**29),
    (Sequences.one(300, 3000), 3, MSAConfig(64, 2, 1, 1), 2**29),  # all places are forced
    (Sequences((0, 0), (0, 500)), 4, MSAConfig(), 2**29),
    (Sequences((0,), (0,)), 4, MSAConfig(), 2**29),
]  # fmt: skip


@pytest.mark.parametrize(("sequences", "groups", "config", "score_bytes"), PLANNED)
def test_the_plan_scores_every_block_once(sequences, groups, config, score_bytes, monkeypatch):
    """Each place of each slab is written once; segments name the keys of their blocks."""
    monkeypatch.setattr(plan, "CHUNK_BYTES", 2**21)
    make = plan.plan_scores.__wrapped__
    found = make(sequences, config, groups, 256, score_bytes, torch.device("cpu"))
    tiles, segments, runs = (x.numpy() for x in (found.tiles, found.segments, found.runs))
    first_key = np.concatenate(
        [np.full(q.stop - q.start, k.start) for q, k in sequences.spans()] or [np.zeros(0)]
    )
    sequence = np.repeat(np.arange(sequences.batch), np.diff(sequences.cu_seqlens_q))
    queries = np.zeros(sequences.total_q, int)
    assert len(tiles) == sum(part.tiles for part in found.parts)
    for part in found.parts:
        assert part.blocks * 1024 <= score_bytes or part.tiles == 1
        written = np.zeros(part.blocks, int)
        own = tiles[part.first_tile : part.first_tile + part.tiles]
        slab_of = {start * groups: row for start, *row in own.tolist()}
        bounds = runs[part.first_run : part.first_run + found.programs + 1]
        assert (np.diff(bounds) >= 0).all()
        for row, key, size, place, position, block, writes, s in segments[bounds[0] : bounds[-1]]:
            _, at, slab, blocks, *_ = slab_of[row]
            assert size >= 1 and at == position and block == config.sink_blocks + place - slab
            assert s == sequence[row // groups]
            assert key == first_key[row // groups] + block * config.block_size
            assert place + size <= slab + blocks
            if part.long:
                assert place % 8 == 0
            written[place : place + writes] += 1
        assert (written == 1).all()
        for start, stop, *_ in own:
            queries[start:stop] += 1
            assert 0 < stop - start <= 256 // groups
    assert (queries == 1).all()


def test_a_row_of_many_equal_scores():
    """More equal scores than 16 bits can count: the first ones are written, and nothing else."""
    value, write_kept = numpy_gluon.value, numpy_gluon.functions(block_topk)["write_kept"]
    out = np.full(20, -9, np.int32)
    above = tied = value(np.zeros(1, np.int32))
    for first in range(0, 70_000, 16):
        ids = value(first + np.arange(16, dtype=np.int32)[None, :])
        above, tied = write_kept(
            numpy_gluon.Pointer(out, [2]), value(np.zeros((1, 16), np.float32)), ids,
            value([10**6]), value(np.zeros(1, np.float32)), value(np.array([15], np.int32)),
            above, tied, 0, 1,
        )  # fmt: skip
    assert out.tolist() == [-9, -9, *range(15), -9, -9, -9]


@pytest.mark.parametrize(("sink", "local", "top_k"), [(0, 40, 44), (33, 1, 40), (20, 20, 40)])
def test_many_forced_blocks(sink, local, top_k):
    """More forced blocks than a thread writes at a time; the first queries have fewer."""
    sequences, groups, block_size = Sequences.one(300, 600), 2, 4
    config = MSAConfig(block_size=block_size, top_k=top_k, sink_blocks=sink, local_blocks=local)
    found = plan.plan_scores(sequences, config, groups, 256, 2**29, torch.device("cpu"))
    (part,) = found.parts
    rng, places = np.random.default_rng(0), top_k - config.forced_blocks
    scores = np.full((max(part.blocks // 8, 1), 256, 8), np.nan, np.float32)
    out = np.full((300, groups, top_k), 101, np.int32)
    want = out.copy()
    for start, stop, position, slab, blocks, *_ in found.tiles.numpy():
        x = rng.standard_normal((256, blocks)).astype(np.float32)
        own = (position + np.arange(256) // groups) // block_size
        x[np.arange(blocks) >= np.maximum(own - local + 1 - sink, 0)[:, None]] = -np.inf
        whole = np.full((256, -(-blocks // 8) * 8), -np.inf, np.float32)
        whole[:, :blocks] = x
        lain = whole.reshape(256, -1, 8).transpose(1, 0, 2)
        scores[slab // 8 : slab // 8 + len(lain)] = lain
        for m in range((stop - start) * groups):
            row = expected(x[m], own[m], sink, local, places, top_k)
            want[start + m // groups, m % groups] = row
    numpy_gluon.run(
        block_topk, "pick_kernel", (part.tiles, 8), scores, scores, found.tiles.numpy(), scores,
        out, HKV=groups, BK=block_size, TOP_K=top_k, SINK=sink, LOCAL=local, PLACES=places,
        LONG=False, LOG=pad(places).bit_length() - 1, ROWS=256, PIECE=8, WARPS=1,
    )  # fmt: skip
    np.testing.assert_array_equal(out, want)
