"""The students of the index branch on Hopper: groups of warps of `index_loss.py` (R17).

    for each work item (block of one group, edges start ... stop):          # KV-outer
        for each batch of 16 edges (query t, slot s):
            log P_idx  = index_scale * (k_idx q_idx^T - top) - log_total
            P          = what the teachers left, 0 behind the query's own key
            loss      += P (log P - log P_idx);  dS = P_idx - P
            d_k_idx   += dS q_idx;  d_q_idx[t, group, s] = dS^T k_idx

Each of two students owns 64 of the block's 128 keys. For d_q_idx, which is a sum over all keys,
each waits for the dS of the other and computes 64 dims.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from msa.triton_impl.hopper.ring import release, wait_full
from msa.triton_impl.hopper.teacher import load_work
from msa.triton_impl.hopper.walk_rows import clear_foreign


@gluon.jit
def fast_log2(x):
    """Base-2 logarithm by one instruction, of normal numbers."""
    return gl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def compare(s, p_tile, own, first, b_top, b_log, b_gap, scale, W: gl.constexpr, G: gl.constexpr,
            MMA: gl.constexpr):  # fmt: skip
    """The loss of half of the block's keys [64], added up, and the gradient of their scores.

    The minimum of a NaN and 0 is 0. So a score that equals an infinite top is 0 below it. All
    logarithms are to the base 2. b_log is already.
    """
    KEYS: gl.constexpr = p_tile.shape[0] // 2
    o_n = first + W * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(1, MMA))
    seen = o_n[:, None] <= own[None, :]
    below = gl.minimum(gl.maximum(s, float("-inf")) - b_top[None, :], 0.0)  # NaN is -inf (R4)
    student = gl.where(seen, below, float("-inf")) * scale - b_log[None, :]
    p = gl.where(seen, p_tile.slice(W * KEYS, KEYS, dim=0).load(MMA) * (1.0 / G), 0.0)
    gap = p * (fast_log2(gl.maximum(p, 2.0**-126)) - student)
    return b_gap + gl.sum(gl.where(p != 0.0, gap, 0.0), 1), gl.exp2(student) - p  # NaN is not 0


@gluon.jit
def start_scores(k_idx_tiles, q_tile, W: gl.constexpr, MMA: gl.constexpr):
    """Start the product of half of the block's index keys with a batch of index queries."""
    KEYS: gl.constexpr = MMA.instr_shape[0] * 4
    BATCH: gl.constexpr = q_tile.shape[0]
    HALF: gl.constexpr = k_idx_tiles.shape[2]
    acc = gl.zeros([KEYS, BATCH], gl.float32, layout=MMA)
    for h in gl.static_range(2):
        keys = k_idx_tiles.index(h).slice(W * KEYS, KEYS, dim=0)
        asked = q_tile.slice(h * HALF, HALF, dim=1).permute((1, 0))
        acc = warpgroup_mma(keys, asked, acc, use_acc=h > 0, is_async=True)
    return acc


@gluon.jit
def learn(W: gl.constexpr, tiles, barriers, work, keys, outputs, index_scale, n_items, n_blocks,
          G: gl.constexpr, GRADIENT: gl.constexpr, MMA: gl.constexpr, DK_MMA: gl.constexpr,
          LN2: gl.constexpr):  # fmt: skip
    """Student W: the loss and dS of keys 64 * W ... 64 * W + 64, and d_q_idx of as many dims."""
    k_idx_tiles, q_tiles, number_tiles, own_tiles, place_tiles, p_tiles, ds_tiles = tiles
    k_idx_full, k_idx_empty, asked_full, asked_empty, p_full, p_empty, ds_full = barriers
    first_keys, key_stops = keys
    losses, d_q, d_k = outputs
    BK: gl.constexpr = k_idx_tiles.shape[1]
    BATCH: gl.constexpr = q_tiles.shape[1]
    DI: gl.constexpr = q_tiles.shape[2]
    KEYS: gl.constexpr = BK // 2
    DIMS: gl.constexpr = DI // 2
    COLUMN: gl.constexpr = gl.SliceLayout(0, MMA)
    A: gl.constexpr = gl.DotOperandLayout(0, DK_MMA, 2)
    batch, seen = 0, 0
    for item in range(gl.program_id(0), n_items, gl.num_programs(0)):
        _start, length, i_b, _i_r = load_work(work, item, n_blocks)
        if length > 0:
            first = gl.load(first_keys + i_b)
            key_stop = gl.load(key_stops + i_b)
            wait_full(k_idx_full, seen, 1)
            if first + BK > key_stop:
                for h in gl.static_range(2):
                    part = k_idx_tiles.index(h).slice(W * KEYS, KEYS, dim=0)
                    clear_foreign(part, first + W * KEYS, key_stop)
            b_gap = gl.zeros([KEYS], gl.float32, layout=gl.SliceLayout(1, MMA))
            dk = gl.zeros([KEYS, DI], gl.float32, layout=DK_MMA)
            for _i in range(0, length, BATCH):
                stage = batch % 2
                q_tile = q_tiles.index(stage)
                wait_full(asked_full, batch, 2)
                running = start_scores(k_idx_tiles, q_tile, W, MMA)
                own = own_tiles.index(stage).load(COLUMN)
                b_top = number_tiles.index(2 * stage).load(COLUMN)
                b_log = number_tiles.index(2 * stage + 1).load(COLUMN)
                s = warpgroup_mma_wait(0, deps=[running])
                wait_full(p_full[W], batch, 2)
                b_gap, ds = compare(s, p_tiles.index(batch % 2), own, first, b_top, b_log, b_gap,
                                    index_scale, W, G, MMA)  # fmt: skip
                ds = ds.to(q_tile.dtype)
                release(p_empty[W], batch, 2)
                if GRADIENT:
                    ds_tile = ds_tiles.index(batch % 2)
                    ds_tile.slice(W * KEYS, KEYS, dim=0).store(ds)
                    fence_async_shared()
                    release(ds_full, batch, 2)
                    dk = warpgroup_mma(gl.convert_layout(ds, A), q_tile, dk, is_async=True)
                    wait_full(ds_full, batch, 2)
                    dq = warpgroup_mma(k_idx_tiles.index(W).permute((1, 0)), ds_tile,
                                       gl.zeros([DIMS, BATCH], gl.float32, layout=MMA),
                                       use_acc=False, is_async=True)  # fmt: skip
                    place = place_tiles.index(stage).load(COLUMN)
                    dk, b_dq = warpgroup_mma_wait(  # pyrefly: ignore[not-iterable]
                        0, deps=[dk, dq]
                    )
                    release(asked_empty, batch, 2)
                    o_d = W * DIMS + gl.arange(0, DIMS, layout=gl.SliceLayout(1, MMA))
                    p_dq = d_q + place * DI
                    gl.store(p_dq[None, :] + o_d[:, None], b_dq, mask=(place >= 0)[None, :])
                else:
                    release(asked_empty, batch, 2)
                batch += 1
            release(k_idx_empty, seen, 1)
            gl.store(losses + 2 * item + W, gl.sum(b_gap, 0) * LN2)
            if GRADIENT:
                o_k = W * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(1, DK_MMA))
                o_f = gl.arange(0, DI, layout=gl.SliceLayout(0, DK_MMA))
                p_dk = d_k + (item.to(gl.int64) * BK + o_k)[:, None] * DI + o_f[None, :]
                gl.store(p_dk, dk)
            seen += 1
