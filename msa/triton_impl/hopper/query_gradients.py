"""Backward of attention, the queries' half, on Hopper: dQ by a walk over each tile's union (R18).

    for each tile of neighbouring queries, each group:
        delta = <dO, out> - dlse                                            # per query and head
        for each block b of the union, the last one first:
            P  = exp(softmax_scale * q K[b]^T - lse), 0 where b was not selected or not visible
            dS = P (dO V[b]^T - delta)
            dQ += softmax_scale * dS K[b]
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from msa.ir import Selection
from msa.triton_impl.hopper.ring import make_barriers, release, wait_full
from msa.triton_impl.hopper.union_walk import CONSUMERS, LOG2E, copy_blocks, describe, skip
from msa.triton_impl.hopper.union_walk import OPTIONS as WALK
from msa.triton_impl.hopper.union_walk import ROWS as ROWS_OF_CONSUMER
from msa.triton_impl.hopper.union_walk import tile_size_of
from msa.triton_impl.hopper.walk_rows import clear_foreign, load_bits, load_item, load_rows
from msa.triton_impl.launch import pad
from msa.triton_impl.tables import tile_table
from msa.triton_impl.tile_union import SplitUnion

OPTIONS = {
    "K_STAGES": 3,
    "V_STAGES": 2,
    "BK": WALK["BK"],
    "MMA": WALK["MMA"],
    "ROWS": gl.NVMMASharedLayout.get_default_for([ROWS_OF_CONSUMER, 128], gl.bfloat16),
    "REGISTERS": 240,
    "num_warps": 4,
}


@gluon.jit
def load_three(q, out, d_out, tiles, item, W: gl.constexpr, POS: gl.constexpr,
               HEADS: gl.constexpr, G: gl.constexpr, HKV: gl.constexpr, stride_qt, stride_qh,
               ROWS: gl.constexpr, DIM: gl.constexpr):  # fmt: skip
    """Rows of q, out and d_out."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    m = gl.arange(0, ROWS, layout=gl.SliceLayout(1, L))
    d = gl.arange(0, DIM, layout=gl.SliceLayout(0, L))
    b_q = load_rows(q, tiles, item, m, d, W, POS, HEADS, G, HKV, stride_qt, stride_qh)
    b_do = load_rows(d_out, tiles, item, m, d, W, POS, HEADS, G, HKV, HKV * G * DIM, DIM)
    b_out = load_rows(out, tiles, item, m, d, W, POS, HEADS, G, HKV, HKV * G * DIM, DIM)
    return b_q, b_do, b_out


@gluon.jit
def weights(s, less, m_row, scale):
    less = gl.where(m_row, less, float("-inf"))
    return gl.exp2(s * scale + gl.expand_dims(less, 1))


