"""Decoding, second kernel: select from the scores, attend to the selected pages (R6-R10).

    for each new query and group:
        ids = select(scores)                                     # as in `block_topk`
        for each selected block b:
            S = softmax_scale * q @ page_table[b]'s keys^T, tokens after the query masked
            m, l, o = online softmax step(S, values)
        out, lse = o / l, m + log l

What the fast form changes:
 1. A step has few rows, so the selected blocks of a row are cut among programs. Each program writes
    a partial result to its own slot. The program that arrives last adds up all slots in their order
    (R16): which program is last changes no bit (R19), and no second launch is needed.
 2. Each of these programs selects the blocks of its row again, from scores that lie in L2 (see
    `page_topk`). This takes 2 us at a million tokens; a separate launch would take as long, and the
    programs would have to wait for it. The search compares all pairs of some maxima, so for more
    than MOST_PLACES places the kernel of `block_topk` selects first, once for each row.
 3. As in `page_scores`, lengths are read on the device.
"""

from __future__ import annotations

from math import isqrt

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from msa.config import MSAConfig
from msa.ir import PagedKV
from msa.triton_impl.block_topk import select_rows
from msa.triton_impl.dependent_launch import dependent_launch, wait_for_previous
from msa.triton_impl.launch import is_exact, pad
from msa.triton_impl.page_topk import best_of_scores
from msa.triton_impl.tile_verbs import (
    LN2,
    LOG2E,
    LOWEST,
    along,
    load_tile,
    online_softmax_step,
    slot_weight,
    store_tile,
    table_row,
    wait_for_threads,
)
from msa.triton_impl.tuning import TileConfig, choose

STEP = 64
"""Blocks of each piece that are held in registers at a time."""
WIDE = 2**12
"""Rows of so many scores or more get fewer splits, because every split reads the whole row, and
more warps."""
MANY = 264
"""With more places of rows than this, two for each multiprocessor, programs have several blocks
each, and two small programs to a multiprocessor are faster than one large one."""
MOST_PLACES = 128
"""Most places for which each program selects by itself; for more, another kernel selects before."""


@triton.jit
def selected_block(o_b, m_best, b_rank, i_j, n_first, n_kept, recent, own):
    """The block in place i_j of the selection, or -1: first blocks, the best, recent blocks.

    o_b, m_best, b_rank: ids of candidates, which of them are the best, and their ranks from 1 on;
    n_first: forced first blocks; n_kept: these and the best; recent: the first recent block; own:
    the query's own block, which is the last recent one.
    """
    i_b = tl.sum(tl.where(m_best & (b_rank == i_j - n_first + 1), o_b, 0))
    i_b = tl.where(i_j < n_kept, i_b, recent + i_j - n_kept)
    return tl.where(i_j < n_first, i_j, tl.where(i_b <= own, i_b, -1))


@triton.jit
def add_up(parts, part_tops, part_totals, o_x, m_x, scale, DIM_V: tl.constexpr, BDV: tl.constexpr,
           SPLITS: tl.constexpr):  # fmt: skip
    """The weighted mean of the parts of rows o_x [R], their highest score and their sum (R16)."""
    o_dv = tl.arange(0, BDV)
    o_s = tl.arange(0, SPLITS)[None, :]
    p_s = o_x[:, None] * SPLITS + o_s
    b_tops = tl.load(part_tops + p_s, mask=m_x[:, None], other=0.0)
    b_totals = tl.load(part_totals + p_s, mask=m_x[:, None], other=0.0)
    b_top = tl.max(b_tops, 1)  # [R]
    b_weights = slot_weight(b_tops, b_totals, b_top[:, None], scale)  # [R, SPLITS]
    b_sum = tl.sum(b_weights, 1)
    p_x = parts + o_x * (SPLITS * DIM_V)
    b_o = tl.zeros([o_x.shape[0], BDV], tl.float32)
    for i in tl.static_range(SPLITS):  # all loads at once
        b_w = tl.sum(tl.where(o_s == i, b_weights, 0.0), 1)
        b_o += b_w[:, None] * load_tile(p_x + i * DIM_V, m_x, o_dv, DIM_V).to(tl.float32)
    return b_o / b_sum[:, None], b_top, b_sum


