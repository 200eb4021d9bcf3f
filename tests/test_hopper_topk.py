"""The Hopper top-k's arithmetic, on NumPy: ties, -inf, short rows, both ways through the rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

import numpy_gluon

from msa import MSAConfig
from msa.ir import Sequences
from msa.triton_impl.hopper import block_topk, plan
from msa.triton_impl.tiles import pad


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
        BK=block_size, TOP_K=top_k, P=pad(top_k, 1), SINK=sink, LOCAL=local, PLACES=places,
        LONG=part.long, LOG=pad(places).bit_length() - 1, ROWS=256, PIECE=8, WARPS=1,
    )  # fmt: skip
    np.testing.assert_array_equal(out, want)