@gluon.jit
def consume(W: gl.constexpr, rows, rings, tables, written, scale, softmax_scale, n_items, U,
            stride_qt, stride_qh, G: gl.constexpr, HKV: gl.constexpr, HEADS: gl.constexpr,
            BK: gl.constexpr, MMA: gl.constexpr):  # fmt: skip
    """Consumer W: its rows of every item."""
    q, out, d_out, lse, d_lse, q_tiles, do_tiles = rows
    d_q, deltas = written
    k_tiles, v_tiles, k_full, k_empty, v_full, v_empty = rings
    tiles, ids, masks, _unused = tables
    DIM: gl.constexpr = k_tiles.shape[2]
    K_STAGES: gl.constexpr = k_tiles.shape[0]
    V_STAGES: gl.constexpr = v_tiles.shape[0]
    ROWS: gl.constexpr = MMA.instr_shape[0] * 4
    POS: gl.constexpr = ROWS // HEADS
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    o_m = gl.arange(0, ROWS, layout=gl.SliceLayout(1, MMA))
    o_i, o_h = W * POS + o_m // HEADS, o_m % HEADS
    zero = gl.zeros([ROWS, BK], gl.float32, layout=MMA)
    mine = ((1 << POS) - 1) << (W * POS)
    q_tile, do_tile = q_tiles.index(W), do_tiles.index(W)
    step = 0
    b_q, b_do, b_out = load_three(q, out, d_out, tiles, gl.program_id(0), W, POS, HEADS, G, HKV,
                                  stride_qt, stride_qh, ROWS, DIM)  # fmt: skip
    for item in range(gl.program_id(0), n_items, gl.num_programs(0)):
        q_tile.store(b_q)
        do_tile.store(b_do)
        fence_async_shared()
        delta = gl.sum(b_do.to(gl.float32) * b_out.to(gl.float32), 1)
        delta = gl.convert_layout(delta, gl.SliceLayout(1, MMA))
        n, edges, base, own, first_key, key_stop = load_item(tables, item, U, HKV, BK)
        record = tiles + (item // HKV) * 5
        t = gl.load(record) + o_i
        real = (t < gl.load(record + 1)) & (o_h < G)
        x = t.to(gl.int64) * (HKV * G) + (item % HKV) * G + o_h
        delta -= gl.load(d_lse + x, mask=real, other=0.0)
        gl.store(deltas + x, delta, mask=real)
        less = gl.load(lse + x, mask=real, other=0.0) * -1.4426950408889634
        bits = load_bits(masks, base, n, 0)
        bits_next = load_bits(masks, base, n, 1)
        acc = gl.zeros([ROWS, DIM], gl.float32, layout=MMA)
        j = 0
        while j < n:
            if (bits & mine) == 0:
                skip(rings, step)
                step += 1
                j += 1
                bits = bits_next
                bits_next = load_bits(masks, base, n, j + 1)
            else:
                first = first_key + gl.load(ids + base + n - 1 - j) * BK
                wait_full(k_full, step, K_STAGES)
                if first + BK > key_stop:
                    clear_foreign(k_tiles.index(step % K_STAGES), first, key_stop)
                s_next = warpgroup_mma(q_tile, k_tiles.index(step % K_STAGES).permute((1, 0)), zero,
                                       use_acc=False, is_async=True)  # fmt: skip
                wait_full(v_full, step, V_STAGES)
                dp_next = warpgroup_mma(do_tile, v_tiles.index(step % V_STAGES).permute((1, 0)),
                                        zero - gl.expand_dims(delta, 1),
                                        is_async=True)  # fmt: skip
                s = warpgroup_mma_wait(1, deps=[s_next])
                p = weights(s, less, ((bits >> o_i) & 1) != 0, scale)
                dp = warpgroup_mma_wait(0, deps=[dp_next])
                release(v_empty, step, V_STAGES)
                ds = p * dp
                o_n = first + gl.arange(0, BK, layout=gl.SliceLayout(0, MMA))
                ds = gl.where(o_n[None, :] <= (own + o_i)[:, None], ds, 0.0)
                b_ds = gl.convert_layout(ds.to(b_q.dtype), A)
                last = step
                step += 1
                j += 1
                bits = bits_next
                bits_next = load_bits(masks, base, n, j + 1)
                while (j >= edges) & (j < n) & (step - last < K_STAGES):
                    if (bits & mine) != 0:
                        wait_full(k_full, step, K_STAGES)
                        s_next = warpgroup_mma(
                            q_tile, k_tiles.index(step % K_STAGES).permute((1, 0)), zero,
                            use_acc=False, is_async=True)  # fmt: skip
                        acc_next = warpgroup_mma(b_ds, k_tiles.index(last % K_STAGES), acc,
                                                 is_async=True)  # fmt: skip
                        s = warpgroup_mma_wait(1, deps=[s_next])
                        p = weights(s, less, ((bits >> o_i) & 1) != 0, scale)
                        wait_full(v_full, step, V_STAGES)
                        acc = warpgroup_mma_wait(0, deps=[acc_next])
                        release(k_empty, last, K_STAGES)
                        dp_next = warpgroup_mma(
                            do_tile, v_tiles.index(step % V_STAGES).permute((1, 0)),
                            zero - gl.expand_dims(delta, 1), is_async=True)  # fmt: skip
                        dp = warpgroup_mma_wait(0, deps=[dp_next])
                        release(v_empty, step, V_STAGES)
                        ds = p * dp
                        b_ds = gl.convert_layout(ds.to(b_q.dtype), A)
                        last = step
                    else:
                        skip(rings, step)
                    step += 1
                    j += 1
                    bits = bits_next
                    bits_next = load_bits(masks, base, n, j + 1)
                acc_next = warpgroup_mma(b_ds, k_tiles.index(last % K_STAGES), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc_next])
                release(k_empty, last, K_STAGES)
        following = gl.minimum(item + gl.num_programs(0), n_items - 1)
        b_q, b_do, b_out = load_three(q, out, d_out, tiles, following, W, POS, HEADS, G, HKV,
                                      stride_qt, stride_qh, ROWS, DIM)  # fmt: skip
        t = gl.load(record) + o_i
        real = (t < gl.load(record + 1)) & (o_h < G)
        x = t.to(gl.int64) * (HKV * G) + (item % HKV) * G + o_h
        o_d = gl.arange(0, DIM, layout=gl.SliceLayout(0, MMA))
        gl.store(d_q + x[:, None] * DIM + o_d[None, :],
                 (acc * softmax_scale).to(d_q.dtype.element_ty), mask=real[:, None])  # fmt: skip


