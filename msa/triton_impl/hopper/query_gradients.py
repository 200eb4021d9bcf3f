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
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from msa.ir import Selection
from msa.triton_impl.hopper.ring import (
    copy_tile,
    make_barriers,
    produce,
    release,
    wait_empty,
    wait_full,
)
from msa.triton_impl.hopper.union_walk import DIM, KINDS, LOG2E, describe, skip
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
    "REGISTERS": 240,
    "num_warps": 4,
}


@gluon.jit
def row_sums(out, d_out, tiles, item, W: gl.constexpr, POS: gl.constexpr, HEADS: gl.constexpr,
             G: gl.constexpr, HKV: gl.constexpr, MMA: gl.constexpr, DIM: gl.constexpr):  # fmt: skip
    """<dO, out> of each row of consumer W in this item."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    m = gl.arange(0, POS * HEADS, layout=gl.SliceLayout(1, L))
    d = gl.arange(0, DIM, layout=gl.SliceLayout(0, L))
    b_do = load_rows(d_out, tiles, item, m, d, W, POS, HEADS, G, HKV, HKV * G * DIM, DIM)
    b_out = load_rows(out, tiles, item, m, d, W, POS, HEADS, G, HKV, HKV * G * DIM, DIM)
    sums = gl.sum(b_do.to(gl.float32) * b_out.to(gl.float32), 1)
    return gl.convert_layout(sums, gl.SliceLayout(1, MMA))


@gluon.jit
def weights(s, less, m_row, scale):
    less = gl.where(m_row, less, float("-inf"))
    return gl.exp2(s * scale + gl.expand_dims(less, 1))


@gluon.jit
def consume(W: gl.constexpr, rows, row_rings, rings, tables, written, scale, softmax_scale,
            n_items, U, G: gl.constexpr, HKV: gl.constexpr, HEADS: gl.constexpr,
            BK: gl.constexpr, MMA: gl.constexpr):  # fmt: skip
    """Consumer W: its rows of every item."""
    out, d_out, lse, d_lse = rows
    q_tiles, do_tiles, q_full, q_empty, do_full, do_empty = row_rings
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
    q_tile = q_tiles.index(W).reshape([ROWS, DIM])
    do_tile = do_tiles.index(W).reshape([ROWS, DIM])
    step = 0
    turn = W
    sums = row_sums(out, d_out, tiles, gl.program_id(0), W, POS, HEADS, G, HKV, MMA, DIM)
    for item in range(gl.program_id(0), n_items, gl.num_programs(0)):
        n, edges, base, _, _, _ = load_item(tables, item, U, HKV, BK)
        record = tiles + (item // HKV) * 5
        t = gl.load(record) + o_i
        real = (t < gl.load(record + 1)) & (o_h < G)
        x = t.to(gl.int64) * (HKV * G) + (item % HKV) * G + o_h
        delta = sums - gl.load(d_lse + x, mask=real, other=0.0)
        gl.store(deltas + x, delta, mask=real)
        less = gl.load(lse + x, mask=real, other=0.0) * -1.4426950408889634
        bits = load_bits(masks, base, n, 0)
        bits_next = load_bits(masks, base, n, 1)
        acc = gl.zeros([ROWS, DIM], gl.float32, layout=MMA)
        j = 0
        if n > 0:
            wait_full(q_full, turn, 2)
            wait_full(do_full, turn, 2)
        while j < n:
            if (bits & mine) == 0:
                skip(rings, step)
                step += 1
                j += 1
                bits = bits_next
                bits_next = load_bits(masks, base, n, j + 1)
            else:
                record = tiles + (item // HKV) * 5
                first = gl.load(record + 3) + gl.load(ids + base + n - 1 - j) * BK
                key_stop = gl.load(record + 4)
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
                ds = gl.where(o_n[None, :] <= (gl.load(record + 2) + o_i)[:, None], ds, 0.0)
                b_ds = gl.convert_layout(ds.to(q_tile.dtype), A)
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
                        b_ds = gl.convert_layout(ds.to(q_tile.dtype), A)
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
        if n > 0:
            release(q_empty, turn, 2)
            release(do_empty, turn, 2)
            turn += 2
        following = gl.minimum(item + gl.num_programs(0), n_items - 1)
        sums = row_sums(out, d_out, tiles, following, W, POS, HEADS, G, HKV, MMA, DIM)
        record = tiles + (item // HKV) * 5
        t = gl.load(record) + o_i
        real = (t < gl.load(record + 1)) & (o_h < G)
        x = t.to(gl.int64) * (HKV * G) + (item % HKV) * G + o_h
        o_d = gl.arange(0, DIM, layout=gl.SliceLayout(0, MMA))
        gl.store(d_q + x[:, None] * DIM + o_d[None, :],
                 (acc * softmax_scale).to(d_q.dtype.element_ty), mask=real[:, None])  # fmt: skip


@gluon.jit
def produce_rows(desc, t, h, tiles, full, empty, turn):
    """Copy the rows of one consumer."""
    wait_empty(empty, turn, 2)
    mbarrier.expect(full.index(turn % 2), desc.block_type.nbytes)
    copy_tile(desc, [t, h, 0], full.index(turn % 2), tiles.index(turn % 2))


@gluon.jit
def copy_rows_and_blocks(q_desc, do_desc, k_desc, v_desc, row_rings, rings, tables, n_items, U,
                         G: gl.constexpr, HKV: gl.constexpr):  # fmt: skip
    """The producer: copy the rows and the blocks of every item's union, the last one first."""
    q_tiles, do_tiles, q_full, q_empty, do_full, do_empty = row_rings
    k_tiles, v_tiles, k_full, k_empty, v_full, v_empty = rings
    tiles, ids, _unused, counts = tables
    POS: gl.constexpr = q_tiles.shape[1]
    step = 0
    turn = 0
    for item in range(gl.program_id(0), n_items, gl.num_programs(0)):
        record = tiles + (item // HKV) * 5
        t = gl.load(record)
        first_key = gl.load(record + 3)
        n = gl.load(counts + item)
        p_id = ids + item.to(gl.int64) * U
        column = (item % HKV) * k_tiles.shape[2]
        i_b = gl.load(p_id + gl.maximum(n - 1, 0))
        for j in range(n):
            row = first_key + i_b * k_tiles.shape[1]
            i_b = gl.load(p_id + gl.maximum(n - 2 - j, 0))
            produce(k_desc, row, k_tiles, k_full, k_empty, step, k_tiles.shape[0], column)
            produce(v_desc, row, v_tiles, v_full, v_empty, step, v_tiles.shape[0], column)
            step += 1
            if j == 0:
                for w in gl.static_range(2):
                    h = (item % HKV) * G
                    produce_rows(q_desc, t + w * POS, h, q_tiles, q_full, q_empty, turn)
                    produce_rows(do_desc, t + w * POS, h, do_tiles, do_full, do_empty, turn)
                    turn += 1


@gluon.jit
def hopper_query_gradients_kernel(q_desc, k_desc, v_desc, do_desc, out, d_out, lse, d_lse, tiles,
                                  ids, masks, counts, d_q, delta, scale, softmax_scale, n_items, U,
                                  G: gl.constexpr, HKV: gl.constexpr,
                                  HEADS: gl.constexpr, K_STAGES: gl.constexpr,
                                  V_STAGES: gl.constexpr, BK: gl.constexpr, MMA: gl.constexpr,
                                  REGISTERS: gl.constexpr):  # fmt: skip
    """Items p, p + programs, ... of program p; an item is a tile of queries and a group."""
    DIM: gl.constexpr = k_desc.block_type.shape[1]
    POS: gl.constexpr = q_desc.block_type.shape[0]
    row_rings = (
        gl.allocate_shared_memory(q_desc.dtype, [2, POS, HEADS, DIM], q_desc.layout),
        gl.allocate_shared_memory(do_desc.dtype, [2, POS, HEADS, DIM], do_desc.layout),
        make_barriers(2, 1), make_barriers(2, 1), make_barriers(2, 1), make_barriers(2, 1),
    )  # fmt: skip
    rings = (
        gl.allocate_shared_memory(k_desc.dtype, [K_STAGES, BK, DIM], k_desc.layout),
        gl.allocate_shared_memory(v_desc.dtype, [V_STAGES, BK, DIM], v_desc.layout),
        make_barriers(K_STAGES, 1), make_barriers(K_STAGES, 2),
        make_barriers(V_STAGES, 1), make_barriers(V_STAGES, 2),
    )  # fmt: skip
    tables = (tiles, ids, masks, counts)
    rows = (out, d_out, lse, d_lse)
    written = (d_q, delta)
    gl.warp_specialize([
        (consume, (0, rows, row_rings, rings, tables, written, scale, softmax_scale, n_items, U, G,
                   HKV, HEADS, BK, MMA)),
        (consume, (1, rows, row_rings, rings, tables, written, scale, softmax_scale, n_items, U, G,
                   HKV, HEADS, BK, MMA)),
        (copy_rows_and_blocks, (q_desc, do_desc, k_desc, v_desc, row_rings, rings, tables, n_items,
                                U, G, HKV)),
    ], [4, 1], [REGISTERS, 24])  # fmt: skip


# -- host -----------------------------------------------------------------------------------------
def describe_rows(x: Float[Tensor, "T H D"], group: int) -> TensorDescriptor:
    """Rows of a tensor of queries, to be copied by positions and heads."""
    heads = pad(group, 8)
    shape = [ROWS_OF_CONSUMER // heads, heads, DIM]
    layout = gl.NVMMASharedLayout.get_default_for(shape, KINDS[x.dtype])
    return TensorDescriptor(x, list(x.shape), list(x.stride()), shape, layout)


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
        describe_rows(q, group), describe(k), describe(v), describe_rows(d_out, group), out, d_out, lse, d_lse, tiles, union.block_ids,
        union.row_masks, union.counts, d_q, delta, softmax_scale * LOG2E, softmax_scale, items,
        union.block_ids.shape[2], G=group, HKV=groups, HEADS=pad(group, 8),
        **OPTIONS,
    )  # fmt: skip
    return d_q, delta
