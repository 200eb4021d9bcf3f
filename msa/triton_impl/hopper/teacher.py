"""The teacher of the index branch on Hopper: one of the groups of warps of `index_loss.py` (R17).

    for each work item (block of one group, edges start ... stop):          # KV-outer
        K = half of the block's keys, in registers
        for each batch of 16 edges (query t, slot s), in chunks of 64 rows (edges x heads):
            S                  = K @ q_rows^T                               # keys x rows
            P[keys, edge]      = sum over the group's heads of
                                     exp(softmax_scale * (S - top) - log_total)

Keys are the first operand and stay in registers for a whole item; the rows of queries are read from
the ring. A query's heads lie side by side along the rows, so their sum costs two shuffles for each
edge. Which tokens an edge sees, and the mean, are left to the students, which have less to do.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from msa.triton_impl.hopper.ring import release, wait_empty, wait_full

LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def load_work(work, item, n_blocks):
    """Of an item: its first edge, its number of edges, its block and its group."""
    rows, starts, stops = work
    start = gl.load(starts + item)
    row = gl.load(rows + item)
    return start, (gl.load(stops + item) - start).to(gl.int32), row % n_blocks, row // n_blocks


@gluon.jit
def load_ids(query_ids, start, length, x, G: gl.constexpr):
    """The queries of rows x of an item's edges, G rows an edge; -1 behind its last edge."""
    return gl.load(query_ids + start + x // G, mask=x // G < length, other=-1)


@gluon.jit
def load_heads(numbers, t, x, i_r, G: gl.constexpr, HKV: gl.constexpr):
    """Numbers [Tq, Hq] of the queries t, head x % G of a group each; 0 where there is none."""
    p = numbers + t.to(gl.int64) * (HKV * G) + i_r * G + x % G
    return gl.load(p, mask=t >= 0, other=0.0)


@gluon.jit
def multiply(k_low, k_high, q_tiles, q_full, step, STAGES: gl.constexpr, MMA: gl.constexpr):
    """Start the product of the keys with the rows of one chunk, one half of the dims at a time."""
    ROWS: gl.constexpr = MMA.instr_shape[1]
    wait_full(q_full, step, STAGES)
    half = 2 * (step % STAGES)
    low, high = q_tiles.index(half), q_tiles.index(half + 1)
    zero = gl.zeros([k_low.shape[0], ROWS], gl.float32, layout=MMA)
    acc = warpgroup_mma(k_low, low.permute((1, 0)), zero, use_acc=False, is_async=True)
    return warpgroup_mma(k_high, high.permute((1, 0)), acc, is_async=True)


@gluon.jit
def teach(W: gl.constexpr, tiles, barriers, numbers, work, query_ids, n_items, n_blocks, scale,
          G: gl.constexpr, HKV: gl.constexpr, TOP: gl.constexpr, BATCH: gl.constexpr,
          STAGES: gl.constexpr, MMA: gl.constexpr):  # fmt: skip
    """Teacher W: keys 64 * W ... 64 * W + 64 of every item's block."""
    k_tile, q_tiles, p_tiles, row_tiles = tiles
    k_full, k_empty, q_full, q_empty, p_full, p_empty = barriers
    top, log_total = numbers
    KEYS: gl.constexpr = MMA.instr_shape[0] * 4
    ROWS: gl.constexpr = MMA.instr_shape[1]
    EDGES: gl.constexpr = ROWS // G
    HALF: gl.constexpr = q_tiles.shape[2]
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    COLUMN: gl.constexpr = gl.SliceLayout(0, MMA)
    WIDE: gl.constexpr = gl.BlockedLayout([max(1, BATCH * G // 128)], [32], [4], [0])
    x = gl.arange(0, BATCH * G, layout=WIDE)
    step, batch, seen = 0, 0, 0
    for item in range(gl.program_id(0), n_items, gl.num_programs(0)):
        start, length, _, i_r = load_work(work, item, n_blocks)
        if length > 0:
            t = load_ids(query_ids, start, length, x, G)
            log = load_heads(log_total, t, x, i_r, G, HKV)
            if TOP:
                most = load_heads(top, t, x, i_r, G, HKV)
            t = load_ids(query_ids, start + BATCH, length - BATCH, x, G)
            wait_full(k_full, seen, 1)
            keys = k_tile.slice(W * KEYS, KEYS, dim=0)
            k_low = keys.slice(0, HALF, dim=1).load(A)
            k_high = keys.slice(HALF, HALF, dim=1).load(A)
            for i in range(0, length, BATCH):
                row_tiles.index(W).store(log * LOG2E)
                if TOP:
                    row_tiles.index(2 + W).store(most)
                log = load_heads(log_total, t, x, i_r, G, HKV)
                if TOP:
                    most = load_heads(top, t, x, i_r, G, HKV)
                after = i + 2 * BATCH
                t = load_ids(query_ids, start + after, length - after, x, G)
                p_tile = p_tiles.index(batch % 2).slice(W * KEYS, KEYS, dim=0)
                for c in gl.static_range(BATCH // EDGES):
                    running = multiply(k_low, k_high, q_tiles, q_full, step, STAGES, MMA)
                    s = warpgroup_mma_wait(0, deps=[running])
                    release(q_empty, step, STAGES)
                    step += 1
                    if c == 0:
                        if i == 0:  # the products have read all keys, so every load has ended
                            fence_async_shared()
                            release(k_empty, seen, 1)
                        wait_empty(p_empty[W], batch, 2)
                    less = row_tiles.index(W).slice(c * ROWS, ROWS).load(COLUMN)
                    if TOP:
                        s -= row_tiles.index(2 + W).slice(c * ROWS, ROWS).load(COLUMN)[None, :]
                    p = gl.exp2(s * scale - less[None, :])
                    p = gl.sum(gl.reshape(p, [KEYS, EDGES, G]), 2)
                    p_tile.slice(c * EDGES, EDGES, dim=1).store(p)
                release(p_full[W], batch, 2)
                batch += 1
            seen += 1