@gluon.jit
def hopper_query_gradients_kernel(q, k_desc, v_desc, out, d_out, lse, d_lse, tiles, ids, masks,
                                  counts, d_q, delta, scale, softmax_scale, n_items, U, stride_qt,
                                  stride_qh, G: gl.constexpr, HKV: gl.constexpr,
                                  HEADS: gl.constexpr, K_STAGES: gl.constexpr,
                                  V_STAGES: gl.constexpr, BK: gl.constexpr, MMA: gl.constexpr,
                                  ROWS: gl.constexpr, REGISTERS: gl.constexpr):  # fmt: skip
    """Items p, p + programs, ... of program p; an item is a tile of queries and a group."""
    DIM: gl.constexpr = k_desc.block_type.shape[1]
    M: gl.constexpr = MMA.instr_shape[0] * 4
    q_tiles = gl.allocate_shared_memory(k_desc.dtype, [2, M, DIM], ROWS)
    do_tiles = gl.allocate_shared_memory(k_desc.dtype, [2, M, DIM], ROWS)
    rings = (
        gl.allocate_shared_memory(k_desc.dtype, [K_STAGES, BK, DIM], k_desc.layout),
        gl.allocate_shared_memory(v_desc.dtype, [V_STAGES, BK, DIM], v_desc.layout),
        make_barriers(K_STAGES, 1), make_barriers(K_STAGES, 2),
        make_barriers(V_STAGES, 1), make_barriers(V_STAGES, 2),
    )  # fmt: skip
    tables = (tiles, ids, masks, counts)
    rows = (q, out, d_out, lse, d_lse, q_tiles, do_tiles)
    written = (d_q, delta)
    gl.warp_specialize([
        (consume, (0, rows, rings, tables, written, scale, softmax_scale, n_items, U, stride_qt,
                   stride_qh, G, HKV, HEADS, BK, MMA)),
        (consume, (1, rows, rings, tables, written, scale, softmax_scale, n_items, U, stride_qt,
                   stride_qh, G, HKV, HEADS, BK, MMA)),
        (copy_blocks, (k_desc, v_desc, rings, tables, n_items, U, HKV)),
    ], [4, 1], [REGISTERS, 24])  # fmt: skip


# -- host -----------------------------------------------------------------------------------------
def query_gradients(
    q: Float[Tensor, "Tq Hq D"], k: Float[Tensor, "Tk Hkv D"], v: Float[Tensor, "Tk Hkv D"],
    out: Float[Tensor, "Tq Hq D"], d_out: Float[Tensor, "Tq Hq D"], lse: Float[Tensor, "Tq Hq"],
    d_lse: Float[Tensor, "Tq Hq"], union: SplitUnion, selection: Selection, softmax_scale: float,
    into: Float[Tensor, "Tq Hq D"] | None = None,
) -> tuple[Float[Tensor, "Tq Hq D"], Float[Tensor, "Tq Hq"]]:  # fmt: skip
    """dQ in q's dtype, and delta in float32; all but q, k and v are contiguous."""
    (n_q, heads, _), groups = q.shape, k.shape[1]
    group = heads // groups
    d_q = torch.empty(q.shape, dtype=q.dtype, device=q.device) if into is None else into
    delta = torch.empty((n_q, heads), dtype=torch.float32, device=q.device)
    if not n_q:
        return d_q, delta
    tiles = tile_table(selection.sequences, tile_size_of(group), q.device)
    items = len(tiles) * groups
    programs = torch.cuda.get_device_properties(q.device).multi_processor_count
    hopper_query_gradients_kernel[(min(programs, items),)](
        q, describe(k), describe(v), out, d_out, lse, d_lse, tiles, union.block_ids,
        union.row_masks, union.counts, d_q, delta, softmax_scale * LOG2E, softmax_scale, items,
        union.block_ids.shape[2], *q.stride()[:2], G=group, HKV=groups, HEADS=pad(group, 8),
        **OPTIONS,
    )  # fmt: skip
    return d_q, delta
