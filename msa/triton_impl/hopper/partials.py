"""Attention block by block on Hopper, one partial result per edge (R15).

    for each work item (block of one group, edges start ... stop):
        K, V = the block's keys and values
        for each edge (query t, slot s), for each head of the group:
            S = q[t, head] @ K^T, tokens after t's own key masked
            out[t, group, s, head] = softmax(softmax_scale * S) @ V
            top[t, group, s, head] = max S;  total[...] = sum exp(softmax_scale * (S - top))

What bounds it: for each edge the products of a group of 16 heads are 1.05 MFLOP, which take 1.3 ns
at the rate of a plain product. The edge reads 4 KiB of q and writes 4 KiB of out, which take 1.9 ns
at 4.3 TB/s. So memory bounds it, and the kernel is made to have enough copies under way:
 1. A producer warp gathers the queries of the next edges while the products of these edges run. The
    heads of a query lie side by side, so a query of a group is two copies of [heads, 64].
 2. Two consumers of four warps own 64 rows each (4 edges x 16 heads). Each has a ring of queries of
    its own, so neither waits for the other: one multiplies while the other takes exponentials.
 3. Keys and values have two stages: those of the next item arrive while this one is computed.
 4. A consumer writes its rows to shared memory, and the copy engine writes them out: all heads of
    one edge lie side by side (`combine.Slots`), 4 KiB in one run. The rows are overwritten a step
    later, when the engine has read them.
 5. Both matrices of a consumer are cut into halves of 64 columns: the rows of one query are then
    one run of shared memory, with the swizzle that products want.
 6. The grid is one program for each multiprocessor, and program p takes items p, p + programs, ...
    Items that hold no edge come last, so the first one ends the program.
 7. The last step of an item may have too few edges. The producer repeats the last one, and
    nothing of the repetition is written.
 8. Pages that were widened from 8 bits (`wide_pages.py`) have factors. That of the keys is part of
    the scale of an item, and that of the values part of the division by the sum.
 9. A partial last block is followed by another sequence's values. They are overwritten with zeros
    in shared memory: 0 times NaN would be NaN.

Who waits for whom (K, V: rings of two blocks; Q0, Q1: rings of two times 64 rows):

    producer warp   K V Q0 Q1 Q0 Q1 ..wait.. Q0 ... Q1 ... K' V' (next item) Q0 ..
                    | |  |  |             ^ released by consumer 0 after its product with K
                    v v  v  v             |
    consumer 0      S = q K | softmax | o = P V | to shared memory | S = q K | softmax | ...
    copy engine                                                    | o to memory |
    consumer 1           S = q K | softmax | o = P V | to shared memory | S = q K | ...
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from msa import chips
from msa.ir import Schedule
from msa.triton_impl.combine import Slots, empty_slots
from msa.triton_impl.hopper.page_rows import head_place, load_page, page_row
from msa.triton_impl.hopper.ring import (
    copy_back,
    copy_tile,
    in_parts,
    make_barriers,
    produce,
    release,
    wait_empty,
    wait_full,
)
from msa.triton_impl.hopper.union_walk import describe, describe_pages
from msa.triton_impl.hopper.walk_rows import LOWEST, clear_foreign
from msa.triton_impl.launch import can_describe
from msa.triton_impl.paged_keys import Pages
from msa.triton_impl.tables import block_places, block_table, query_table
from msa.triton_impl.tuning import EVERY_LAUNCH

LOG2E = 1.4426950408889634
ROWS, HALF, DIM = 64, 64, 128  # rows of a consumer, columns of a half, D and Dv
FLAT, DEEP = (gl.NVMMASharedLayout(128, 16, rank) for rank in (2, 3))
OPTIONS = {
    "STAGES": 2,
    "BLOCKS": 2,
    "MMA": gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16]),
    "S_MMA": gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]),
    "FLAT": FLAT,
    "DEEP": DEEP,
    "REGISTERS": 240,
    "num_warps": 4,
}
"""The compile-time options that are always the same."""


@gluon.jit
def load_chunk(edges, item, n_items, n_blocks):
    """Of an item: its edges, its group, its block's first key and the end of its sequence.

    With these the own key of its first query; the other ones lie behind.
    """
    rows, starts, stops, query_ids, _slots, own_keys, first_keys, key_stops = edges
    i = gl.minimum(item, n_items - 1)
    start, stop = gl.load(starts + i), gl.load(stops + i)
    length = gl.where(item < n_items, (stop - start).to(gl.int32), 0)
    row = gl.load(rows + i)
    block = row % n_blocks
    first, key_stop = gl.load(first_keys + block), gl.load(key_stops + block)
    t = gl.load(query_ids + start, mask=length > 0, other=0)
    return start, length, row // n_blocks, first, key_stop, gl.load(own_keys + t)


@gluon.jit
def load_page_of(edges, pages, item, n_blocks):
    """The page of an item's block."""
    places, table, stride_ts, stride_tb, _step_k, _step_v, _factors = pages
    i_b = gl.load(edges[0] + item) % n_blocks
    p_table = table + gl.load(places + i_b).to(gl.int64) * stride_ts
    return load_page(p_table, gl.load(places + n_blocks + i_b), stride_tb)


