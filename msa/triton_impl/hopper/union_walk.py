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
    which is known to be there, is such a branch. The weights are converted to 16 bits behind the
    wait: before it, the running product still reads the registers that they are written to.
 6. The scale and the maximum are applied by one multiply-add (`walk_rows.py` says why it is exact).
 7. The grid is one program for each multiprocessor, and the producer copies the next item's blocks
    while consumers write this item's rows. Rows of queries are loaded while the last are written.
 8. Slots of other blocks (R16) are folded in one after another at the end of an item. This spills
    registers, outside of all loops over blocks. Without slots nothing spills
    where a group has nine heads or more.
 9. In a paged cache the producer finds each block through the page table (`page_rows.py`); for the
    consumers nothing changes.
10. A partial last block is followed by another sequence's values. They are overwritten with zeros
    in shared memory: 0 times NaN would be NaN.
11. Pages that were widened from 8 bits (`wide_pages.py`) have factors. A consumer loads the two
    numbers of a block while the block's products run. They become part of the scale and of the
    decay (`walk_rows.py`).

Who waits for whom (K, V: rings of STAGES tiles; a consumer releases each tile exactly once):

    producer warp   K0 V0 K1 V1 K2 V2 ..wait.. K3 ........ V3 ....
                     |  |  |                   ^ K0 is released by all consumers
                     v  v  v
    consumer 0      S0 = q K0 | softmax 0 | S1 = q K1, o += P0 V0 | softmax 1 | S2, o += P1 V1 ..
                                          ^ both start             ^ runs while P0 V0 does
    consumer 1      skip 0 | S1 = q K1 | softmax 1 | S2 = q K2, o += P1 V1 | ...

A consumer that has weights to multiply keeps their tile of V while it waits for the next keys. If
it kept the tile while STAGES blocks pass by that it does not want, the producer could not go on. So
a run of the overlapped loop ends before that, with the product that is left.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from msa.ir import Output, Sequences
from msa.triton_impl.combine import Slots
from msa.triton_impl.hopper.page_rows import head_place, load_page, page_row
from msa.triton_impl.hopper.ring import make_barriers, produce, release, wait_full
from msa.triton_impl.hopper.walk_rows import (
    LOWEST,
    along_rows,
    clear_foreign,
    finish,
    load_bits,
    load_factors,
    load_first,
    load_item,
    load_rows,
    mask_tokens,
    shift_of,
    softmax_step,
    to_rows,
)
from msa.triton_impl.launch import can_describe, pad
from msa.triton_impl.paged_keys import Pages, page_matrix
from msa.triton_impl.tables import tile_owners, tile_table

LOG2E = 1.4426950408889634
KINDS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
ROWS, CONSUMERS, DIM = 64, 2, 128  # rows of a consumer, consumers, D and Dv
OPTIONS = {
    "STAGES": 3,
    "BK": 128,
    "MMA": gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16]),
    "S_MMA": gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]),
    "REGISTERS": 240,
    "num_warps": 4,
}
"""The compile-time options that are always the same."""


@gluon.jit
def skip(rings, step):
    """Release a block that none of the consumer's queries selected."""
    k_tiles, v_tiles, k_full, k_empty, v_full, v_empty = rings
    wait_full(k_full, step, k_tiles.shape[0])
    release(k_empty, step, k_tiles.shape[0])
    wait_full(v_full, step, v_tiles.shape[0])
    release(v_empty, step, v_tiles.shape[0])


