"""Attention by a walk along each tile's union of blocks, on Hopper (R9, R10, R16).

    for each tile of neighbouring queries, each group:
        m, l, o = -inf, 0, 0                                     # per query and head
        for each block b of the union, the last one first:
            S = q_rows @ K[b]^T, invisible tokens and rows whose query did not select b masked
            m, l, o = online softmax step(softmax_scale * S, V[b])
        out, lse = o / l, m + log l

What the asynchronous form changes:
 1. Groups of warps run at the same time. A producer warp copies blocks of K and of V into two rings
    in shared memory. Consumers of four warps own 64 rows each (4 queries x 16 heads) and compute.
 2. The tile is as many queries as the consumers have together, so each block is read once for all
    of them. A consumer computes a block only if one of its own queries selected it, so the waste
    is that of a small union and the traffic that of a large one.
 3. The product of the next block's scores starts before this block's weights meet V. While the
    softmax of the next block is computed, the product with V runs on the tensor cores.
 4. Blocks come in descending order. Only the first ones, at the diagonal, need a token mask; the
    loop over the others has none.
 5. The wait for the product with V must come after the softmax in machine code, too. The assembler
    moves arithmetic past that wait, unless a branch lies between. A second wait for the tile of V,
    which is known to be there, is such a branch.
 6. The scale and the maximum are applied by one multiply-add. The rounded product of scale and
    maximum, not the maximum, is what is subtracted, and the same number serves all blocks, so the
    rounding cancels. Where logits pass LARGE it would not: there the scale is rounded up to a power
    of two, whose products are exact. Weights of other tokens are 0 there with either scale.
 7. The grid is one program for each multiprocessor, and the producer copies the next item's blocks
    while consumers write this item's rows. Rows of queries are loaded while the last are written.
 8. A partial last block is followed by another sequence's values. They are overwritten with zeros
    in shared memory: 0 times NaN would be NaN.

Who waits for whom (K, V: rings of STAGES tiles; a consumer releases each tile exactly once):

    producer warp   K0 V0 K1 V1 K2 V2 ..wait.. K3 ........ V3 ....
                     |  |  |                   ^ K0 is released by all consumers
                     v  v  v
    consumer 0      S0 = q K0 | softmax 0 | S1 = q K1, o += P0 V0 | softmax 1 | S2, o += P1 V1 ..
                                          ^ both start             ^ runs while P0 V0 does
    consumer 1      skip 0 | S1 = q K1 | softmax 1 | S2 = q K2, o += P1 V1 | ...

A consumer that has weights to multiply keeps their tile of V while it waits for the next keys. If it
kept the tile while STAGES blocks pass by that it does not want, the producer could not go on. So a
run of the overlapped loop ends before that, with the product that is left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from msa.ir import Output, Sequences
from msa.triton_impl.combine import Slots
from msa.triton_impl.hopper.ring import make_barriers, produce, release, wait_full
from msa.triton_impl.launch import can_describe, pad
from msa.triton_impl.tables import tile_table

LN2 = gl.constexpr(0.6931471805599453)
LOG2E = 1.4426950408889634
LOWEST = gl.constexpr(-(2.0**128 - 2.0**104))  # float32's lowest number: a maximum of no scores
LARGE = gl.constexpr(2.0**28)  # beyond this, a logit's last bit decides everything

KINDS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
ROWS, DIM, BLOCK = 64, 128, 128  # rows of a consumer, D and Dv, keys of a block


# -- softmax --------------------------------------------------------------------------------------
@gluon.jit
def rounded_product(x, y):
    """x * y rounded to float32: the compiler must not fuse it with an addition."""
    return gl.inline_asm_elementwise(
        "mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def shift_of(top, scale, scale_up):
    """What is subtracted from scaled scores, and the scale that belongs to it, of each row."""
    shift = rounded_product(top, scale + gl.zeros_like(top))
    large = gl.abs(shift) >= LARGE
    factor = gl.where(large, scale_up, scale)
    shift = gl.where(large, gl.maximum(top * scale_up, LOWEST), shift)
    return shift, factor, large


@gluon.jit
def softmax_step(s, top, shift, total, m_row, scale, scale_up):
    """Take in the scores s [ROWS, BN]: the new top, shift and total, the weights, the decay."""
    new = gl.where(m_row, gl.maximum(top, gl.max(s, 1)), top)
    new_shift, factor, large = shift_of(new, scale, scale_up)
    less = gl.where(m_row, -new_shift, float("-inf"))
    p = gl.exp2(gl.fma(s, gl.expand_dims(factor, 1).broadcast_to(s.shape),
                       gl.expand_dims(less, 1).broadcast_to(s.shape)))  # fmt: skip
    decay = gl.exp2(gl.where(large, (top - new) * scale, shift - new_shift))
    return new, new_shift, total * decay + gl.sum(p, 1), p, decay


@gluon.jit
def to_rows(x, MMA: gl.constexpr):
    """A number of each row, as the outputs lie; nothing moves."""
    return gl.convert_layout(x, gl.SliceLayout(1, MMA), assert_trivial=True)


@gluon.jit
def along_rows(x, MMA: gl.constexpr):
    """The same, as a column."""
    return gl.expand_dims(to_rows(x, MMA), 1)


# -- consumers ------------------------------------------------------------------------------------
@gluon.jit
def load_rows(q, tiles, item, m, d, W: gl.constexpr, POS: gl.constexpr, HEADS: gl.constexpr,
              G: gl.constexpr, HKV: gl.constexpr, stride_qt, stride_qh):  # fmt: skip
    """The queries of consumer W in this item, [ROWS, DIM]; zeros where there is no row."""
    p_tile = tiles + (item // HKV) * 5
    t = gl.load(p_tile) + W * POS + m // HEADS
    h = m % HEADS
    real = (t < gl.load(p_tile + 1)) & (h < G)
    p = q + t.to(gl.int64) * stride_qt + ((item % HKV) * G + h).to(gl.int64) * stride_qh
    return gl.load(p[:, None] + d[None, :], mask=real[:, None], other=0.0)


@gluon.jit
def clear_foreign(v, first, key_stop):
    """Zeros in place of the values of another sequence, whose NaN must not get here."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    n = first + gl.arange(0, v.shape[0], layout=gl.SliceLayout(1, L))
    x = v.load(L)
    v.store(gl.where((n < key_stop)[:, None], x, 0.0))
    fence_async_shared()