@gluon.jit
def load_factors(edges, pages, item, i_r, n_blocks, HKV: gl.constexpr, SCALED: gl.constexpr):
    """The factors of the keys and of the values of an item's block; 1 without SCALED."""
    if SCALED:
        p_factor = pages[6] + (load_page_of(edges, pages, item, n_blocks) * HKV + i_r) * 2
        return gl.load(p_factor), gl.load(p_factor + 1)
    else:
        return 1.0, 1.0


@gluon.jit
def consume(W: gl.constexpr, tiles, barriers, edges, pages, out_desc, tops, totals, scale, n_items,
            n_blocks, n_rows, G: gl.constexpr, HKV: gl.constexpr, TOP_K: gl.constexpr,
            STAGES: gl.constexpr, BLOCKS: gl.constexpr, SCALED: gl.constexpr, MMA: gl.constexpr,
            S_MMA: gl.constexpr):  # fmt: skip
    """Consumer W: 64 rows of every step."""
    q_tiles, o_tiles, o_parts, k_tiles, v_tiles = tiles
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    _rows, _starts, _stops, query_ids, slots, own_keys, _first_keys, _key_stops = edges
    BK: gl.constexpr = k_tiles.shape[1]
    HALF: gl.constexpr = q_tiles.shape[2]
    ROWS: gl.constexpr = MMA.instr_shape[0] * 4
    POS: gl.constexpr = ROWS // G
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    S_ROW: gl.constexpr = gl.SliceLayout(1, S_MMA)
    o_m = gl.arange(0, ROWS, layout=S_ROW)
    o_n = gl.arange(0, BK, layout=gl.SliceLayout(0, S_MMA))
    none = gl.zeros([ROWS, BK], gl.float32, layout=S_MMA)
    nothing = gl.zeros([ROWS, HALF], gl.float32, layout=MMA)
    item = gl.program_id(0)
    block, step = 0, 0
    following = load_chunk(edges, item, n_items, n_blocks)
    while following[1] > 0:
        start, length, i_r, first, key_stop, own_first = following
        by_k, by_v = load_factors(edges, pages, item, i_r, n_blocks, HKV, SCALED)
        factor = scale
        if SCALED:
            factor = scale * by_k
        item += gl.num_programs(0)
        following = load_chunk(edges, item, n_items, n_blocks)
        masked = own_first < first + BK - 1
        k = k_tiles.index(block % BLOCKS)
        v = v_tiles.index(block % BLOCKS)
        wait_full(k_full, block, BLOCKS)
        wait_full(v_full, block, BLOCKS)
        if first + BK > key_stop:
            clear_foreign(v, first, key_stop)
        for i_e in range(0, length, 2 * POS):
            e = i_e + W * POS  # the consumer's first edge
            stage = (step % STAGES) * 2
            q_low = q_tiles.index(W * (2 * STAGES) + stage)
            q_high = q_tiles.index(W * (2 * STAGES) + stage + 1)
            wait_full(q_full, step * 2 + W, 2 * STAGES)
            s = warpgroup_mma(q_low, k.slice(0, HALF, 1).permute((1, 0)), none, use_acc=False,
                              is_async=True)  # fmt: skip
            s = warpgroup_mma(q_high, k.slice(HALF, HALF, 1).permute((1, 0)), s, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            release(q_empty, step * 2 + W, 2 * STAGES)
            if masked:
                b_t = gl.load(query_ids + start + gl.minimum(e + o_m // G, length - 1))
                own = gl.load(own_keys + b_t)
                s = gl.where((first + o_n)[None, :] <= own[:, None], s, float("-inf"))
            top = gl.maximum(gl.max(s, 1), LOWEST)
            p = gl.exp2((s - top[:, None]) * factor)
            total = gl.sum(p, 1)
            if SCALED:
                top = gl.maximum(top * by_k, LOWEST)
            b_p = gl.convert_layout(p.to(k_tiles.dtype), A)
            low = warpgroup_mma(b_p, v.slice(0, HALF, 1), nothing, use_acc=False, is_async=True)
            high = warpgroup_mma(b_p, v.slice(HALF, HALF, 1), nothing, use_acc=False,
                                 is_async=True)  # fmt: skip
            real = e + o_m // G < length
            p_e = start + gl.minimum(e + o_m // G, length - 1)
            b_x = (gl.load(query_ids + p_e).to(gl.int64) * HKV + i_r) * TOP_K
            b_x = (b_x + gl.load(slots + p_e)) * G + o_m % G
            gl.store(tops + b_x, top, mask=real)
            gl.store(totals + b_x, total, mask=real)
            less = by_v / gl.where(total == 0.0, 1.0, total)  # 0 if all scores are -inf
            less = gl.convert_layout(less, gl.SliceLayout(1, MMA), assert_trivial=True)
            places = ()
            for i in gl.static_range(POS):
                p_i = start + gl.minimum(e + i, length - 1)
                x = ((gl.load(query_ids + p_i) * HKV + i_r) * TOP_K + gl.load(slots + p_i)) * G
                places += (gl.where(e + i < length, x, n_rows),)  # n_rows: written nowhere
            both = warpgroup_mma_wait(0, deps=[low, high])
            tma.store_wait(0)
            o_tiles.index(W * 2).store((both[0] * less[:, None]).to(k_tiles.dtype))
            o_tiles.index(W * 2 + 1).store((both[1] * less[:, None]).to(k_tiles.dtype))
            fence_async_shared()
            for i in gl.static_range(POS):
                copy_back(out_desc, [places[i], 0], o_parts.index(W * 2 * POS + i))
                copy_back(out_desc, [places[i], HALF], o_parts.index((W * 2 + 1) * POS + i))
            step += 1
        release(k_empty, block, BLOCKS)
        release(v_empty, block, BLOCKS)
        block += 1
    tma.store_wait(0)


@gluon.jit
def gather(q_desc, k_desc, v_desc, q_parts, tiles, barriers, edges, pages, n_items, n_blocks,
           G: gl.constexpr, STAGES: gl.constexpr, BLOCKS: gl.constexpr,
           PAGED: gl.constexpr):  # fmt: skip
    """The producer: copy the block of every item, then the queries of its edges."""
    q_tiles, _o_tiles, _o_parts, k_tiles, v_tiles = tiles
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    _rows, _starts, _stops, query_ids, _slots, _own_keys, _first_keys, _key_stops = edges
    HALF: gl.constexpr = q_tiles.shape[2]
    POS: gl.constexpr = q_tiles.shape[1] // G
    _places, _table, _stride_ts, _stride_tb, step_k, step_v, _factors = pages
    stride_kp, stride_kt, stride_kh = step_k
    stride_vp, stride_vt, stride_vh = step_v
    item = gl.program_id(0)
    block, step = 0, 0
    following = load_chunk(edges, item, n_items, n_blocks)
    while following[1] > 0:
        start, length, i_r, from_k, _key_stop, _own = following
        from_v, column_k, column_v = from_k, i_r * (2 * HALF), i_r * (2 * HALF)
        if PAGED:
            page = load_page_of(edges, pages, item, n_blocks)
            from_k, column_k = head_place(i_r, stride_kh, stride_kt)
            from_v, column_v = head_place(i_r, stride_vh, stride_vt)
            from_k += page_row(page, stride_kp, stride_kt)
            from_v += page_row(page, stride_vp, stride_vt)
        item += gl.num_programs(0)
        following = load_chunk(edges, item, n_items, n_blocks)
        produce(k_desc, from_k, k_tiles, k_full, k_empty, block, BLOCKS, column_k)
        produce(v_desc, from_v, v_tiles, v_full, v_empty, block, BLOCKS, column_v)
        steps = (length + 2 * POS - 1) // (2 * POS) * 2  # the consumers take turns
        for i_s in range(0, steps):
            e = i_s * POS
            wait_empty(q_empty, step, 2 * STAGES)
            s = step % (2 * STAGES)
            full = q_full.index(s)
            mbarrier.expect(full, 2 * POS * q_desc.block_type.nbytes)
            low = ((step % 2) * (2 * STAGES) + s // 2 * 2) * POS
            for i in gl.static_range(POS):
                t = gl.load(query_ids + start + gl.minimum(e + i, length - 1))
                copy_tile(q_desc, [t, i_r * G, 0], full, q_parts.index(low + i))
                copy_tile(q_desc, [t, i_r * G, HALF], full, q_parts.index(low + POS + i))
            step += 1
        block += 1


@gluon.jit(do_not_specialize=["n_items", "n_blocks", "n_rows"])  # other sizes compile nothing anew
def hopper_chunk_kernel(q_desc, k_desc, v_desc, out_desc, rows, starts, stops, query_ids, slots,
                        own_keys, first_keys, key_stops, tops, totals, places, table, factors,
                        scale, n_items, n_blocks, n_rows, stride_kp, stride_kt, stride_kh,
                        stride_vp, stride_vt, stride_vh, stride_ts, stride_tb, G: gl.constexpr,
                        HKV: gl.constexpr, TOP_K: gl.constexpr, PAGED: gl.constexpr,
                        SCALED: gl.constexpr, STAGES: gl.constexpr, BLOCKS: gl.constexpr,
                        MMA: gl.constexpr, S_MMA: gl.constexpr, FLAT: gl.constexpr,
                        DEEP: gl.constexpr, REGISTERS: gl.constexpr):  # fmt: skip
    """Items p, p + programs, ... of program p.

    Parameters:
        q_desc: descriptors of [Tq, Hq, 128], 16-bit, in tiles [1, G, 64]
        k_desc, v_desc: descriptors of [Tk, Hkv * 128], as q, in tiles of a block of one group; with
            PAGED of a `page_matrix`
        out_desc: descriptors of [Tq * Hkv * k * G, 128], as q, in tiles [G, 64]; the slots of the
            edges are written
        rows: [items], int32; the row of the reverse index: group * n_blocks + block
        starts, stops: [items], int64; the item's edges; items without an edge come last
        query_ids, slots: [edges], int32; query of an edge, place of the block in its selection
        own_keys: [Tq], int32; each query's own key among the packed keys
        first_keys, key_stops: [blocks], int32; a `block_table`
        tops: [Tq, Hkv, k, G], float32; highest score, not scaled, written as out
        totals: [Tq, Hkv, k, G], float32; sum of exp2(scale * (score - top)), written as out
        places: [2, blocks], int32; `block_places`, read with PAGED only
        table: [B, columns], int32 or int64; a sequence's pages in order, read with PAGED only
        factors: [pages, Hkv, 2], float32; of keys and of values, read with SCALED only
        scale: float; softmax scale times log2(e)
        n_items: int; items
        n_blocks: int; blocks of all sequences
        n_rows: int; rows of out_desc
        stride_kp, stride_kt, stride_kh: elements from one page, token, head of k to the next
        stride_vp, stride_vt, stride_vh: elements from one page, token, head of v to the next
        stride_ts, stride_tb: elements from one sequence, block of table to the next
        G, HKV: query heads of a group, groups
        TOP_K: k
        PAGED: bool; k and v are pages
        SCALED: bool; the pages have factors
        STAGES: tiles of 64 rows of q in the ring of a consumer
        BLOCKS: blocks in the rings of keys and values
        MMA: layout of half the outputs of a consumer, [64, 64]
        S_MMA: layout of its scores, [64, BK]
        FLAT: layout of half a tile of rows in shared memory, [64, 64]
        DEEP: the same memory as [64 / G, G, 64]
        REGISTERS: of a thread of the second consumer
    """
    BK: gl.constexpr = k_desc.block_type.shape[0]
    HALF: gl.constexpr = q_desc.block_type.shape[2]
    POS: gl.constexpr = MMA.instr_shape[0] * 4 // G
    q_parts = gl.allocate_shared_memory(q_desc.dtype, [4 * STAGES * POS, 1, G, HALF], DEEP)
    o_parts = gl.allocate_shared_memory(q_desc.dtype, [4 * POS, G, HALF], FLAT)
    tiles = (
        in_parts(q_parts, [4 * STAGES, POS * G, HALF], FLAT),
        in_parts(o_parts, [4, POS * G, HALF], FLAT),
        o_parts,
        gl.allocate_shared_memory(k_desc.dtype, [BLOCKS, BK, 2 * HALF], k_desc.layout),
        gl.allocate_shared_memory(v_desc.dtype, [BLOCKS, BK, 2 * HALF], v_desc.layout),
    )
    barriers = (
        make_barriers(2 * STAGES, 1), make_barriers(2 * STAGES, 1),
        make_barriers(BLOCKS, 1), make_barriers(BLOCKS, 2),
        make_barriers(BLOCKS, 1), make_barriers(BLOCKS, 2),
    )  # fmt: skip
    edges = (rows, starts, stops, query_ids, slots, own_keys, first_keys, key_stops)
    pages = (places, table, stride_ts, stride_tb, (stride_kp, stride_kt, stride_kh),
             (stride_vp, stride_vt, stride_vh), factors)  # fmt: skip
    gl.warp_specialize([
        (consume, (0, tiles, barriers, edges, pages, out_desc, tops, totals, scale, n_items,
                   n_blocks, n_rows, G, HKV, TOP_K, STAGES, BLOCKS, SCALED, MMA, S_MMA)),
        (consume, (1, tiles, barriers, edges, pages, out_desc, tops, totals, scale, n_items,
                   n_blocks, n_rows, G, HKV, TOP_K, STAGES, BLOCKS, SCALED, MMA, S_MMA)),
        (gather, (q_desc, k_desc, v_desc, q_parts, tiles, barriers, edges, pages, n_items, n_blocks,
                  G, STAGES, BLOCKS, PAGED)),
    ], [4, 1], [REGISTERS, 24])  # fmt: skip


# -- host -----------------------------------------------------------------------------------------
def describe_queries(q: Float[Tensor, "Tq Hq D"], group: int) -> TensorDescriptor:
    """Queries, to be copied as half the columns of all heads of a group."""
    q = q if can_describe(q, DIM) else q.clone(memory_format=torch.contiguous_format)
    return TensorDescriptor(q, list(q.shape), list(q.stride()), [1, group, HALF], DEEP)


def describe_rows(matrix: Float[Tensor, "rows D"], group: int) -> TensorDescriptor:
    """Slots as rows, to be written as half the columns of all heads of a group."""
    return TensorDescriptor(matrix, list(matrix.shape), [DIM, 1], [group, HALF], FLAT)


def fill_slots(
    q: Float[Tensor, "Tq Hq D"], k: Float[Tensor, "*where Hkv D"],
    v: Float[Tensor, "*where Hkv D"], schedule: Schedule, softmax_scale: float,
    pages: Pages | None = None, **changes: Any,
) -> Slots:  # fmt: skip
    """`triton_impl.partials.fill_slots` for arguments that `msa.kernel_choice` takes.

    The items without an edge have to come last, as those of `schedule_edges` do. With `pages`, k
    and v are pages that have a `page_matrix`; if these have factors, `widen_pages` made them.
    `changes` replace OPTIONS.
    """
    index = schedule.reverse_index
    heads, groups = q.shape[1], k.shape[-2]
    group = heads // groups
    slots = empty_slots(q, groups, index.top_k, DIM, index.counts)
    items = len(schedule.rows)
    if items:
        sequences, block = index.sequences, index.block_size
        matrix = slots.out.view(-1, DIM)
        places, table, factors, steps = schedule.rows, schedule.rows, slots.top, [0] * 8  # not read
        if pages is not None:
            places, table = block_places(sequences, block, q.device), pages.table
            steps = [x.stride(i) for x in (k, v) for i in range(3)] + list(table.stride())
            factors = slots.top if pages.k_scales is None else pages.k_scales
        descriptor = describe if pages is None else describe_pages
        hopper_chunk_kernel[(min(chips.current().multiprocessors, items),)](
            describe_queries(q, group), descriptor(k), descriptor(v), describe_rows(matrix, group),
            schedule.rows, schedule.starts, schedule.stops, index.query_ids, index.slots,
            query_table(sequences, block, q.device)[0], *block_table(sequences, block, q.device),
            slots.top, slots.total, places, table, factors, softmax_scale * LOG2E, items,
            sequences.cu_blocks(block)[-1], len(matrix), *steps, G=group, HKV=groups,
            TOP_K=index.top_k, PAGED=pages is not None,
            SCALED=pages is not None and pages.k_scales is not None, **(OPTIONS | changes),
            **EVERY_LAUNCH,
        )  # fmt: skip
    return slots
