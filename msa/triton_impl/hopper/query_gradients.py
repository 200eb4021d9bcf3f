"""Backward of attention, the queries' half, on Hopper: dQ by a walk over each tile's union (R18).

    for each tile of neighbouring queries, each group:
        delta = <dO, out> - dlse                                            # per query and head
        for each block b of the union, the last one first:
            P  = exp(softmax_scale * q K[b]^T - lse), 0 where b was not selected or not visible
            dS = P (dO V[b]^T - delta)
            dQ += softmax_scale * dS K[b]

What the asynchronous form changes:
 1. Warps, tiles, the order of blocks and the grid are those of the forward (`union_walk.py`): a
    producer warp, two consumers of 64 rows, a tile of as many queries as both have together.
 2. q and dO are in shared memory, where products read them. So the registers of a consumer have
    room for three results of 64 x 128: S (then P), dP = dO V^T, and dQ. The producer copies q and
    dO of an item behind its first block: earlier it would wait for the rows of the last item while
    there is room for a block.
 3. K is read twice: transposed for S, as it is for dQ. So K has one stage more than V in the ring.
 4. The product of the next block's scores starts before this block's dS meets K. Both run on the
    tensor cores one after the other, while the consumer waits for the first and computes P.
 5. The sums of dP start at -delta, so that dS is one product of P and dP. Between two products of
    matrices a consumer then has little to do.
 6. Blocks at the diagonal need a token mask. It is applied to dS, where it also removes what tokens
    of another sequence have brought into P and dP.
 7. A partial last block is followed by keys of another sequence. They are overwritten with zeros in
    shared memory, because dS K would multiply zeros with them, and 0 times NaN would be NaN.
 8. While an item's dQ is written, the rows of out and dO for the next item's delta are loaded.

Who waits for whom (K, V: rings of tiles; a consumer releases each tile exactly once):

    producer warp   K0 V0 q dO K1 V1 K2 ..wait.. V2 ............... K3 ....
                     |  |  |   |             ^ V0 is released       ^ K0 is released by both
                     v  v  v   v
    consumer 0      S0 = q K0 | P0 | dP0 = dO V0 | dS0 | S1 = q K1, dQ += dS0 K0 | P1 | dP1 | dS1 ..
                                                       ^ both start              ^ may run along
    consumer 1      skip 0 | S1 = q K1 | P1 | dP1 | dS1 | S2, dQ += dS1 K1 | P2 | dP2 | dS2 | ...

A consumer keeps the tile of K that its dS has to meet while it waits for the next keys. If it kept
the tile while K_STAGES blocks pass by that it does not want, the producer could not go on. So a run
of the overlapped loop ends before that, with the product that is left.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from msa.ir import Selection
from msa.triton_impl.hopper import union_walk
from msa.triton_impl.hopper.ring import make_barriers, produce, produce_at, release, wait_full
from msa.triton_impl.hopper.union_walk import describe, skip, tile_size_of
from msa.triton_impl.hopper.walk_rows import clear_foreign, load_bits, load_item, load_rows
from msa.triton_impl.launch import pad
from msa.triton_impl.tables import tile_table
from msa.triton_impl.tile_union import SplitUnion

LOG2E = gl.constexpr(union_walk.LOG2E)
OPTIONS = {"K_STAGES": 3, "V_STAGES": 2} | {
    name: union_walk.OPTIONS[name] for name in ("BK", "MMA", "REGISTERS", "num_warps")
}
"""The compile-time options that are always the same."""


# -- rows -----------------------------------------------------------------------------------------
@gluon.jit
def row_sums(out, d_out, tiles, item, W: gl.constexpr, POS: gl.constexpr, HEADS: gl.constexpr,
             G: gl.constexpr, HKV: gl.constexpr, DIM: gl.constexpr, MMA: gl.constexpr):  # fmt: skip
    """<dO, out> of each row of consumer W in this item, as the rows of dQ lie."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    m = gl.arange(0, POS * HEADS, layout=gl.SliceLayout(1, L))
    d = gl.arange(0, DIM, layout=gl.SliceLayout(0, L))
    b_do = load_rows(d_out, tiles, item, m, d, W, POS, HEADS, G, HKV, HKV * G * DIM, DIM)
    b_out = load_rows(out, tiles, item, m, d, W, POS, HEADS, G, HKV, HKV * G * DIM, DIM)
    sums = gl.sum(b_do.to(gl.float32) * b_out.to(gl.float32), 1)
    return gl.convert_layout(sums, gl.SliceLayout(1, MMA))