@triton.jit
def page_attend_kernel(q, k, v, k_scales, v_scales, table, rows, lengths, scores, ids, parts,
                       part_tops, part_totals, arrivals, out, lse, scale, stride_qb, stride_qn,
                       stride_qh, stride_kp, stride_kt, stride_kh, stride_vp, stride_vt, stride_vh,
                       stride_ts, stride_tb, stride_ls, stride_ksp, stride_ksh, stride_vsp,
                       stride_vsh, N: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr,
                       HEADS: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
                       BD: tl.constexpr, BDV: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
                       TOP_K: tl.constexpr, P: tl.constexpr, SINK: tl.constexpr,
                       LOCAL: tl.constexpr, PLACES: tl.constexpr, PIECES: tl.constexpr,
                       LENGTH: tl.constexpr, STEP: tl.constexpr, PP: tl.constexpr,
                       SPLITS: tl.constexpr, KNOWN: tl.constexpr, EIGHT: tl.constexpr,
                       NAMED: tl.constexpr, PDL: tl.constexpr,
                       PRECISION: tl.constexpr):  # fmt: skip
    """HEADS heads of one query and group, and every SPLITS-th part of its selected blocks.

    Parameters:
        q: [B, n, Hq, D], 16-bit or float32
        k: [pages, Bk, Hkv, D], as q or e4m3
        v: [pages, Bk, Hkv, Dv], as k
        k_scales, v_scales: [pages, Hkv], float32; factors of the pages, read with EIGHT only
        table: [B, columns], int32 or int64; a sequence's pages in order. With NAMED [any, columns]
        rows: [B], int32 or int64; the row of table of each sequence, read with NAMED only
        lengths: [B], int32 or int64; tokens of a sequence, 0 for an empty slot of the batch
        scores: [B, n, Hkv, PIECES * LENGTH], float32; read unless KNOWN
        ids: [B, n, Hkv, k], int32; the selection, read with KNOWN, else written
        parts: [B, n, Hq, SPLITS, Dv], as q; partial outputs, written and read if SPLITS > 1
        part_tops: [B, n, Hq, SPLITS], float32; highest scores, not scaled, as parts
        part_totals: [B, n, Hq, SPLITS], float32; sums of exp2(scale * (score - top)), as parts
        arrivals: [B, n * Hkv * tiles of heads], int32; counters, 0 before the launch
        out: [B, n, Hq, Dv], as q; written
        lse: [B, n, Hq], float32, natural logarithm; written
        scale: float; softmax scale times log2(e)
        stride_qb, stride_qn, stride_qh: elements from one sequence, query, head of q to the next
        stride_kp, stride_kt, stride_kh: elements from one page, token, head of k to the next
        stride_vp, stride_vt, stride_vh: elements from one page, token, head of v to the next
        stride_ts, stride_tb: elements from one sequence, block of table to the next
        stride_ls: elements from one sequence of lengths to the next
        stride_ksp, stride_ksh: elements from one page, head of k_scales to the next
        stride_vsp, stride_vsh: elements from one page, head of v_scales to the next
        N, HKV, G: new queries of a sequence, groups, query heads of a group
        HEADS: heads of one program
        DIM, DIM_V: D, Dv
        BD, BDV: D, Dv rounded up to powers of two
        BK, BN: keys of a block, keys of one product
        TOP_K, P: k, and rounded up to a power of two
        SINK, LOCAL: forced first and recent blocks
        PLACES, PP: places for blocks that are not forced, and rounded up to a power of two
        PIECES, LENGTH, STEP: see `best_of_scores`
        SPLITS: programs that share the blocks of a row
        KNOWN: bool; the selection is in ids already
        EIGHT: bool; pages have factors
        NAMED: bool; rows says which rows of the table to read
        PDL: bool; see `wait_for_previous`
        PRECISION: input precision of the products
    """
    i_x, i_c, i_h = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_q, i_r = i_x // HKV, i_x % HKV
    i_s, i_n = i_q // N, i_q % N
    o_j, o_n = tl.arange(0, P), tl.arange(0, BN)
    o_d, o_dv = tl.arange(0, BD), tl.arange(0, BDV)
    o_g = i_h * HEADS + tl.arange(0, HEADS)  # [HEADS] head within the group
    m_g, o_h = o_g < G, i_r * G + o_g
    o_x = i_q.to(tl.int64) * (HKV * G) + o_h  # [HEADS] row of out
    p_out = out + o_x * DIM_V
    p_id = ids + i_x.to(tl.int64) * TOP_K
    position = tl.load(lengths + along(i_s, stride_ls)).to(tl.int32) - N + i_n
    p_q = q + along(i_s, stride_qb) + along(i_n, stride_qn) + along(o_h, stride_qh)  # [HEADS]
    b_q = load_tile(p_q, m_g, o_d, DIM)  # [HEADS, BD]
    wait_for_previous(PDL)
    if position < 0:  # an empty slot of the batch
        if i_c == 0:
            store_tile(p_out, m_g, o_dv, tl.zeros([HEADS, BDV], tl.float32), DIM_V)
            tl.store(lse + o_x, tl.full([HEADS], float("-inf"), tl.float32), mask=m_g)
            if not KNOWN:
                tl.store(p_id + o_j, tl.full([P], -1, tl.int32), mask=o_j < TOP_K)
    else:
        own = position // BK
        n_first = tl.minimum(own + 1, SINK)  # forced first blocks
        recent = tl.maximum(own - LOCAL + 1, SINK)  # first of the forced recent blocks
        if not KNOWN:
            p_score = scores + i_x.to(tl.int64) * (PIECES * LENGTH)
            o_b, m_best = best_of_scores(p_score, SINK, recent, PLACES, PP, PIECES, LENGTH, STEP)
            b_count = tl.sum(m_best.to(tl.int32), 1)  # [PP]
            n_kept = n_first + tl.sum(b_count, 0)
            b_rank = tl.cumsum(m_best.to(tl.int32), 1) + (tl.cumsum(b_count, 0) - b_count)[:, None]
        p_k, p_v = k + along(i_r, stride_kh), v + along(i_r, stride_vh)
        p_k_scale, p_v_scale = k_scales + along(i_r, stride_ksh), v_scales + along(i_r, stride_vsh)
        p_table = table + along(table_row(rows, i_s, NAMED), stride_ts)
        o_nk, o_nv = along(o_n, stride_kt), along(o_n, stride_vt)  # [BN]
        b_top = tl.full([HEADS], LOWEST, tl.float32)
        b_sum = tl.zeros([HEADS], tl.float32)
        b_o = tl.zeros([HEADS, BDV], tl.float32)
        STEPS: tl.constexpr = BK // BN  # products per block
        for i in range(i_c * (P // SPLITS) * STEPS, (i_c + 1) * (P // SPLITS) * STEPS):
            i_j = i // STEPS  # place in the selection
            if KNOWN:
                i_b = tl.load(p_id + i_j, mask=i_j < TOP_K, other=-1)
            else:
                i_b = selected_block(o_b, m_best, b_rank, i_j, n_first, n_kept, recent, own)
            m_page = (i_b >= 0) & (i_j < TOP_K)
            page = tl.load(p_table + along(i_b, stride_tb), mask=m_page, other=0)
            i_t = (i % STEPS) * BN
            m_n = i_t + o_n < tl.where(m_page, position + 1 - i_b * BK, 0)  # [BN] visible tokens
            p_n = p_k + along(page, stride_kp) + along(i_t, stride_kt) + o_nk
            b_k = load_tile(p_n, m_n, o_d, DIM)  # [BN, BD]
            p_n = p_v + along(page, stride_vp) + along(i_t, stride_vt) + o_nv
            b_v = load_tile(p_n, m_n, o_dv, DIM_V)  # [BN, BDV]
            b_s = tl.dot(b_q, tl.trans(b_k.to(b_q.dtype)), input_precision=PRECISION)
            if EIGHT:
                b_s *= tl.load(p_k_scale + along(page, stride_ksp))
            b_s = tl.where(m_n[None, :], b_s, float("-inf"))  # [HEADS, BN]
            b_top, b_sum, b_p, b_decay = online_softmax_step(b_s, b_top, b_sum, scale)
            b_pv = tl.dot(b_p.to(b_q.dtype), b_v.to(b_q.dtype), input_precision=PRECISION)
            if EIGHT:
                b_pv *= tl.load(p_v_scale + along(page, stride_vsp))
            b_o = b_o * b_decay[:, None] + b_pv
            if not KNOWN:
                i_out = n_first + tl.sum((m_best & (o_b < i_b)).to(tl.int32))  # place by id (R8)
                i_out = tl.where((i_j < n_first) | (i_j >= n_kept), i_j, i_out)
                tl.store(p_id + i_out, i_b, mask=i_j < TOP_K)
        b_lse = b_top * (scale * LN2) + tl.log(b_sum)  # natural logarithm; -inf without a token
        if SPLITS == 1:
            store_tile(p_out, m_g, o_dv, b_o / b_sum[:, None], DIM_V)
            tl.store(lse + o_x, b_lse, mask=m_g)
        else:
            b_o = b_o / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
            store_tile(parts + (o_x * SPLITS + i_c) * DIM_V, m_g, o_dv, b_o, DIM_V)
            tl.store(part_tops + o_x * SPLITS + i_c, b_top, mask=m_g)
            tl.store(part_totals + o_x * SPLITS + i_c, b_sum, mask=m_g)
            wait_for_threads()  # all of the part is written before the arrival is counted
            p_arrival = arrivals + i_x.to(tl.int64) * tl.num_programs(2) + i_h
            if tl.atomic_add(p_arrival, 1, sem="acq_rel") == SPLITS - 1:
                b_o, b_top, b_sum = add_up(parts, part_tops, part_totals, o_x, m_g, scale, DIM_V,
                                           BDV, SPLITS)  # fmt: skip
                store_tile(p_out, m_g, o_dv, b_o, DIM_V)
                tl.store(lse + o_x, b_top * (scale * LN2) + tl.log(b_sum), mask=m_g)


def attend_pages(
    q: Float[Tensor, "B n Hq D"],
    cache: PagedKV, config: MSAConfig, scores: Float[Tensor, "B n Hkv width"] | None,
    arrivals: Int[Tensor, "B programs"], tile: TileConfig | None = None,
    given: Int[Tensor, "B n Hkv k"] | None = None, out: Float[Tensor, "B n Hq Dv"] | None = None,
    ids: Int[Tensor, "B n Hkv k"] | None = None, rows: Int[Tensor, " B"] | None = None,
) -> tuple[
    Float[Tensor, "B n Hq Dv"], Float[Tensor, "B n Hq"], Int[Tensor, "B n Hkv k"]
]:  # fmt: skip
    """out in q's dtype, lse float32, and the selected ids: 0, -inf and -1 for an empty slot.

    Args:
        scores: None where `given` says the ids; then arrivals have to be 0.
        given: contiguous ids to attend to, in any order, -1 for no block.
        out, ids: contiguous memory for the results; None makes it. No ids are written with `given`.
        rows: the row of the table of each sequence; None means that row s is that of sequence s.
    """
    (batch, n, heads, dim), (_, block, groups, dim_v) = q.shape, cache.v_pages.shape
    group, count, device = heads // groups, batch * n * groups, q.device
    if out is None:
        out = torch.empty((batch, n, heads, dim_v), dtype=q.dtype, device=device)
    lse = torch.empty((batch, n, heads), dtype=torch.float32, device=device)
    places, top_k = config.top_k - config.forced_blocks, config.top_k
    if given is None and places > MOST_PLACES:
        assert scores is not None
        given = best_pages(cache, config, scores, ids)
    if given is not None:
        ids, places, top_k, width = given, 1, given.shape[-1], 32  # nothing is left to select
    else:
        assert scores is not None
        width = scores.shape[-1]
        if ids is None:
            ids = torch.empty((batch, n, groups, top_k), dtype=torch.int32, device=device)
    some, slots = head_tile(group), pad(top_k, 2)
    tiles = triton.cdiv(group, some)
    if tile is None:
        kernel = "wide_paged" if width >= WIDE else "paged"
        kernel = "many_paged" if count * tiles * slots > MANY else kernel
        tile = choose(kernel, q.dtype, max(pad(dim), pad(dim_v)), block)
    splits = splits_of(count * tiles, slots if width < WIDE else max(1, slots // 2), tile.programs)
    parts = torch.empty((count * group, splits, dim_v), dtype=q.dtype, device=device)
    tops, totals = torch.empty((2, count * group, splits), dtype=torch.float32, device=device)
    pieces = min(width, pad(isqrt(width), max(64, pad(places))))
    if count:
        eight = cache.k_scales is not None
        unread = out[0, 0]  # where there are no scales
        scales = (cache.k_scales, cache.v_scales) if eight else (unread, unread)
        launch = tile.launch() | {"num_stages": min(tile.stages, 1 + slots // splits)}
        page_attend_kernel[count, splits, tiles](
            q, cache.k_pages, cache.v_pages, *scales, cache.page_table,
            cache.lengths if rows is None else rows, cache.lengths,
            ids if scores is None else scores, ids, parts, tops, totals, arrivals, out, lse,
            config.softmax_scale_for(dim) * LOG2E.value,
            *q.stride()[:3], *cache.k_pages.stride()[:3], *cache.v_pages.stride()[:3],
            *cache.page_table.stride(), cache.lengths.stride(0), *scales[0].stride(),
            *scales[1].stride(), G=group, HEADS=some, DIM=dim, DIM_V=dim_v, BD=pad(dim),
            BDV=pad(dim_v), BK=block, BN=tile.keys, N=n, HKV=groups, TOP_K=top_k, P=slots,
            SINK=config.sink_blocks, LOCAL=config.local_blocks, PLACES=places, PP=pad(places, 1),
            PIECES=pieces, LENGTH=width // pieces, STEP=min(width // pieces, STEP), SPLITS=splits,
            KNOWN=given is not None, EIGHT=eight, NAMED=rows is not None, PRECISION=is_exact(q),
            **dependent_launch(device), **launch,
        )  # fmt: skip
    return out, lse, ids


def best_pages(
    cache: PagedKV, config: MSAConfig, scores: Float[Tensor, "B n Hkv width"],
    into: Int[Tensor, "B n Hkv k"] | None = None,
) -> Int[Tensor, "B n Hkv k"]:  # fmt: skip
    """The selected ids of each row, by the kernel of `block_topk`; -1 for an empty slot."""
    batch, n, groups, width = scores.shape
    new = torch.arange(n, dtype=torch.int32, device=scores.device) - n
    positions = (cache.lengths[:, None] + new).int().flatten()
    block = cache.k_pages.shape[1]
    ids = select_rows(scores.view(batch * n, groups, width), positions, block, config)
    ids.masked_fill_((positions < 0)[:, None, None], -1)
    ids = ids.view(batch, n, groups, config.top_k)
    return ids if into is None else into.copy_(ids)


def head_tile(group: int) -> int:
    """Heads of one program."""
    return min(pad(group), 64)


def splits_of(programs: int, most: int, wanted: int) -> int:
    """How many programs share the selected blocks of a row, so that there are about `wanted`.

    >>> splits_of(4, 16, 132), splits_of(32, 16, 132), splits_of(500, 16, 132)
    (16, 4, 1)
    """
    return min(most, 1 << (max(wanted // max(programs, 1), 1).bit_length() - 1))