@gluon.jit
def consume(W: gl.constexpr, q, rings, tables, wide, folded, out, lse, scale, scale_up,
            n_items, U, stride_qt, stride_qh, G: gl.constexpr, HKV: gl.constexpr,
            HEADS: gl.constexpr, TOP_K: gl.constexpr, FOLD: gl.constexpr, SCALED: gl.constexpr,
            STAGES: gl.constexpr, BK: gl.constexpr, MMA: gl.constexpr,
            S_MMA: gl.constexpr):  # fmt: skip
    """Consumer W: its rows of every item; the next block's scores before this block's values."""
    k_tiles, v_tiles, k_full, k_empty, v_full, v_empty = rings
    tiles, ids, masks, _unused = tables
    DIM: gl.constexpr = k_tiles.shape[2]
    ROWS: gl.constexpr = MMA.instr_shape[0] * 4
    POS: gl.constexpr = ROWS // HEADS
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    a_m = gl.arange(0, ROWS, layout=gl.SliceLayout(1, A))
    a_d = gl.arange(0, DIM, layout=gl.SliceLayout(0, A))
    o_m = gl.arange(0, ROWS, layout=gl.SliceLayout(1, MMA))
    o_d = gl.arange(0, DIM, layout=gl.SliceLayout(0, MMA))
    o_i, o_h = W * POS + o_m // HEADS, o_m % HEADS
    s_i = W * POS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S_MMA)) // HEADS
    zero = gl.zeros([ROWS, BK], gl.float32, layout=S_MMA)
    mine = ((1 << POS) - 1) << (W * POS)
    step = 0
    b_q = load_rows(q, tiles, gl.program_id(0), a_m, a_d, W, POS, HEADS, G, HKV, stride_qt,
                    stride_qh)  # fmt: skip
    for item in range(gl.program_id(0), n_items, gl.num_programs(0)):
        n, edges, base, own, first_key, key_stop = load_item(tables, item, U, HKV, BK)
        bits = load_bits(masks, base, n, 0)
        bits_next = load_bits(masks, base, n, 1)
        top = gl.full([ROWS], LOWEST, gl.float32, layout=gl.SliceLayout(1, S_MMA))
        shift, _, _ = shift_of(top, scale, scale_up)
        total = gl.zeros([ROWS], gl.float32, layout=gl.SliceLayout(1, S_MMA))
        acc = gl.zeros([ROWS, DIM], gl.float32, layout=MMA)
        p_first = load_first(wide, item, HKV, SCALED)
        if SCALED:  # the sum of weights times values is acc * unit
            unit = gl.to_tensor(1.0)
        j = 0
        while j < n:
            if (bits & mine) == 0:
                skip(rings, step)
                step += 1
                j += 1
                bits = bits_next
                bits_next = load_bits(masks, base, n, j + 1)
            else:  # a run of blocks: the first one, and those behind it, overlapped
                first = first_key + gl.load(ids + base + n - 1 - j) * BK
                wait_full(k_full, step, STAGES)
                s_next = warpgroup_mma(b_q, k_tiles.index(step % STAGES).permute((1, 0)), zero,
                                       use_acc=False, is_async=True)  # fmt: skip
                s = warpgroup_mma_wait(0, deps=[s_next])
                release(k_empty, step, STAGES)
                s = mask_tokens(s, first, own, s_i, BK, S_MMA)
                m_row = ((bits >> s_i) & 1) != 0
                by, next_unit = load_factors(p_first, ids, base, n, j, HKV, SCALED)
                top, shift, total, p, decay = softmax_step(s, top, shift, total, m_row, scale,
                                                           scale_up, by, SCALED)  # fmt: skip
                if SCALED:
                    decay = decay * (unit / next_unit)
                    unit = next_unit
                acc = acc * along_rows(decay, MMA)
                b_p = gl.convert_layout(p.to(b_q.dtype), A)
                if not SCALED:  # noqa: SIM102 known to the compiler; widened pages have zeros there
                    if first + BK > key_stop:
                        wait_full(v_full, step, STAGES)
                        clear_foreign(v_tiles.index(step % STAGES), first, key_stop)
                last = step
                step += 1
                j += 1
                bits = bits_next
                bits_next = load_bits(masks, base, n, j + 1)
                while (j >= edges) & (j < n) & (step - last < STAGES):
                    if (bits & mine) != 0:
                        wait_full(v_full, last, STAGES)
                        wait_full(k_full, step, STAGES)
                        s_next = warpgroup_mma(b_q, k_tiles.index(step % STAGES).permute((1, 0)),
                                               zero, use_acc=False, is_async=True)  # fmt: skip
                        acc_next = warpgroup_mma(b_p, v_tiles.index(last % STAGES), acc,
                                                 is_async=True)  # fmt: skip
                        m_row = ((bits >> s_i) & 1) != 0
                        by, next_unit = load_factors(p_first, ids, base, n, j, HKV, SCALED)
                        s = warpgroup_mma_wait(1, deps=[s_next])
                        release(k_empty, step, STAGES)
                        top, shift, total, p, decay = softmax_step(
                            s, top, shift, total, m_row, scale, scale_up, by, SCALED)  # fmt: skip
                        if SCALED:
                            decay = decay * (unit / next_unit)
                            unit = next_unit
                        wait_full(v_full, last, STAGES)  # keeps the softmax above; see 5
                        acc = warpgroup_mma_wait(0, deps=[acc_next])
                        release(v_empty, last, STAGES)
                        acc = acc * along_rows(decay, MMA)
                        b_p = gl.convert_layout(p.to(b_q.dtype), A)
                        last = step
                    else:
                        skip(rings, step)
                    step += 1
                    j += 1
                    bits = bits_next
                    bits_next = load_bits(masks, base, n, j + 1)
                wait_full(v_full, last, STAGES)
                acc_next = warpgroup_mma(b_p, v_tiles.index(last % STAGES), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc_next])
                release(v_empty, last, STAGES)
        following = gl.minimum(item + gl.num_programs(0), n_items - 1)
        if not FOLD:  # the rows of the next item arrive while this one is written
            b_q = load_rows(q, tiles, following, a_m, a_d, W, POS, HEADS, G, HKV, stride_qt,
                            stride_qh)  # fmt: skip
        if SCALED:
            acc = acc * unit
        record = tiles + (item // HKV) * 5
        t = gl.load(record) + o_i
        real = (t < gl.load(record + 1)) & (o_h < G)
        finish(acc, to_rows(top, MMA), to_rows(shift, MMA), to_rows(total, MMA), folded, out, lse,
               item % HKV, t, o_h, real, o_d, scale, scale_up, G, HKV, DIM, TOP_K,
               FOLD)  # fmt: skip
        if FOLD:
            b_q = load_rows(q, tiles, following, a_m, a_d, W, POS, HEADS, G, HKV, stride_qt,
                            stride_qh)  # fmt: skip


@gluon.jit
def copy_blocks(k_desc, v_desc, rings, tables, pages, n_items, U, HKV: gl.constexpr,
                PAGED: gl.constexpr):  # fmt: skip
    """The producer: copy the blocks of every item's union, the last one first."""
    if PAGED:
        copy_pages(k_desc, v_desc, rings, tables, pages, n_items, U, HKV)
    else:
        copy_packed(k_desc, v_desc, rings, tables, n_items, U, HKV)


@gluon.jit
def copy_pages(k_desc, v_desc, rings, tables, pages, n_items, U, HKV: gl.constexpr):
    """The producer over a paged cache."""
    k_tiles, v_tiles, k_full, k_empty, v_full, v_empty = rings
    _tiles, ids, _unused, counts = tables
    owners, table, stride_ts, stride_tb, step_k, step_v = pages
    stride_kp, stride_kt, stride_kh = step_k
    stride_vp, stride_vt, stride_vh = step_v
    step = 0
    for item in range(gl.program_id(0), n_items, gl.num_programs(0)):
        p_table = table + gl.load(owners + item // HKV).to(gl.int64) * stride_ts
        n = gl.load(counts + item)
        p_id = ids + item.to(gl.int64) * U
        row_k, column_k = head_place(item % HKV, stride_kh, stride_kt)
        row_v, column_v = head_place(item % HKV, stride_vh, stride_vt)
        page = load_page(p_table, gl.load(p_id + gl.maximum(n - 1, 0)), stride_tb)
        ahead = gl.load(p_id + gl.maximum(n - 2, 0))
        for j in range(n):
            from_k = row_k + page_row(page, stride_kp, stride_kt)
            from_v = row_v + page_row(page, stride_vp, stride_vt)
            page = load_page(p_table, ahead, stride_tb)
            ahead = gl.load(p_id + gl.maximum(n - 3 - j, 0))
            produce(k_desc, from_k, k_tiles, k_full, k_empty, step, k_tiles.shape[0], column_k)
            produce(v_desc, from_v, v_tiles, v_full, v_empty, step, v_tiles.shape[0], column_v)
            step += 1


@gluon.jit
def copy_packed(k_desc, v_desc, rings, tables, n_items, U, HKV: gl.constexpr):
    """The producer over packed keys."""
    k_tiles, v_tiles, k_full, k_empty, v_full, v_empty = rings
    tiles, ids, _unused, counts = tables
    step = 0
    for item in range(gl.program_id(0), n_items, gl.num_programs(0)):
        first_key = gl.load(tiles + (item // HKV) * 5 + 3)
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


@gluon.jit(do_not_specialize=["n_items", "U"])  # so other sizes compile nothing anew
def hopper_walk_kernel(q, k_desc, v_desc, tiles, ids, masks, counts, parts, part_tops, part_totals,
                       part_counts, out, lse, owners, table, factors, scale, scale_up, n_items, U,
                       stride_qt, stride_qh, stride_kp, stride_kt, stride_kh, stride_vp, stride_vt,
                       stride_vh, stride_ts, stride_tb, G: gl.constexpr, HKV: gl.constexpr,
                       HEADS: gl.constexpr, TOP_K: gl.constexpr, FOLD: gl.constexpr,
                       PAGED: gl.constexpr, SCALED: gl.constexpr, STAGES: gl.constexpr,
                       BK: gl.constexpr, MMA: gl.constexpr, S_MMA: gl.constexpr,
                       REGISTERS: gl.constexpr):  # fmt: skip
    """Items p, p + programs, ... of program p; an item is a tile of queries and a group.

    Parameters:
        q: [Tq, Hq, 128], 16-bit
        k_desc, v_desc: descriptors of [Tk, Hkv * 128], as q, in tiles of BK rows of one group; with
            PAGED of a `page_matrix`
        tiles: [tiles, 5], int32; a `tile_table`
        ids: [tiles, Hkv, U], int32; the blocks of each union, ascending
        masks: [tiles, Hkv, U], int32; bit i: position i of the tile selected the block
        counts: [tiles, Hkv], int32; blocks of each union
        parts: [Tq, Hq, k, 128], as q; outputs of other blocks to fold in, read with FOLD only
        part_tops: [Tq, Hq, k], float32; their highest scores, not scaled
        part_totals: [Tq, Hq, k], float32; their sums of exp2(scale * (score - top))
        part_counts: [Tq, Hkv], int32; slots of the parts that are in use
        out: [Tq, Hq, 128], as q; written
        lse: [Tq, Hq], float32, natural logarithm; written
        owners: [tiles], int32; `tile_owners`, read with PAGED only
        table: [B, columns], int32 or int64; a sequence's pages in order, read with PAGED only
        factors: [pages, Hkv, 2], float32; of keys and of values, read with SCALED only
        scale: float; softmax scale times log2(e)
        scale_up: float; scale rounded up to a power of two
        n_items: int; tiles times groups
        U: int; width of ids and masks
        stride_qt: elements from one token of q to the next
        stride_qh: elements from one head of q to the next
        stride_kp, stride_kt, stride_kh: elements from one page, token, head of k to the next
        stride_vp, stride_vt, stride_vh: elements from one page, token, head of v to the next
        stride_ts, stride_tb: elements from one sequence, block of table to the next
        G, HKV: query heads of a group, groups
        HEADS: G rounded up to a power of two, at least 8
        TOP_K: k of the parts
        FOLD: bool; fold in the parts
        PAGED: bool; k and v are pages
        SCALED: bool; the pages have factors, and the blocks of a sequence are neighbours
        STAGES: tiles of keys in their ring, and of values in theirs
        BK: keys of a block
        MMA: layout of the outputs of a consumer, [64, 128]
        S_MMA: layout of its scores, [64, BK]
        REGISTERS: of a thread of the second consumer
    """
    DIM: gl.constexpr = k_desc.block_type.shape[1]
    rings = (
        gl.allocate_shared_memory(k_desc.dtype, [STAGES, BK, DIM], k_desc.layout),
        gl.allocate_shared_memory(v_desc.dtype, [STAGES, BK, DIM], v_desc.layout),
        make_barriers(STAGES, 1), make_barriers(STAGES, 2),
        make_barriers(STAGES, 1), make_barriers(STAGES, 2),
    )  # fmt: skip
    tables = (tiles, ids, masks, counts)
    folded = (parts, part_tops, part_totals, part_counts)
    pages = (owners, table, stride_ts, stride_tb, (stride_kp, stride_kt, stride_kh),
             (stride_vp, stride_vt, stride_vh))  # fmt: skip
    wide = owners, table, stride_ts, factors
    gl.warp_specialize([
        (consume, (0, q, rings, tables, wide, folded, out, lse, scale, scale_up, n_items, U,
                   stride_qt, stride_qh, G, HKV, HEADS, TOP_K, FOLD, SCALED, STAGES, BK, MMA,
                   S_MMA)),
        (consume, (1, q, rings, tables, wide, folded, out, lse, scale, scale_up, n_items, U,
                   stride_qt, stride_qh, G, HKV, HEADS, TOP_K, FOLD, SCALED, STAGES, BK, MMA,
                   S_MMA)),
        (copy_blocks, (k_desc, v_desc, rings, tables, pages, n_items, U, HKV, PAGED)),
    ], [4, 1], [REGISTERS, 24])  # fmt: skip


# -- host -----------------------------------------------------------------------------------------
def tile_size_of(group: int) -> int:
    """Queries of a tile: each consumer has 64 rows, as many queries as have room with their heads.

    >>> tile_size_of(1), tile_size_of(16), tile_size_of(64)
    (16, 8, 2)
    """
    return CONSUMERS * ROWS // pad(group, 8)


def describe(x: Float[Tensor, "T H D"]) -> TensorDescriptor:
    """A matrix of one row for each token, to be copied in blocks of one head."""
    x = x if can_describe(x, DIM) else x.clone(memory_format=torch.contiguous_format)
    shape = [OPTIONS["BK"], DIM]
    layout = gl.NVMMASharedLayout.get_default_for(shape, KINDS[x.dtype])
    return TensorDescriptor(x, [len(x), x.shape[1] * DIM], [x.stride(0), 1], shape, layout)


def describe_pages(x: Float[Tensor, "pages Bk H D"]) -> TensorDescriptor:
    """The `page_matrix` of pages that have one, to be copied in blocks of one head."""
    matrix, shape = page_matrix(x), [OPTIONS["BK"], DIM]
    assert matrix is not None
    layout = gl.NVMMASharedLayout.get_default_for(shape, KINDS[x.dtype])
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), shape, layout)


def walk(
    q: Float[Tensor, "Tq Hq D"],
    k: Float[Tensor, "*where Hkv D"],
    v: Float[Tensor, "*where Hkv D"],
    sequences: Sequences,
    block_ids: Int[Tensor, "tiles Hkv U"],
    row_masks: Int[Tensor, "tiles Hkv U"],
    counts: Int[Tensor, "tiles Hkv"],
    softmax_scale: float,
    into: Output,
    slots: Slots | None = None,
    pages: Pages | None = None,
) -> Output:
    """Walk the first `counts` blocks of each tile; then fold in the slots of other blocks.

    For arguments that `msa.kernel_choice` takes, in tiles of `tile_size_of` queries. With `pages`,
    k and v are pages that have a `page_matrix`. If these have factors, `widen_pages` made them.
    """
    heads, groups = q.shape[1], k.shape[-2]
    group = heads // groups
    if not len(q):
        return into
    tiles = tile_table(sequences, tile_size_of(group), q.device)
    scale, items, fold = softmax_scale * LOG2E, len(tiles) * groups, slots is not None
    unused = into.out, into.lse, into.lse, counts
    parts = (slots.out, slots.top, slots.total, slots.counts) if fold else unused
    programs = torch.cuda.get_device_properties(q.device).multi_processor_count
    owners, table, factors, steps = counts, counts, into.lse, [0] * 8  # not read
    if pages is not None:
        owners, table = tile_owners(sequences, tile_size_of(group), q.device), pages.table
        steps = [x.stride(i) for x in (k, v) for i in range(3)] + list(table.stride())
        factors = into.lse if pages.k_scales is None else pages.k_scales
    descriptor = describe if pages is None else describe_pages
    scale_up = 2.0 ** min(127, math.ceil(math.log2(scale)))
    hopper_walk_kernel[(min(programs, items),)](
        q, descriptor(k), descriptor(v), tiles, block_ids, row_masks, counts, *parts, into.out,
        into.lse, owners, table, factors, scale, scale_up, items,
        block_ids.shape[2], *q.stride()[:2], *steps, G=group, HKV=groups, HEADS=pad(group, 8),
        TOP_K=slots.top.shape[-1] if fold else 1, FOLD=fold, PAGED=pages is not None,
        SCALED=pages is not None and pages.k_scales is not None, **OPTIONS,
    )  # fmt: skip
    return into
