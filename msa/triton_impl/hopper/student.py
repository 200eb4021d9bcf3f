"""The student of the index branch on Hopper: a group of warps of `index_loss.py` (R17).

    for each work item (block of one group, edges start ... stop):          # KV-outer
        for each batch of 16 edges (query t, slot s):
            log P_idx  = index_scale * (k_idx q_idx^T - top) - log_total
            P          = what the teachers left, 0 behind the query's own key
            loss      += P (log P - log P_idx);  dS = P_idx - P
            d_k_idx   += dS q_idx;  d_q_idx[t, group, s] = dS^T k_idx

The block's keys are two halves of 64, so that the registers of one half are free for the other.
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
from msa.triton_impl.hopper.teacher import LOG2E, load_work
from msa.triton_impl.hopper.walk_rows import clear_foreign


@gluon.jit
def fast_log2(x):
    """Base-2 logarithm by one instruction, of normal numbers."""
    return gl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def load_asking(q_idx, query_ids, start, length, o_e, o_d, i_r, stride_qt, stride_qh):
    """Index queries of the edges o_e of an item, [16, Di]; zeros behind its last edge."""
    there = o_e < length
    t = gl.load(query_ids + start + o_e, mask=there, other=0).to(gl.int64)
    p = q_idx + t * stride_qt + i_r.to(gl.int64) * stride_qh
    return gl.load(p[:, None] + o_d[None, :], mask=there[:, None], other=0.0)


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
def start_scores(k_idx_tile, q_tile, W: gl.constexpr, MMA: gl.constexpr):
    """Start the product of half of the block's index keys with a batch of index queries."""
    KEYS: gl.constexpr = MMA.instr_shape[0] * 4
    BATCH: gl.constexpr = q_tile.shape[0]
    zero = gl.zeros([KEYS, BATCH], gl.float32, layout=MMA)
    return warpgroup_mma(k_idx_tile.slice(W * KEYS, KEYS, dim=0), q_tile.permute((1, 0)), zero,
                         use_acc=False, is_async=True)  # fmt: skip


