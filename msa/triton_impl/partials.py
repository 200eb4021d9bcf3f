"""Lowering, third arrow: attention block by block, one partial result per edge (R15).

    for each work item (block of one group, edges start ... stop):          # KV-outer
        K, V = the block's keys and values
        for each edge (query t, slot s), for each head of the group:
            S = q[t, head] @ K^T, tokens after t's own key masked
            out[t, head, s] = softmax(softmax_scale * S) @ V
            top[t, head, s] = max S;  total[t, head, s] = sum exp(softmax_scale * (S - top))

What the fast form changes:
 1. K and V are loaded once per item and stay on chip.
 2. Query positions times heads make one tile: with 16 heads, 4 gathered queries are 64 rows. A
    query's heads lie side by side in memory, so the gather reads long runs.
 3. Edges ascend, so the item's first query alone decides whether any mask is needed.
 4. exp2 in place of exp: log2(e) is folded into the scale, which is multiplied on after the maximum
    is taken off (`online_softmax_step` says why).
 5. Every edge owns its slot: no atomics, and any order of the items gives the same bits.
 6. Keys and values may lie in the pages of a cache (`paged_keys.py`). Those of 8 bits are widened
    once for an item. The page's factors multiply the scores and the output, in float32.
 7. A slot keeps its highest score and its sum apart (`slot_weight` says why). Its LSE, which is
    softmax_scale * top + log(total), is computed only where the lowering shows it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from jaxtyping import Float

from msa.ir import Array, Partials, Schedule
from msa.triton_impl.combine import Slots
from msa.triton_impl.launch import contiguous, is_exact, pad, require_kernels
from msa.triton_impl.paged_keys import (
    Pages,
    key_offset,
    load_page,
    load_scale,
    page_arguments,
)
from msa.triton_impl.places import on_its_device
from msa.triton_impl.tables import block_places, block_table, query_table
from msa.triton_impl.tile_verbs import (
    LOG2E,
    LOWEST,
    along,
    load_item,
    load_keys,
    load_tile,
    online_softmax_step,
    store_tile,
)
from msa.triton_impl.tuning import TileConfig, choose


@triton.jit
def chunk_kernel(q, k, v, rows, starts, stops, query_ids, slots, own_keys, first_keys, key_stops,
                 places, table, k_scales, v_scales, stride_kp, stride_vp, stride_ts, stride_tb,
                 stride_ksp, stride_ksh, stride_vsp, stride_vsh, out, tops, totals, scale, n_blocks,
                 stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, G: tl.constexpr,
                 HEADS: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BD: tl.constexpr,
                 BDV: tl.constexpr, TOP_K: tl.constexpr, HQ: tl.constexpr, BK: tl.constexpr,
                 BN: tl.constexpr, BM: tl.constexpr, PAGED: tl.constexpr, SCALED: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """One item; BM = query positions x HEADS rows at a time.

    Parameters:
        q: [Tq, Hq, D], 16-bit or float32
        k: [Tk, Hkv, D], as q; with PAGED [pages, Bk, Hkv, D], as q or e4m3
        v: [Tk, Hkv, Dv], with PAGED [pages, Bk, Hkv, Dv], as k
        rows: [items], int32; the row of the reverse index: group * n_blocks + block
        starts, stops: [items], int64; the item's edges
        query_ids, slots: [edges], int32; query of an edge, place of the block in its selection
        own_keys: [Tq], int32; each query's own key among the packed keys
        first_keys, key_stops: [blocks], int32; a `block_table`
        places: [2, blocks], int32; `block_places`, read with PAGED only
        table: [B, columns], int32 or int64; a sequence's pages in order, read with PAGED only
        k_scales, v_scales: [pages, Hkv], float32; factors of the pages, read with SCALED only
        stride_kp, stride_vp: elements from one page of k, v to the next
        stride_ts, stride_tb: elements from one sequence, block of table to the next
        stride_ksp, stride_ksh: elements from one page, head of k_scales to the next
        stride_vsp, stride_vsh: elements from one page, head of v_scales to the next
        out: [Tq, Hq, k, Dv], as q; written in the slots of the edges
        tops: [Tq, Hq, k], float32; highest score, not scaled, written as out
        totals: [Tq, Hq, k], float32; sum of exp2(scale * (score - top)), written as out
        scale: float; softmax scale times log2(e)
        n_blocks: int; blocks of all sequences
        stride_qt, stride_kt, stride_vt: elements from one token of q, k, v to the next
        stride_qh, stride_kh, stride_vh: elements from one head of q, k, v to the next
        G, HQ: query heads of a group, of all groups
        HEADS: heads of one program
        DIM, DIM_V: D, Dv
        BD, BDV: D, Dv rounded up to powers of two
        TOP_K: k
        BK, BN: keys of a block, keys of one product
        BM: rows of one product
        PAGED: bool; k and v are pages
        SCALED: bool; pages have factors
        PRECISION: input precision of the products
    """
    i_item = tl.program_id(0)
    start, stop = tl.load(starts + i_item), tl.load(stops + i_item)
    if start < stop:
        i_r, first, key_stop = load_item(rows, first_keys, key_stops, n_blocks, i_item)
        o_d, o_dv, o_m = tl.arange(0, BD), tl.arange(0, BDV), tl.arange(0, BM)
        o_g = tl.program_id(1) * HEADS + o_m % HEADS  # [BM] head within its group
        o_h = i_r * G + o_g
        page = tl.full((), 0, tl.int64)
        if PAGED:
            i_b = tl.load(rows + i_item) % n_blocks
            p_table = table + along(tl.load(places + i_b), stride_ts)
            page = load_page(p_table, tl.load(places + n_blocks + i_b), stride_tb, PAGED)
        n_keys = key_stop - first  # keys of this block and of those behind it
        p_k = k + along(i_r, stride_kh) + key_offset(page, first, 0, stride_kp, stride_kt, PAGED)
        p_v = v + along(i_r, stride_vh) + key_offset(page, first, 0, stride_vp, stride_vt, PAGED)
        k_scale = load_scale(k_scales, page, i_r, stride_ksp, stride_ksh, SCALED)
        v_scale = load_scale(v_scales, page, i_r, stride_vsp, stride_vsh, SCALED)
        scale *= k_scale  # all scores of an item have the same factor
        KIND: tl.constexpr = q.dtype.element_ty
        p_h = q + along(o_h, stride_qh)  # [BM]
        if BN == BK:
            b_k = load_keys(p_k, 0, n_keys, stride_kt, o_d, DIM, BK).to(KIND)  # [BK, BD]
            b_v = load_keys(p_v, 0, n_keys, stride_vt, o_dv, DIM_V, BK).to(KIND)  # [BK, BDV]
        masked = tl.load(own_keys + tl.load(query_ids + start)) < first + BK - 1
        length = (stop - start).to(tl.int32)
        for i_e in range(0, length, BM // HEADS):
            o_e = i_e + o_m // HEADS  # [BM] edge
            m_e = o_e < length
            b_t = tl.load(query_ids + start + o_e, mask=m_e, other=0)
            b_slot = tl.load(slots + start + o_e, mask=m_e, other=0)
            b_own = tl.load(own_keys + b_t, mask=m_e, other=0)
            m_m = m_e & (o_g < G)
            b_q = load_tile(p_h + along(b_t, stride_qt), m_m, o_d, DIM)  # [BM, BD]
            p_o = (b_t.to(tl.int64) * HQ + o_h) * TOP_K + b_slot  # [BM]
            if BN == BK:
                b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BK]
                if masked:
                    o_n = first + tl.arange(0, BK)
                    b_s = tl.where(o_n[None, :] <= b_own[:, None], b_s, float("-inf"))
                b_top = tl.maximum(tl.max(b_s, 1), LOWEST)  # [BM]
                b_p = tl.exp2((b_s - b_top[:, None]) * scale)
                b_sum = tl.sum(b_p, 1)
                b_o = tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)
            else:
                b_top = tl.full([BM], LOWEST, tl.float32)
                b_sum = tl.zeros([BM], tl.float32)
                b_o = tl.zeros([BM, BDV], tl.float32)
                for i_n in range(0, BK, BN):
                    b_kn = load_keys(p_k, i_n, n_keys, stride_kt, o_d, DIM, BN).to(KIND)
                    b_vn = load_keys(p_v, i_n, n_keys, stride_vt, o_dv, DIM_V, BN).to(KIND)
                    b_s = tl.dot(b_q, tl.trans(b_kn), input_precision=PRECISION)  # [BM, BN]
                    o_n = first + i_n + tl.arange(0, BN)
                    b_s = tl.where(o_n[None, :] <= b_own[:, None], b_s, float("-inf"))
                    b_top, b_sum, b_p, b_decay = online_softmax_step(b_s, b_top, b_sum, scale)
                    b_o = b_o * b_decay[:, None]
                    b_o += tl.dot(b_p.to(b_vn.dtype), b_vn, input_precision=PRECISION)
            if SCALED:
                b_o *= v_scale
                b_top = tl.maximum(b_top * k_scale, LOWEST)
            b_o = b_o / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]  # 0 if all scores are -inf
            store_tile(out + p_o * DIM_V, m_m, o_dv, b_o, DIM_V)
            tl.store(tops + p_o, b_top, mask=m_m)
            tl.store(totals + p_o, b_sum, mask=m_m)


def fill_slots(
    q: Float[Array, "Tq Hq D"], k: Float[Array, "*where Hkv D"], v: Float[Array, "*where Hkv Dv"],
    schedule: Schedule, softmax_scale: float, tile: TileConfig | None = None,
    pages: Pages | None = None,
) -> Slots:  # fmt: skip
    """For every edge and head the block-local softmax in its slot, for a contiguous schedule.

    out has q's dtype; slots that no edge owns are not written. With `pages`, k and v are pages.
    """
    index = schedule.reverse_index
    (n_q, heads, dim), groups, dim_v = q.shape, k.shape[-2], v.shape[-1]
    group = heads // groups
    out = torch.empty((n_q, heads, index.top_k, dim_v), dtype=q.dtype, device=q.device)
    tops, totals = (
        torch.empty((n_q, heads, index.top_k), dtype=torch.float32, device=q.device)
        for _ in range(2)
    )
    items = len(schedule.rows)
    if items:
        tile = tile or choose("chunks", q.dtype, max(pad(dim), pad(dim_v)), index.block_size)
        some = min(pad(group, 1), 128)  # heads of one program
        sequences, block = index.sequences, index.block_size
        own = query_table(sequences, block, q.device)[0]
        first_keys, key_stops = block_table(sequences, block, q.device)
        places = own if pages is None else block_places(sequences, block, q.device)
        chunk_kernel[items, triton.cdiv(group, some)](
            q, k, v, schedule.rows, schedule.starts, schedule.stops, index.query_ids, index.slots,
            own, first_keys, key_stops, places, *page_arguments(pages, k, v), out, tops, totals,
            softmax_scale * LOG2E.value, sequences.cu_blocks(block)[-1], *q.stride()[:2],
            *k.stride()[-3:-1], *v.stride()[-3:-1],
            G=group, HEADS=some, DIM=dim, DIM_V=dim_v, BD=pad(dim), BDV=pad(dim_v),
            TOP_K=index.top_k, HQ=heads, BK=block, BN=tile.keys, BM=max(tile.rows, some),
            PAGED=pages is not None, SCALED=pages is not None and pages.k_scales is not None,
            PRECISION=is_exact(q), **tile.launch(),
        )  # fmt: skip
    return Slots(out, tops, totals, index.counts)


@on_its_device
def attend_chunks(
    q: Float[Array, "Tq Hq D"], k: Float[Array, "Tk Hkv D"], v: Float[Array, "Tk Hkv Dv"],
    schedule: Schedule, softmax_scale: float,
) -> Partials:  # fmt: skip
    """For every edge and head the block-local softmax output and its LSE, in its slot (R15).

    out has q's dtype. lse is float64, so that the logarithm of a block's sum is not lost beside
    large logits. Slots that no edge owns hold anything.
    """
    index = contiguous(schedule.reverse_index)
    require_kernels(index.block_size, index.top_k, q=q, k=k, v=v)
    slots = fill_slots(q, k, v, replace(contiguous(schedule), reverse_index=index), softmax_scale)
    assert slots.total is not None
    lse = softmax_scale * slots.top.double() + slots.total.double().log()
    return Partials(slots.out, lse, slots.counts)
