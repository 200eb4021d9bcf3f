"""What the groups of warps of `index_loss.py` read: copied, or loaded, a batch of edges at a time.

    producer    one warp: of every item its block of keys, and the rows of each edge's query by the
                copy engine, in chunks of 64 rows
    loader      two warps: of every batch the index queries, and for each edge the numbers of its
                softmax, its own key and the place of its gradient

Both run ahead of their readers. So no other warp waits for an address from memory.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from msa.triton_impl.hopper.ring import copy_tile, in_parts, release, wait_empty
from msa.triton_impl.hopper.teacher import LOG2E, load_work


@gluon.jit
def load_queries(query_ids, start, length, x, EDGES: gl.constexpr):
    """The queries of edges `x ... x + EDGES` of an item, as a tuple; the last one again behind."""
    found = ()
    for e in gl.static_range(EDGES):
        found += (gl.load(query_ids + start + gl.minimum(x + e, length - 1)),)
    return found


@gluon.jit
def copy_edges(q_desc, k_desc, k_idx_desc, tiles, barriers, work, query_ids, first_keys, n_items,
               n_blocks, nowhere, G: gl.constexpr, HKV: gl.constexpr, BATCH: gl.constexpr,
               STAGES: gl.constexpr):  # fmt: skip
    """The producer: of every item its block of keys, and the rows of each edge's query."""
    k_tile, k_idx_tiles, q_tiles = tiles
    k_full, k_empty, q_full, q_empty, k_idx_full, k_idx_empty = barriers
    EDGES: gl.constexpr = q_tiles.shape[1] // G
    HALF: gl.constexpr = q_tiles.shape[2]
    PARTS: gl.constexpr = [EDGES, G, HALF]
    LAYOUT: gl.constexpr = q_desc.layout
    step, seen = 0, 0
    for item in range(gl.program_id(0), n_items, gl.num_programs(0)):
        start, length, i_b, i_r = load_work(work, item, n_blocks)
        if length > 0:
            ids = load_queries(query_ids, start, length, 0, EDGES)
            following = load_queries(query_ids, start, length, EDGES, EDGES)
            first = gl.load(first_keys + i_b)
            wait_empty(k_empty, seen, 1)
            mbarrier.expect(k_full.index(0), k_desc.block_type.nbytes)
            copy_tile(k_desc, [first, i_r * (2 * HALF)], k_full.index(0), k_tile)
            stop = (length + BATCH - 1) // BATCH * BATCH
            for x in range(0, stop, EDGES):
                after = load_queries(query_ids, start, length, x + 2 * EDGES, EDGES)
                wait_empty(q_empty, step, STAGES)
                full = q_full.index(step % STAGES)
                half = 2 * (step % STAGES)
                low = in_parts(q_tiles.index(half), PARTS, LAYOUT)
                high = in_parts(q_tiles.index(half + 1), PARTS, LAYOUT)
                mbarrier.expect(full, 2 * EDGES * q_desc.block_type.nbytes)
                for e in gl.static_range(EDGES):
                    place = gl.where(x + e < length, (ids[e] * HKV + i_r) * G, nowhere)
                    copy_tile(q_desc, [place, 0], full, low.index(e))
                    copy_tile(q_desc, [place, HALF], full, high.index(e))
                ids = following
                following = after
                step += 1
                if x == BATCH - EDGES:  # the students read these keys after the first batch
                    wait_empty(k_idx_empty, seen, 1)
                    mbarrier.expect(k_idx_full.index(0), 2 * k_idx_desc.block_type.nbytes)
                    copy_tile(k_idx_desc, [first, 0], k_idx_full.index(0), k_idx_tiles.index(0))
                    copy_tile(k_idx_desc, [first, HALF], k_idx_full.index(0), k_idx_tiles.index(1))
            seen += 1


@gluon.jit
def load_edges(tiles, barriers, numbers, work, edges, q_idx, n_items, n_blocks, stride_qt,
               stride_qh, HKV: gl.constexpr, TOP_K: gl.constexpr, WARPS: gl.constexpr):  # fmt: skip
    """The loader: the index queries of every batch, and the numbers of its edges."""
    q_tiles, number_tiles, own_tiles, place_tiles = tiles
    asked_full, asked_empty = barriers
    top, log_total = numbers
    query_ids, slots, own_keys = edges
    BATCH: gl.constexpr = q_tiles.shape[1]
    DI: gl.constexpr = q_tiles.shape[2]
    LINES: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    EDGE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    a_e = gl.arange(0, BATCH, layout=gl.SliceLayout(1, LINES))
    o_d = gl.arange(0, DI, layout=gl.SliceLayout(0, LINES))
    o_e = gl.arange(0, BATCH, layout=EDGE)
    batch = 0
    for item in range(gl.program_id(0), n_items, gl.num_programs(0)):
        start, length, _, i_r = load_work(work, item, n_blocks)
        for i in range(0, length, BATCH):
            there = a_e < length - i
            t = gl.load(query_ids + start + i + a_e, mask=there, other=0).to(gl.int64)
            p = q_idx + t * stride_qt + i_r.to(gl.int64) * stride_qh
            asked = gl.load(p[:, None] + o_d[None, :], mask=there[:, None], other=0.0)
            real = o_e < length - i
            t = gl.load(query_ids + start + i + o_e, mask=real, other=0)
            slot = gl.load(slots + start + i + o_e, mask=real, other=0)
            own = gl.load(own_keys + t, mask=real, other=-1)
            x = t.to(gl.int64) * HKV + i_r
            b_top = gl.load(top + x, mask=real, other=0.0)
            b_log = gl.load(log_total + x, mask=real, other=0.0) * LOG2E
            stage = batch % 2
            wait_empty(asked_empty, batch, 2)
            q_tiles.index(stage).store(asked)
            own_tiles.index(stage).store(own)
            number_tiles.index(2 * stage).store(b_top)
            number_tiles.index(2 * stage + 1).store(b_log)
            place_tiles.index(stage).store(gl.where(real, x * TOP_K + slot, -1))
            fence_async_shared()
            release(asked_full, batch, 2)
            batch += 1