@gluon.jit
def learn(tiles, asking, barriers, numbers, work, edges, keys, outputs, q_idx, index_scale,
          n_items, n_blocks, stride_qt, stride_qh, G: gl.constexpr, HKV: gl.constexpr,
          TOP_K: gl.constexpr, GRADIENT: gl.constexpr, MMA: gl.constexpr, DK_MMA: gl.constexpr,
          LN2: gl.constexpr):  # fmt: skip
    """The student: its probabilities, the loss, and what goes into both gradients."""
    _k_tile, k_idx_tile, _q_rows, p_tiles, _row_tiles = tiles
    q_tiles, ds_tile = asking
    _0, _1, _2, _3, k_idx_full, k_idx_empty, p_full, p_empty = barriers
    top, log_total = numbers
    query_ids, slots, own_keys = edges
    first_keys, key_stops = keys
    losses, d_q, d_k = outputs
    BK: gl.constexpr = k_idx_tile.shape[0]
    DI: gl.constexpr = k_idx_tile.shape[1]
    BATCH: gl.constexpr = q_tiles.shape[1]
    HALF: gl.constexpr = BK // 2
    COLUMN: gl.constexpr = gl.SliceLayout(0, MMA)
    LINES: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    A: gl.constexpr = gl.DotOperandLayout(0, DK_MMA, 2)
    a_e = gl.arange(0, BATCH, layout=gl.SliceLayout(1, LINES))
    a_d = gl.arange(0, DI, layout=gl.SliceLayout(0, LINES))
    o_e = gl.arange(0, BATCH, layout=COLUMN)
    batch, seen = 0, 0
    for item in range(gl.program_id(0), n_items, gl.num_programs(0)):
        start, length, i_b, i_r = load_work(work, item, n_blocks)
        if length > 0:
            first = gl.load(first_keys + i_b)
            key_stop = gl.load(key_stops + i_b)
            rows = load_asking(q_idx, query_ids, start, length, a_e, a_d, i_r, stride_qt,
                               stride_qh)  # fmt: skip
            wait_full(k_idx_full, seen, 1)
            if first + BK > key_stop:
                clear_foreign(k_idx_tile, first, key_stop)
            b_gap = gl.zeros([HALF], gl.float32, layout=gl.SliceLayout(1, MMA))
            dk_0 = gl.zeros([HALF, DI], gl.float32, layout=DK_MMA)
            dk_1 = gl.zeros([HALF, DI], gl.float32, layout=DK_MMA)
            for i in range(0, length, BATCH):
                q_tile = q_tiles.index(batch % 2)  # see 9
                q_tile.store(rows)
                fence_async_shared()
                running_0 = start_scores(k_idx_tile, q_tile, 0, MMA)
                running_1 = start_scores(k_idx_tile, q_tile, 1, MMA)
                real = o_e < length - i
                t = gl.load(query_ids + start + i + o_e, mask=real, other=0)
                own = gl.load(own_keys + t, mask=real, other=-1)
                x = t.to(gl.int64) * HKV + i_r
                b_top = gl.load(top + x, mask=real, other=0.0)
                b_log = gl.load(log_total + x, mask=real, other=0.0) * LOG2E
                rows = load_asking(q_idx, query_ids, start + i + BATCH, length - i - BATCH, a_e,
                                   a_d, i_r, stride_qt, stride_qh)  # fmt: skip
                s_0, s_1 = warpgroup_mma_wait(  # pyrefly: ignore[not-iterable]
                    0, deps=[running_0, running_1]
                )
                wait_full(p_full, batch, 2)
                p_tile = p_tiles.index(batch % 2)
                b_gap, ds_0 = compare(s_0, p_tile, own, first, b_top, b_log, b_gap, index_scale, 0,
                                      G, MMA)  # fmt: skip
                ds_0 = ds_0.to(q_tile.dtype)
                b_gap, ds_1 = compare(s_1, p_tile, own, first, b_top, b_log, b_gap, index_scale, 1,
                                      G, MMA)  # fmt: skip
                ds_1 = ds_1.to(q_tile.dtype)
                release(p_empty, batch, 2)
                batch += 1
                if GRADIENT:
                    ds_tile.slice(0, HALF, dim=0).store(ds_0)
                    ds_tile.slice(HALF, HALF, dim=0).store(ds_1)
                    fence_async_shared()
                    dk_0 = warpgroup_mma(gl.convert_layout(ds_0, A), q_tile, dk_0, is_async=True)
                    dk_1 = warpgroup_mma(gl.convert_layout(ds_1, A), q_tile, dk_1, is_async=True)
                    dq = warpgroup_mma(k_idx_tile.permute((1, 0)), ds_tile,
                                       gl.zeros([DI, BATCH], gl.float32, layout=MMA),
                                       use_acc=False, is_async=True)  # fmt: skip
                    dk_0, dk_1, b_dq = warpgroup_mma_wait(  # pyrefly: ignore[not-iterable]
                        0, deps=[dk_0, dk_1, dq]
                    )
                    t = gl.load(query_ids + start + i + o_e, mask=real, other=0)
                    slot = gl.load(slots + start + i + o_e, mask=real, other=0)
                    o_d = gl.arange(0, DI, layout=gl.SliceLayout(1, MMA))
                    p_dq = d_q + ((t.to(gl.int64) * HKV + i_r) * TOP_K + slot) * DI
                    gl.store(p_dq[None, :] + o_d[:, None], b_dq, mask=real[None, :])
            release(k_idx_empty, seen, 1)
            gl.store(losses + item, gl.sum(b_gap, 0) * LN2)
            if GRADIENT:
                o_k = gl.arange(0, HALF, layout=gl.SliceLayout(1, DK_MMA))
                o_f = gl.arange(0, DI, layout=gl.SliceLayout(0, DK_MMA))
                p_dk = d_k + (item.to(gl.int64) * BK + o_k)[:, None] * DI + o_f[None, :]
                gl.store(p_dk, dk_0)
                gl.store(p_dk + HALF * DI, dk_1)
            seen += 1