@gluon.jit
def place_rows(tiles, item, o_i, o_h, G: gl.constexpr, HKV: gl.constexpr):
    """Of each row: its number in tensors of (query, head) pairs, and whether it is real."""
    record = tiles + (item // HKV) * 5
    t = gl.load(record) + o_i
    real = (t < gl.load(record + 1)) & (o_h < G)
    return t.to(gl.int64) * (HKV * G) + (item % HKV) * G + o_h, real


@gluon.jit
def probabilities(s, minus_lse, m_row, scale):
    """exp2(scale * s - lse), one multiply-add each; 0 in rows that did not select the block."""
    less = gl.where(m_row, minus_lse, float("-inf"))
    factor = scale + gl.zeros_like(less)
    return gl.exp2(gl.fma(s, gl.expand_dims(factor, 1).broadcast_to(s.shape),
                          gl.expand_dims(less, 1).broadcast_to(s.shape)))  # fmt: skip


# -- warps ----------------------------------------------------------------------------------------
@gluon.jit
def consume(W: gl.constexpr, given, written, rows, rings, tables, scale, softmax_scale, n_items, U,
            G: gl.constexpr, HKV: gl.constexpr, HEADS: gl.constexpr,
            MMA: gl.constexpr):  # fmt: skip
    """Consumer W: its rows of every item; the next block's scores before this block's dQ."""
    out, d_out, lse, d_lse = given
    d_q, deltas = written
    q_tiles, do_tiles, q_full, q_empty, do_full, do_empty = rows
    k_tiles, v_tiles, k_full, k_empty, v_full, v_empty = rings
    tiles, ids, masks, _unused = tables
    K_STAGES: gl.constexpr = k_tiles.shape[0]
    V_STAGES: gl.constexpr = v_tiles.shape[0]
    BK: gl.constexpr = k_tiles.shape[1]
    DIM: gl.constexpr = k_tiles.shape[2]
    POS: gl.constexpr = q_tiles.shape[1]
    ROWS: gl.constexpr = POS * HEADS
    CONSUMERS: gl.constexpr = q_tiles.shape[0]
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    o_m = gl.arange(0, ROWS, layout=gl.SliceLayout(1, MMA))
    o_i, o_h = W * POS + o_m // HEADS, o_m % HEADS
    zero = gl.zeros([ROWS, BK], gl.float32, layout=MMA)
    mine = ((1 << POS) - 1) << (W * POS)
    b_q = q_tiles.index(W).reshape([ROWS, DIM])
    b_do = do_tiles.index(W).reshape([ROWS, DIM])
    step = 0
    turn = W  # consumer W has stage W of the rows
    sums = row_sums(out, d_out, tiles, gl.program_id(0), W, POS, HEADS, G, HKV, DIM, MMA)
    for item in range(gl.program_id(0), n_items, gl.num_programs(0)):
        n, edges, base, _, _, _ = load_item(tables, item, U, HKV, BK)
        bits = load_bits(masks, base, n, 0)
        bits_next = load_bits(masks, base, n, 1)
        x, real = place_rows(tiles, item, o_i, o_h, G, HKV)
        delta = sums - gl.load(d_lse + x, mask=real, other=0.0)
        gl.store(deltas + x, delta, mask=real)
        minus_lse = gl.load(lse + x, mask=real, other=0.0) * -LOG2E
        acc = gl.zeros([ROWS, DIM], gl.float32, layout=MMA)
        if n > 0:
            wait_full(q_full, turn, CONSUMERS)
            wait_full(do_full, turn, CONSUMERS)
        j = 0
        while j < n:
            if (bits & mine) == 0:
                skip(rings, step)
                step += 1
                j += 1
                bits = bits_next
                bits_next = load_bits(masks, base, n, j + 1)
            else:  # a run of blocks: the first one, and those behind it, overlapped
                record = tiles + (item // HKV) * 5
                first = gl.load(record + 3) + gl.load(ids + base + n - 1 - j) * BK
                key_stop = gl.load(record + 4)
                wait_full(k_full, step, K_STAGES)
                if first + BK > key_stop:
                    clear_foreign(k_tiles.index(step % K_STAGES), first, key_stop)
                s_next = warpgroup_mma(b_q, k_tiles.index(step % K_STAGES).permute((1, 0)), zero,
                                       use_acc=False, is_async=True)  # fmt: skip
                wait_full(v_full, step, V_STAGES)
                dp_next = warpgroup_mma(b_do, v_tiles.index(step % V_STAGES).permute((1, 0)),
                                        zero - gl.expand_dims(delta, 1), is_async=True)  # fmt: skip
                s = warpgroup_mma_wait(1, deps=[s_next])
                p = probabilities(s, minus_lse, ((bits >> o_i) & 1) != 0, scale)
                dp = warpgroup_mma_wait(0, deps=[dp_next])
                release(v_empty, step, V_STAGES)
                o_n = first + gl.arange(0, BK, layout=gl.SliceLayout(0, MMA))
                m_n = o_n[None, :] <= (gl.load(record + 2) + o_i)[:, None]
                b_ds = gl.convert_layout(gl.where(m_n, p * dp, 0.0).to(b_q.dtype), A)
                last = step
                step += 1
                j += 1
                bits = bits_next
                bits_next = load_bits(masks, base, n, j + 1)
                while (j >= edges) & (j < n) & (step - last < K_STAGES):
                    if (bits & mine) != 0:
                        wait_full(k_full, step, K_STAGES)
                        s_next = warpgroup_mma(b_q, k_tiles.index(step % K_STAGES).permute((1, 0)),
                                               zero, use_acc=False, is_async=True)  # fmt: skip
                        acc_next = warpgroup_mma(b_ds, k_tiles.index(last % K_STAGES), acc,
                                                 is_async=True)  # fmt: skip
                        s = warpgroup_mma_wait(1, deps=[s_next])
                        p = probabilities(s, minus_lse, ((bits >> o_i) & 1) != 0, scale)
                        wait_full(v_full, step, V_STAGES)
                        acc = warpgroup_mma_wait(0, deps=[acc_next])
                        release(k_empty, last, K_STAGES)
                        dp_next = warpgroup_mma(
                            b_do, v_tiles.index(step % V_STAGES).permute((1, 0)),
                            zero - gl.expand_dims(delta, 1), is_async=True)  # fmt: skip
                        dp = warpgroup_mma_wait(0, deps=[dp_next])
                        release(v_empty, step, V_STAGES)
                        b_ds = gl.convert_layout((p * dp).to(b_q.dtype), A)
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
            release(q_empty, turn, CONSUMERS)
            release(do_empty, turn, CONSUMERS)
            turn += CONSUMERS
        following = gl.minimum(item + gl.num_programs(0), n_items - 1)
        sums = row_sums(out, d_out, tiles, following, W, POS, HEADS, G, HKV, DIM, MMA)
        x, real = place_rows(tiles, item, o_i, o_h, G, HKV)
        o_d = gl.arange(0, DIM, layout=gl.SliceLayout(0, MMA))
        p_dq = d_q + x[:, None] * DIM + o_d[None, :]
        gl.store(p_dq, (acc * softmax_scale).to(d_q.dtype.element_ty), mask=real[:, None])


@gluon.jit
def copy_rows_and_blocks(q_desc, k_desc, v_desc, do_desc, rows, rings, tables, n_items, U,
                         G: gl.constexpr, HKV: gl.constexpr):  # fmt: skip
    """The producer: copy the blocks of every item's union, the last one first, and its rows."""
    q_tiles, do_tiles, q_full, q_empty, do_full, do_empty = rows
    k_tiles, v_tiles, k_full, k_empty, v_full, v_empty = rings
    tiles, ids, _unused, counts = tables
    CONSUMERS: gl.constexpr = q_tiles.shape[0]
    step = 0
    turn = 0
    for item in range(gl.program_id(0), n_items, gl.num_programs(0)):
        record = tiles + (item // HKV) * 5
        t = gl.load(record)
        first_key = gl.load(record + 3)
        n = gl.load(counts + item)
        i_r = item % HKV
        p_id = ids + item.to(gl.int64) * U
        i_b = gl.load(p_id + gl.maximum(n - 1, 0))
        for j in range(n):
            row, column = first_key + i_b * k_tiles.shape[1], i_r * k_tiles.shape[2]
            i_b = gl.load(p_id + gl.maximum(n - 2 - j, 0))
            produce(k_desc, row, k_tiles, k_full, k_empty, step, k_tiles.shape[0], column)
            produce(v_desc, row, v_tiles, v_full, v_empty, step, v_tiles.shape[0], column)
            step += 1
            if j == 0:
                for w in gl.static_range(CONSUMERS):
                    place = (t + w * q_tiles.shape[1], i_r * G, 0)
                    produce_at(q_desc, place, q_tiles, q_full, q_empty, turn, CONSUMERS)
                    produce_at(do_desc, place, do_tiles, do_full, do_empty, turn, CONSUMERS)
                    turn += 1


@gluon.jit(do_not_specialize=["n_items", "U"])  # so other sizes compile nothing anew
def hopper_query_gradients_kernel(q_desc, k_desc, v_desc, do_desc, out, d_out, lse, d_lse, tiles,
                                  ids, masks, counts, d_q, delta, scale, softmax_scale, n_items, U,
                                  G: gl.constexpr, HKV: gl.constexpr, HEADS: gl.constexpr,
                                  K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, BK: gl.constexpr,
                                  MMA: gl.constexpr, REGISTERS: gl.constexpr):  # fmt: skip
    """Items p, p + programs, ... of program p; an item is a tile of queries and a group.

    Parameters:
        q_desc, do_desc: descriptors of q and dO, [Tq, Hq, 128], in tiles of [64 / HEADS, HEADS,
            128], 16-bit
        k_desc, v_desc: descriptors of k and v as matrices [Tk, Hkv * 128], in tiles of [BK, 128],
            as q
        out, d_out: [Tq, Hq, 128], as q; the forward's output and its gradient
        lse, d_lse: [Tq, Hq], float32; the forward's LSE, a natural logarithm, and its gradient
        tiles: [tiles, 5], int32; a `tile_table`
        ids: [tiles, Hkv, U], int32; the blocks of each union, ascending
        masks: [tiles, Hkv, U], int32; bit i: query i of the tile selected the block
        counts: [tiles, Hkv], int32; blocks of each union
        d_q: [Tq, Hq, 128], as q; written
        delta: [Tq, Hq], float32; <d_out, out> - d_lse, written
        scale: float; softmax scale times log2(e)
        softmax_scale: float
        n_items: int; tiles times groups
        U: int; width of ids and masks
        G, HKV: query heads of a group, groups
        HEADS: G rounded up to a power of two, at least 8
        K_STAGES, V_STAGES: tiles of keys in their ring, and of values in theirs
        BK: keys of a block
        MMA: layout of the products of a consumer, [64, 128]
        REGISTERS: of a thread of the second consumer
    """
    DIM: gl.constexpr = k_desc.block_type.shape[1]
    POS: gl.constexpr = q_desc.block_type.shape[0]
    rows = (
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
    given = (out, d_out, lse, d_lse)
    written = (d_q, delta)
    gl.warp_specialize([
        (consume, (0, given, written, rows, rings, tables, scale, softmax_scale, n_items, U, G, HKV,
                   HEADS, MMA)),
        (consume, (1, given, written, rows, rings, tables, scale, softmax_scale, n_items, U, G, HKV,
                   HEADS, MMA)),
        (copy_rows_and_blocks, (q_desc, k_desc, v_desc, do_desc, rows, rings, tables, n_items, U, G,
                                HKV)),
    ], [4, 1], [REGISTERS, 24])  # fmt: skip


# -- host -----------------------------------------------------------------------------------------
def describe_rows(x: Float[Tensor, "T H D"], group: int) -> TensorDescriptor:
    """Rows of queries, to be copied in tiles of a consumer's positions and the heads of a group.

    The copy engine needs distances that are multiples of 16 bytes; other tensors are copied.
    """
    steps = [step * x.element_size() for step in x.stride()[:2]]
    fits = x.data_ptr() % 16 == 0 and all(0 < s < 2**40 and s % 16 == 0 for s in steps)
    x = x if fits else x.clone(memory_format=torch.contiguous_format)
    heads = pad(group, 8)
    shape = [union_walk.ROWS // heads, heads, union_walk.DIM]
    layout = gl.NVMMASharedLayout.get_default_for(shape, union_walk.KINDS[x.dtype])
    return TensorDescriptor(x, list(x.shape), list(x.stride()), shape, layout)


def query_gradients(
    q: Float[Tensor, "Tq Hq D"], k: Float[Tensor, "Tk Hkv D"], v: Float[Tensor, "Tk Hkv D"],
    out: Float[Tensor, "Tq Hq D"], d_out: Float[Tensor, "Tq Hq D"], lse: Float[Tensor, "Tq Hq"],
    d_lse: Float[Tensor, "Tq Hq"], union: SplitUnion, selection: Selection, softmax_scale: float,
    into: Float[Tensor, "Tq Hq D"] | None = None,
) -> tuple[Float[Tensor, "Tq Hq D"], Float[Tensor, "Tq Hq"]]:  # fmt: skip
    """dQ in q's dtype, and delta in float32; all but q, k and v are contiguous.

    For arguments that `msa.kernel_choice` takes.

    Args:
        union: whole unions of tiles of `tile_size_of` queries.
        into: write dQ to this contiguous tensor instead of a new one.

    Raises:
        ValueError: if the tiles of the union have another size.
    """
    heads, groups = q.shape[1], k.shape[1]
    group = heads // groups
    size = tile_size_of(group)
    if union.tile_size != size:
        raise ValueError(f"union must have tiles of {size} queries, got {union.tile_size}: "
                         f"make it by split_tiles(selection, {size})")  # fmt: skip
    d_q = torch.empty(q.shape, dtype=q.dtype, device=q.device) if into is None else into
    delta = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if not len(q):
        return d_q, delta
    tiles = tile_table(selection.sequences, size, q.device)
    items = len(tiles) * groups
    programs = torch.cuda.get_device_properties(q.device).multi_processor_count
    hopper_query_gradients_kernel[(min(programs, items),)](
        describe_rows(q, group), describe(k), describe(v), describe_rows(d_out, group), out, d_out,
        lse, d_lse, tiles, union.block_ids, union.row_masks, union.counts, d_q, delta,
        softmax_scale * union_walk.LOG2E, softmax_scale, items, union.block_ids.shape[2], G=group,
        HKV=groups, HEADS=pad(group, 8), **OPTIONS,
    )  # fmt: skip
    return d_q, delta