@gluon.jit
def skip(k_full, k_empty, v_full, v_empty, step, STAGES: gl.constexpr):
    """Release a block that none of the consumer's queries selected."""
    wait_full(k_full, step, STAGES)
    release(k_empty, step, STAGES)
    wait_full(v_full, step, STAGES)
    release(v_empty, step, STAGES)


@gluon.jit
def fold(acc, top, total, parts, part_tops, part_totals, part_counts, t, x, i_r, real, d, scale,
         HKV: gl.constexpr, DIM: gl.constexpr, TOP_K: gl.constexpr):  # fmt: skip
    """Add the slots of blocks that the walk left out (R16)."""
    count = gl.load(part_counts + t * HKV + i_r, mask=real, other=0)
    for i in range(gl.max(count, 0)):
        m = i < count
        b_top = gl.load(part_tops + x * TOP_K + i, mask=m, other=LOWEST)
        b_total = gl.load(part_totals + x * TOP_K + i, mask=m, other=0.0)
        most = gl.maximum(top, b_top)
        decay = gl.exp2((top - most) * scale)
        weight = b_total * gl.exp2((b_top - most) * scale)
        p_part = parts + (x * TOP_K + i)[:, None] * DIM + d[None, :]
        part = gl.load(p_part, mask=m[:, None], other=0.0)
        acc = acc * decay[:, None] + weight[:, None] * part.to(gl.float32)
        total = total * decay + weight
        top = most
    return acc, top, total


@gluon.jit
def load_item(tables, item, U, HKV: gl.constexpr, BK: gl.constexpr):
    """Of an item: where its union lies, how many blocks it has, and how many need a token mask."""
    tiles, ids, masks, counts = tables
    record = tiles + (item // HKV) * 5
    n = gl.load(counts + item)
    base = item.to(gl.int64) * U
    own = gl.load(record + 2)
    first_key = gl.load(record + 3)
    last = gl.load(ids + base + gl.maximum(n - 1, 0))
    before = gl.load(ids + base + gl.maximum(n - 2, 0))
    edges = ((n > 0) & (first_key + (last + 1) * BK - 1 > own)).to(gl.int32)
    edges += ((n > 1) & (first_key + (before + 1) * BK - 1 > own)).to(gl.int32)
    return n, edges, base, own, first_key, gl.load(record + 4)


@gluon.jit
def load_bits(masks, base, n, j, STEPS: gl.constexpr):
    """Bits of the queries that selected the block of step j; blocks come in descending order."""
    return gl.load(masks + base + gl.maximum(n - 1 - j // STEPS, 0))


@gluon.jit
def finish(acc, top, shift, total, folded, out, lse, i_r, t, h, real, o_d, scale, scale_up,
           G: gl.constexpr, HKV: gl.constexpr, DIM: gl.constexpr, TOP_K: gl.constexpr,
           FOLD: gl.constexpr):  # fmt: skip
    """Divide by the sum, fold in the slots of other blocks, write out and lse."""
    parts, part_tops, part_totals, part_counts = folded
    _, _, large = shift_of(top, scale, scale_up)
    rest = gl.fma(top, scale + gl.zeros_like(top), -shift)  # what rounding took off the shift
    right = gl.exp2(gl.where(large, 0.0, -rest))
    total = total * right
    x = t.to(gl.int64) * (HKV * G) + i_r * G + h
    if FOLD:
        acc = acc * right[:, None]
        acc, top, total = fold(acc, top, total, parts, part_tops, part_totals, part_counts,
                               t.to(gl.int64), x, i_r, real, o_d, scale, HKV, DIM,
                               TOP_K)  # fmt: skip
        o = acc * (1.0 / total)[:, None]
    else:
        o = acc * (right / total)[:, None]
    p_out = out + x[:, None] * DIM + o_d[None, :]
    gl.store(p_out, o.to(out.dtype.element_ty), mask=real[:, None])
    gl.store(lse + x, top * (scale * LN2) + gl.log(total), mask=real)


@gluon.jit
def mask_tokens(s, first, own, o_i, BN: gl.constexpr, S_MMA: gl.constexpr):
    """-inf where the token stands behind the row's own key."""
    o_n = first + gl.arange(0, BN, layout=gl.SliceLayout(0, S_MMA))
    return gl.where(o_n[None, :] <= (own + o_i)[:, None], s, float("-inf"))


@gluon.jit
def overlapped_rows(W: gl.constexpr, q, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, tables,
                    folded, out, lse, scale, scale_up, n_items, U, stride_qt, stride_qh,
                    G: gl.constexpr, HKV: gl.constexpr, HEADS: gl.constexpr, TOP_K: gl.constexpr,
                    FOLD: gl.constexpr, STAGES: gl.constexpr, BK: gl.constexpr,
                    MMA: gl.constexpr, S_MMA: gl.constexpr):  # fmt: skip
    """Consumer W: its rows of every item; the next block's scores before this block's values."""
    tiles, ids, masks, counts = tables
    BN: gl.constexpr = k_tiles.shape[1]
    DIM: gl.constexpr = k_tiles.shape[2]
    ROWS: gl.constexpr = MMA.instr_shape[0] * 4
    POS: gl.constexpr = ROWS // HEADS
    STEPS: gl.constexpr = BK // BN
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    a_m = gl.arange(0, ROWS, layout=gl.SliceLayout(1, A))
    a_d = gl.arange(0, DIM, layout=gl.SliceLayout(0, A))
    o_m = gl.arange(0, ROWS, layout=gl.SliceLayout(1, MMA))
    o_d = gl.arange(0, DIM, layout=gl.SliceLayout(0, MMA))
    o_i, o_h = W * POS + o_m // HEADS, o_m % HEADS
    s_i = W * POS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S_MMA)) // HEADS
    zero = gl.zeros([ROWS, BN], gl.float32, layout=S_MMA)
    mine = ((1 << POS) - 1) << (W * POS)
    step = 0
    b_q = load_rows(q, tiles, gl.program_id(0), a_m, a_d, W, POS, HEADS, G, HKV, stride_qt,
                    stride_qh)  # fmt: skip
    for item in range(gl.program_id(0), n_items, gl.num_programs(0)):
        n, edges, base, own, first_key, key_stop = load_item(tables, item, U, HKV, BK)
        bits = load_bits(masks, base, n, 0, STEPS)
        bits_next = load_bits(masks, base, n, 1, STEPS)
        top = gl.full([ROWS], LOWEST, gl.float32, layout=gl.SliceLayout(1, S_MMA))
        shift, _, _ = shift_of(top, scale, scale_up)
        total = gl.zeros([ROWS], gl.float32, layout=gl.SliceLayout(1, S_MMA))
        acc = gl.zeros([ROWS, DIM], gl.float32, layout=MMA)
        j = 0
        while j < n * STEPS:
            if (bits & mine) == 0:
                skip(k_full, k_empty, v_full, v_empty, step, STAGES)
                step += 1
                j += 1
                bits = bits_next
                bits_next = load_bits(masks, base, n, j + 1, STEPS)
            else:
                i_b = gl.load(ids + base + n - 1 - j // STEPS)
                first = first_key + i_b * BK + (STEPS - 1 - j % STEPS) * BN
                wait_full(k_full, step, STAGES)
                s_next = warpgroup_mma(b_q, k_tiles.index(step % STAGES).permute((1, 0)), zero,
                                       use_acc=False, is_async=True)  # fmt: skip
                s = warpgroup_mma_wait(0, deps=[s_next])
                release(k_empty, step, STAGES)
                s = mask_tokens(s, first, own, s_i, BN, S_MMA)
                m_row = ((bits >> s_i) & 1) != 0
                top, shift, total, p, decay = softmax_step(s, top, shift, total, m_row, scale,
                                                           scale_up)  # fmt: skip
                acc = acc * along_rows(decay, MMA)
                b_p = gl.convert_layout(p.to(b_q.dtype), A)
                if first + BN > key_stop:
                    wait_full(v_full, step, STAGES)
                    clear_foreign(v_tiles.index(step % STAGES), first, key_stop)
                last = step
                step += 1
                j += 1
                bits = bits_next
                bits_next = load_bits(masks, base, n, j + 1, STEPS)
                while (j >= edges * STEPS) & (j < n * STEPS) & (step - last < STAGES):
                    if (bits & mine) != 0:
                        wait_full(v_full, last, STAGES)
                        wait_full(k_full, step, STAGES)
                        s_next = warpgroup_mma(b_q, k_tiles.index(step % STAGES).permute((1, 0)),
                                               zero, use_acc=False, is_async=True)  # fmt: skip
                        acc_next = warpgroup_mma(b_p, v_tiles.index(last % STAGES), acc,
                                                 is_async=True)  # fmt: skip
                        m_row = ((bits >> s_i) & 1) != 0
                        s = warpgroup_mma_wait(1, deps=[s_next])
                        release(k_empty, step, STAGES)
                        top, shift, total, p, decay = softmax_step(
                            s, top, shift, total, m_row, scale, scale_up)  # fmt: skip
                        wait_full(v_full, last, STAGES)  # see 5 above
                        acc = warpgroup_mma_wait(0, deps=[acc_next])
                        release(v_empty, last, STAGES)
                        acc = acc * along_rows(decay, MMA)
                        b_p = gl.convert_layout(p.to(b_q.dtype), A)
                        last = step
                    else:
                        skip(k_full, k_empty, v_full, v_empty, step, STAGES)
                    step += 1
                    j += 1
                    bits = bits_next
                    bits_next = load_bits(masks, base, n, j + 1, STEPS)
                wait_full(v_full, last, STAGES)
                acc_next = warpgroup_mma(b_p, v_tiles.index(last % STAGES), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc_next])
                release(v_empty, last, STAGES)
        following = gl.minimum(item + gl.num_programs(0), n_items - 1)
        if not FOLD:  # the rows of the next item arrive while this one is written
            b_q = load_rows(q, tiles, following, a_m, a_d, W, POS, HEADS, G, HKV, stride_qt,
                            stride_qh)  # fmt: skip
        record = tiles + (item // HKV) * 5
        t = gl.load(record) + o_i
        real = (t < gl.load(record + 1)) & (o_h < G)
        finish(acc, to_rows(top, MMA), to_rows(shift, MMA), to_rows(total, MMA), folded, out, lse, item % HKV, t, o_h, real, o_d, scale,
               scale_up, G, HKV, DIM, TOP_K, FOLD)  # fmt: skip
        if FOLD:
            b_q = load_rows(q, tiles, following, a_m, a_d, W, POS, HEADS, G, HKV, stride_qt,
                            stride_qh)  # fmt: skip


@gluon.jit
def plain_rows(W: gl.constexpr, q, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, tables,
               folded, out, lse, scale, scale_up, n_items, U, stride_qt, stride_qh,
               G: gl.constexpr, HKV: gl.constexpr, HEADS: gl.constexpr, TOP_K: gl.constexpr,
               FOLD: gl.constexpr, STAGES: gl.constexpr, BK: gl.constexpr,
               MMA: gl.constexpr, S_MMA: gl.constexpr):  # fmt: skip
    """Consumer W: its rows of every item; one block after another."""
    tiles, ids, masks, counts = tables
    BN: gl.constexpr = k_tiles.shape[1]
    DIM: gl.constexpr = k_tiles.shape[2]
    ROWS: gl.constexpr = MMA.instr_shape[0] * 4
    POS: gl.constexpr = ROWS // HEADS
    STEPS: gl.constexpr = BK // BN
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    a_m = gl.arange(0, ROWS, layout=gl.SliceLayout(1, A))
    a_d = gl.arange(0, DIM, layout=gl.SliceLayout(0, A))
    o_m = gl.arange(0, ROWS, layout=gl.SliceLayout(1, MMA))
    o_d = gl.arange(0, DIM, layout=gl.SliceLayout(0, MMA))
    o_i, o_h = W * POS + o_m // HEADS, o_m % HEADS
    s_i = W * POS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S_MMA)) // HEADS
    zero = gl.zeros([ROWS, BN], gl.float32, layout=S_MMA)
    mine = ((1 << POS) - 1) << (W * POS)
    step = 0
    b_q = load_rows(q, tiles, gl.program_id(0), a_m, a_d, W, POS, HEADS, G, HKV, stride_qt,
                    stride_qh)  # fmt: skip
    for item in range(gl.program_id(0), n_items, gl.num_programs(0)):
        n, edges, base, own, first_key, key_stop = load_item(tables, item, U, HKV, BK)
        bits = load_bits(masks, base, n, 0, STEPS)
        bits_next = load_bits(masks, base, n, 1, STEPS)
        top = gl.full([ROWS], LOWEST, gl.float32, layout=gl.SliceLayout(1, S_MMA))
        shift, _, _ = shift_of(top, scale, scale_up)
        total = gl.zeros([ROWS], gl.float32, layout=gl.SliceLayout(1, S_MMA))
        acc = gl.zeros([ROWS, DIM], gl.float32, layout=MMA)
        for j in range(edges * STEPS):
            if (bits & mine) != 0:
                i_b = gl.load(ids + base + n - 1 - j // STEPS)
                first = first_key + i_b * BK + (STEPS - 1 - j % STEPS) * BN
                wait_full(k_full, step, STAGES)
                s_next = warpgroup_mma(b_q, k_tiles.index(step % STAGES).permute((1, 0)), zero,
                                       use_acc=False, is_async=True)  # fmt: skip
                s = warpgroup_mma_wait(0, deps=[s_next])
                release(k_empty, step, STAGES)
                s = mask_tokens(s, first, own, s_i, BN, S_MMA)
                m_row = ((bits >> s_i) & 1) != 0
                top, shift, total, p, decay = softmax_step(s, top, shift, total, m_row, scale,
                                                           scale_up)  # fmt: skip
                acc = acc * along_rows(decay, MMA)
                wait_full(v_full, step, STAGES)
                if first + BN > key_stop:
                    clear_foreign(v_tiles.index(step % STAGES), first, key_stop)
                acc_next = warpgroup_mma(gl.convert_layout(p.to(b_q.dtype), A),
                                         v_tiles.index(step % STAGES), acc, is_async=True)  # fmt: skip
                acc = warpgroup_mma_wait(0, deps=[acc_next])
                release(v_empty, step, STAGES)
            else:
                skip(k_full, k_empty, v_full, v_empty, step, STAGES)
            step += 1
            bits = bits_next
            bits_next = load_bits(masks, base, n, j + 2, STEPS)
        for j in range(edges * STEPS, n * STEPS):
            if (bits & mine) != 0:
                wait_full(k_full, step, STAGES)
                s_next = warpgroup_mma(b_q, k_tiles.index(step % STAGES).permute((1, 0)), zero,
                                       use_acc=False, is_async=True)  # fmt: skip
                m_row = ((bits >> s_i) & 1) != 0
                s = warpgroup_mma_wait(0, deps=[s_next])
                release(k_empty, step, STAGES)
                top, shift, total, p, decay = softmax_step(s, top, shift, total, m_row, scale,
                                                           scale_up)  # fmt: skip
                acc = acc * along_rows(decay, MMA)
                wait_full(v_full, step, STAGES)
                acc_next = warpgroup_mma(gl.convert_layout(p.to(b_q.dtype), A),
                                         v_tiles.index(step % STAGES), acc, is_async=True)  # fmt: skip
                acc = warpgroup_mma_wait(0, deps=[acc_next])
                release(v_empty, step, STAGES)
            else:
                skip(k_full, k_empty, v_full, v_empty, step, STAGES)
            step += 1
            bits = bits_next
            bits_next = load_bits(masks, base, n, j + 2, STEPS)
        following = gl.minimum(item + gl.num_programs(0), n_items - 1)
        if not FOLD:  # the rows of the next item arrive while this one is written
            b_q = load_rows(q, tiles, following, a_m, a_d, W, POS, HEADS, G, HKV, stride_qt,
                            stride_qh)  # fmt: skip
        record = tiles + (item // HKV) * 5
        t = gl.load(record) + o_i
        real = (t < gl.load(record + 1)) & (o_h < G)
        finish(acc, to_rows(top, MMA), to_rows(shift, MMA), to_rows(total, MMA), folded, out, lse, item % HKV, t, o_h, real, o_d, scale,
               scale_up, G, HKV, DIM, TOP_K, FOLD)  # fmt: skip
        if FOLD:
            b_q = load_rows(q, tiles, following, a_m, a_d, W, POS, HEADS, G, HKV, stride_qt,
                            stride_qh)  # fmt: skip


@gluon.jit
def consume(W: gl.constexpr, q, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, tables, folded, out,
            lse, scale, scale_up, n_items, U, stride_qt, stride_qh, G: gl.constexpr,
            HKV: gl.constexpr, HEADS: gl.constexpr, TOP_K: gl.constexpr, FOLD: gl.constexpr,
            STAGES: gl.constexpr, BK: gl.constexpr, ORDER: gl.constexpr,
            MMA: gl.constexpr, S_MMA: gl.constexpr):  # fmt: skip
    """Consumer W in one of the orders."""
    if ORDER == "overlapped":
        overlapped_rows(W, q, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, tables, folded, out,
                        lse, scale, scale_up, n_items, U, stride_qt, stride_qh, G, HKV, HEADS, TOP_K,
                        FOLD, STAGES, BK, MMA, S_MMA)  # fmt: skip
    else:
        plain_rows(W, q, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, tables, folded, out, lse,
                   scale, scale_up, n_items, U, stride_qt, stride_qh, G, HKV, HEADS, TOP_K, FOLD,
                   STAGES, BK, MMA, S_MMA)  # fmt: skip


@gluon.jit
def consumer_0(q, k_desc, v_desc, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, tables,
           folded, out, lse, scale, scale_up, n_items, U, stride_qt, stride_qh, G: gl.constexpr, HKV: gl.constexpr,
           HEADS: gl.constexpr, TOP_K: gl.constexpr, FOLD: gl.constexpr, STAGES: gl.constexpr, BK: gl.constexpr, ORDER: gl.constexpr, MMA: gl.constexpr, S_MMA: gl.constexpr):  # fmt: skip
    """Consumer 0."""
    consume(0, q, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, tables, folded, out, lse, scale,
            scale_up, n_items, U, stride_qt, stride_qh, G, HKV, HEADS, TOP_K, FOLD, STAGES, BK, ORDER,
            MMA, S_MMA)  # fmt: skip


@gluon.jit
def consumer_1(q, k_desc, v_desc, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, tables,
           folded, out, lse, scale, scale_up, n_items, U, stride_qt, stride_qh, G: gl.constexpr, HKV: gl.constexpr,
           HEADS: gl.constexpr, TOP_K: gl.constexpr, FOLD: gl.constexpr, STAGES: gl.constexpr, BK: gl.constexpr, ORDER: gl.constexpr, MMA: gl.constexpr, S_MMA: gl.constexpr):  # fmt: skip
    """Consumer 1."""
    consume(1, q, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, tables, folded, out, lse, scale,
            scale_up, n_items, U, stride_qt, stride_qh, G, HKV, HEADS, TOP_K, FOLD, STAGES, BK, ORDER,
            MMA, S_MMA)  # fmt: skip


@gluon.jit
def consumer_2(q, k_desc, v_desc, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, tables,
           folded, out, lse, scale, scale_up, n_items, U, stride_qt, stride_qh, G: gl.constexpr, HKV: gl.constexpr,
           HEADS: gl.constexpr, TOP_K: gl.constexpr, FOLD: gl.constexpr, STAGES: gl.constexpr, BK: gl.constexpr, ORDER: gl.constexpr, MMA: gl.constexpr, S_MMA: gl.constexpr):  # fmt: skip
    """Consumer 2."""
    consume(2, q, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, tables, folded, out, lse, scale,
            scale_up, n_items, U, stride_qt, stride_qh, G, HKV, HEADS, TOP_K, FOLD, STAGES, BK, ORDER,
            MMA, S_MMA)  # fmt: skip


@gluon.jit
def producer(q, k_desc, v_desc, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, tables,
           folded, out, lse, scale, scale_up, n_items, U, stride_qt, stride_qh, G: gl.constexpr, HKV: gl.constexpr,
           HEADS: gl.constexpr, TOP_K: gl.constexpr, FOLD: gl.constexpr, STAGES: gl.constexpr, BK: gl.constexpr, ORDER: gl.constexpr, MMA: gl.constexpr, S_MMA: gl.constexpr):  # fmt: skip
    """Copy the blocks of every item's union, the last one first."""
    tiles, ids, masks, counts = tables
    BN: gl.constexpr = k_tiles.shape[1]
    DIM: gl.constexpr = k_tiles.shape[2]
    STEPS: gl.constexpr = BK // BN
    step = 0
    for item in range(gl.program_id(0), n_items, gl.num_programs(0)):
        first_key = gl.load(tiles + (item // HKV) * 5 + 3)
        n = gl.load(counts + item)
        p_id = ids + item.to(gl.int64) * U
        column = (item % HKV) * DIM
        i_b = gl.load(p_id + gl.maximum(n - 1, 0))
        for j in range(n * STEPS):
            row = first_key + i_b * BK + (STEPS - 1 - j % STEPS) * BN
            i_b = gl.load(p_id + gl.maximum(n - 1 - (j + 1) // STEPS, 0))
            produce(k_desc, row, k_tiles, k_full, k_empty, step, STAGES, column)
            produce(v_desc, row, v_tiles, v_full, v_empty, step, STAGES, column)
            step += 1


@gluon.jit
def walk_kernel(q, k_desc, v_desc, tiles, ids, masks, counts, parts, part_tops, part_totals, part_counts,
                out, lse, scale, scale_up, n_items, U, stride_qt, stride_qh, G: gl.constexpr,
                HKV: gl.constexpr, HEADS: gl.constexpr, TOP_K: gl.constexpr, FOLD: gl.constexpr,
                STAGES: gl.constexpr, BK: gl.constexpr, CONSUMERS: gl.constexpr,
                ORDER: gl.constexpr, MMA: gl.constexpr, S_MMA: gl.constexpr, REGISTERS: gl.constexpr):  # fmt: skip
    """Items p, p + programs, ... of program p."""
    BN: gl.constexpr = k_desc.block_type.shape[0]
    DIM: gl.constexpr = k_desc.block_type.shape[1]
    k_tiles = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BN, DIM], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(v_desc.dtype, [STAGES, BN, DIM], v_desc.layout)
    k_full, k_empty = make_barriers(STAGES, 1), make_barriers(STAGES, CONSUMERS)
    v_full, v_empty = make_barriers(STAGES, 1), make_barriers(STAGES, CONSUMERS)
    tables = (tiles, ids, masks, counts)
    folded = (parts, part_tops, part_totals, part_counts)
    if CONSUMERS == 2:
        gl.warp_specialize([
            (consumer_0, (q, k_desc, v_desc, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, tables,
                          folded, out, lse, scale, scale_up, n_items, U, stride_qt, stride_qh, G, HKV,
                          HEADS, TOP_K, FOLD, STAGES, BK, ORDER, MMA, S_MMA)),
            (consumer_1, (q, k_desc, v_desc, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, tables,
                          folded, out, lse, scale, scale_up, n_items, U, stride_qt, stride_qh, G, HKV,
                          HEADS, TOP_K, FOLD, STAGES, BK, ORDER, MMA, S_MMA)),
            (producer, (q, k_desc, v_desc, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, tables,
                        folded, out, lse, scale, scale_up, n_items, U, stride_qt, stride_qh, G, HKV,
                        HEADS, TOP_K, FOLD, STAGES, BK, ORDER, MMA, S_MMA)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (consumer_0, (q, k_desc, v_desc, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, tables,
                          folded, out, lse, scale, scale_up, n_items, U, stride_qt, stride_qh, G, HKV,
                          HEADS, TOP_K, FOLD, STAGES, BK, ORDER, MMA, S_MMA)),
            (consumer_1, (q, k_desc, v_desc, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, tables,
                          folded, out, lse, scale, scale_up, n_items, U, stride_qt, stride_qh, G, HKV,
                          HEADS, TOP_K, FOLD, STAGES, BK, ORDER, MMA, S_MMA)),
            (consumer_2, (q, k_desc, v_desc, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, tables,
                          folded, out, lse, scale, scale_up, n_items, U, stride_qt, stride_qh, G, HKV,
                          HEADS, TOP_K, FOLD, STAGES, BK, ORDER, MMA, S_MMA)),
            (producer, (q, k_desc, v_desc, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, tables,
                        folded, out, lse, scale, scale_up, n_items, U, stride_qt, stride_qh, G, HKV,
                        HEADS, TOP_K, FOLD, STAGES, BK, ORDER, MMA, S_MMA)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])  # fmt: skip


# -- host -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Design:
    """How the kernel is cut; none of these numbers changes what it computes."""

    order: str = "overlapped"
    """"overlapped": the next block's scores run beside this block's values; or "plain"."""
    consumers: int = 2
    keys: int = 128
    """Keys of one product."""
    stages: int = 3
    registers: int = 240
    """Registers of each thread of a consumer."""

    @property
    def options(self) -> dict[str, Any]:
        """The compile-time options that depend on the design alone."""
        layouts = [gl.NVMMADistributedLayout([3, 0], [4, 1], [16, n, 16]) for n in (DIM, self.keys)]
        return {
            "STAGES": self.stages,
            "CONSUMERS": self.consumers,
            "ORDER": self.order,
            "MMA": layouts[0],
            "S_MMA": layouts[1],
            "REGISTERS": self.registers,
        }


OVERLAPPED = Design()


def positions_of(group: int) -> int:
    """Query positions of one consumer: with their heads, rounded up to a power of two, 64 rows."""
    return ROWS // pad(group, 4)


def require_walk(q: Tensor, k: Tensor, v: Tensor, block_size: int, tile_size: int, most: int):
    """What this kernel asks for beyond what the portable one does.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came (R20).
    """
    portable = "use kernels='portable'"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dtype not in KINDS:
            raise TypeError(
                f"{name} must have dtype bfloat16 or float16 for kernels='hopper', "
                f"got {tensor.dtype}: {portable}"
            )
    for name, value, wanted in (
        ("head dim", q.shape[2], DIM),
        ("head dim of v", v.shape[2], DIM),
        ("block_size", block_size, BLOCK),
    ):
        if value != wanted:
            raise ValueError(
                f"{name} must be {wanted} for kernels='hopper', got {value}: {portable}"
            )
    for name, value, limit in (
        ("query heads of a group", q.shape[1] // k.shape[1], ROWS),
        ("tile_size", tile_size, most),
    ):
        if value > limit:
            raise ValueError(
                f"{name} must be at most {limit} for kernels='hopper', got {value}: {portable}"
            )


def describe(x: Float[Tensor, "T H D"], rows: int) -> TensorDescriptor:
    """A matrix of one row for each token, to be copied in tiles of `rows` rows of one head."""
    x = x if can_describe(x, DIM) else x.clone(memory_format=torch.contiguous_format)
    layout = gl.NVMMASharedLayout.get_default_for([rows, DIM], KINDS[x.dtype])
    columns = x.shape[1] * DIM
    return TensorDescriptor(x, [len(x), columns], [x.stride(0), 1], [rows, DIM], layout)


def walk(
    q: Float[Tensor, "Tq Hq D"],
    k: Float[Tensor, "Tk Hkv D"],
    v: Float[Tensor, "Tk Hkv Dv"],
    sequences: Sequences,
    block_size: int,
    block_ids: Int[Tensor, "tiles Hkv U"],
    row_masks: Int[Tensor, "tiles Hkv U"],
    counts: Int[Tensor, "tiles Hkv"],
    tile_size: int,
    softmax_scale: float,
    slots: Slots | None = None,
    into: Output | None = None,
    design: Design = OVERLAPPED,
) -> Output:
    """Walk the first `counts` blocks of each tile; then fold in the slots of other blocks."""
    (n_q, heads, dim), groups = q.shape, k.shape[1]
    group = heads // groups
    positions = positions_of(group)
    require_walk(q, k, v, block_size, tile_size, design.consumers * positions)
    if into is None:
        out = torch.empty((n_q, heads, dim), dtype=q.dtype, device=q.device)
        into = Output(out, torch.empty((n_q, heads), dtype=torch.float32, device=q.device))
    if not n_q:
        return into
    tiles = tile_table(sequences, tile_size, q.device)
    scale = softmax_scale * LOG2E
    fold = slots is not None
    parts = (
        (slots.out, slots.top, slots.total, slots.counts)
        if fold
        else (into.out, into.lse, into.lse, counts)
    )
    items = len(tiles) * groups
    programs = torch.cuda.get_device_properties(q.device).multi_processor_count
    walk_kernel[(min(programs, items),)](
        q, describe(k, design.keys), describe(v, design.keys), tiles, block_ids, row_masks, counts,
        *parts, into.out, into.lse, scale, 2.0 ** math.ceil(math.log2(scale)), items,
        block_ids.shape[2], *q.stride()[:2], G=group, HKV=groups, HEADS=ROWS // positions,
        TOP_K=slots.top.shape[-1] if fold else 1, FOLD=fold, BK=block_size, num_warps=4,
        **design.options,
    )  # fmt: skip
    return into
