"""Decoding, second kernel: select from the scores, attend to the selected pages (R6-R10).

    for each new query and group:
        ids = select(scores)                                     # as in `block_topk`
        for each selected block b:
            S = softmax_scale * q @ page_table[b]'s keys^T, tokens after the query masked
            m, l, o = online softmax step(S, values)
        out, lse = o / l, m + log l

What the fast form changes:
 1. The selected blocks of a row are cut among programs, for a step has few rows. Each leaves a
    partial result in a slot of its own; the program that arrives last adds up all of them in the
    order of their slots (R16), so who is last changes no bit (R19), and one launch is saved.
 2. Each of these programs selects for itself, from scores that lie in L2: two microseconds at a
    million tokens, where a launch costs as much and a wait. It compares all pairs of some maxima,
    so beyond MOST_PLACES places the kernel of `block_topk` selects before, once for each row.
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
from msa.triton_impl.early import early_launch, wait_for_others
from msa.triton_impl.tiles import (
    LN2,
    LOG2E,
    LOWEST,
    NO_BLOCK,
    NO_SCORE,
    along,
    is_exact,
    pad,
    score_key,
)
from msa.triton_impl.tuning import TileConfig, choose

STEP = 64
"""Blocks of each piece that are held in registers at a time."""
WIDE = 2**12
"""From so many blocks on a row of scores is worth fewer splits: each of them reads it whole."""
MOST_PLACES = 128
"""Places for which a program selects by itself."""
HIGHEST_RANK = tl.constexpr(2**63 - 1)


@triton.jit
def ranked(b_score, o_b, m_b):
    """Scores and block ids as one integer each: higher score first, then lower id (R7); unique."""
    b_key = tl.where(m_b, score_key(b_score), NO_SCORE)
    return (b_key.to(tl.int64) << 32) | (NO_BLOCK - o_b)


@triton.jit
def best_of_scores(p_score, first, stop, PLACES: tl.constexpr, PP: tl.constexpr,
                   PIECES: tl.constexpr, LENGTH: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    """The best PLACES of the blocks first ... stop: some candidates' ids, and which are chosen.

    Both [PP, LENGTH]. A row is looked at by one program, which has nothing else to do meanwhile, so
    what counts is the number of reductions one after the other, not the work:
     1. Every PIECES-th block makes a piece. The best PLACES blocks lie in the PLACES pieces whose
        maxima are best, found by comparing all pairs of maxima at once. Only these are looked at
        again.
     2. The least of these maxima is reached by the best PLACES blocks and few others. Up to four of
        these are taken off one by one; if there are more, bisection ends it.
    """
    o_p, o_l = tl.arange(0, PIECES), tl.arange(0, STEP)
    b_top = tl.full([PIECES], float("-inf"), tl.float32)
    b_id = tl.full([PIECES], NO_BLOCK, tl.int32)  # the first block that has the maximum
    for i in range(0, LENGTH, STEP):
        o_b = (i + o_l)[:, None] * PIECES + o_p[None, :]
        m_b = (o_b >= first) & (o_b < stop)
        b_x = tl.load(p_score + o_b)
        b_x = tl.where(m_b & (b_x == b_x), b_x, float("-inf"))
        b_max = tl.max(b_x, 0)
        b_at = tl.min(tl.where(m_b & (b_x == b_max[None, :]), o_b, NO_BLOCK), 0)
        m_new = (b_max > b_top) | (b_id == NO_BLOCK)
        b_top, b_id = tl.where(m_new, b_max, b_top), tl.where(m_new, b_at, b_id)
    m_p = b_id < NO_BLOCK
    b_best = ranked(b_top, tl.where(m_p, b_id, o_p), m_p)
    b_above = tl.sum((b_best[None, :] > b_best[:, None]).to(tl.int32), 1)  # [PIECES]
    o_x = tl.arange(0, PP)
    b_piece = tl.sum(tl.where(b_above[None, :] == o_x[:, None], o_p[None, :], 0), 1)  # [PP]
    low = tl.min(tl.where(b_above < PLACES, b_best, HIGHEST_RANK), 0)
    high = tl.max(b_best, 0)

    o_b = tl.arange(0, LENGTH)[None, :] * PIECES + b_piece[:, None]  # [PP, LENGTH]
    m_b = (o_b >= first) & (o_b < stop) & (o_x < min(PLACES, PIECES))[:, None]
    b_x = ranked(tl.load(p_score + o_b), o_b, m_b)
    n = tl.sum((m_b & (b_x >= low)).to(tl.int32))
    tries = 0
    while n > PLACES:
        if tries < 4:
            low = tl.min(tl.where(b_x > low, b_x, HIGHEST_RANK))
            n -= 1
        else:
            middle = (low | high) - ((low ^ high) >> 1)  # mean, rounded up, cannot overflow
            n_middle = tl.sum((b_x >= middle).to(tl.int32))
            low = tl.where(n_middle >= PLACES, middle, low)
            n = tl.where(n_middle >= PLACES, n_middle, n)
            high = tl.where(n_middle >= PLACES, high, middle - 1)
        tries += 1
    return o_b, m_b & (b_x >= low)


@triton.jit
def add_up(parts, part_lses, o_x, m_x, DIM_V: tl.constexpr, BDV: tl.constexpr,
           SPLITS: tl.constexpr):  # fmt: skip
    """The LSE-weighted mean of the partial results of rows o_x [R], and their total LSE (R16)."""
    o_dv = tl.arange(0, BDV)
    b_lse = tl.load(part_lses + o_x[:, None] * SPLITS + tl.arange(0, SPLITS)[None, :],
                    mask=m_x[:, None], other=0.0)  # fmt: skip
    b_top = tl.max(b_lse, 1)  # [R]
    b_top = tl.where(b_top == float("-inf"), 0.0, b_top)
    b_sum = tl.sum(tl.exp(b_lse - b_top[:, None]), 1)
    p_x = parts + o_x[:, None] * (SPLITS * DIM_V) + o_dv[None, :]
    m_part = m_x[:, None] & (o_dv < DIM_V)[None, :]
    b_o = tl.zeros(p_x.shape, tl.float32)
    for i in tl.static_range(SPLITS):  # all loads at once
        b_w = tl.exp(tl.load(part_lses + o_x * SPLITS + i, mask=m_x, other=0.0) - b_top)
        b_o += b_w[:, None] * tl.load(p_x + i * DIM_V, mask=m_part, other=0.0).to(tl.float32)
    return b_o / b_sum[:, None], b_top + tl.log(b_sum)


@triton.jit
def page_attend_kernel(q, k, v, k_scales, v_scales, table, lengths, scores, ids, parts, part_lses,
                       arrivals, out, lse, scale, stride_qb, stride_qn, stride_qh,
                       stride_kp, stride_kt, stride_kh, stride_vp, stride_vt, stride_vh,
                       stride_ts, stride_tb, stride_ls, stride_ksp, stride_ksh, stride_vsp,
                       stride_vsh, N: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr,
                       HEADS: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
                       BD: tl.constexpr, BDV: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
                       TOP_K: tl.constexpr, P: tl.constexpr, SINK: tl.constexpr,
                       LOCAL: tl.constexpr, PLACES: tl.constexpr, PIECES: tl.constexpr,
                       LENGTH: tl.constexpr, STEP: tl.constexpr, PP: tl.constexpr,
                       SPLITS: tl.constexpr, KNOWN: tl.constexpr, EIGHT: tl.constexpr,
                       EARLY: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """HEADS heads of one query and group, and every SPLITS-th part of its selected blocks."""
    i_x, i_c, i_h = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_q, i_r = i_x // HKV, i_x % HKV
    i_s, i_n = i_q // N, i_q % N
    o_j, o_n = tl.arange(0, P), tl.arange(0, BN)
    o_d, o_dv = tl.arange(0, BD), tl.arange(0, BDV)
    o_g = i_h * HEADS + tl.arange(0, HEADS)  # [HEADS] head within the group
    m_g, o_h = o_g < G, i_r * G + o_g
    o_x = i_q.to(tl.int64) * (HKV * G) + o_h  # [HEADS] row of out
    m_o = m_g[:, None] & (o_dv < DIM_V)[None, :]
    p_out = out + o_x[:, None] * DIM_V + o_dv[None, :]
    p_id = ids + i_x.to(tl.int64) * TOP_K
    position = tl.load(lengths + along(i_s, stride_ls)).to(tl.int32) - N + i_n
    p_q = q + along(i_s, stride_qb) + along(i_n, stride_qn) + along(o_h, stride_qh)  # [HEADS]
    b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_g[:, None] & (o_d < DIM)[None, :], other=0.0)
    wait_for_others(EARLY)
    if position < 0:  # an empty slot of the batch
        if i_c == 0:
            tl.store(p_out, tl.zeros([HEADS, BDV], out.dtype.element_ty), mask=m_o)
            tl.store(lse + o_x, tl.full([HEADS], float("-inf"), tl.float32), mask=m_g)
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
        p_table = table + along(i_s, stride_ts)
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
                i_b = tl.sum(tl.where(m_best & (b_rank == i_j - n_first + 1), o_b, 0))
                i_b = tl.where(i_j < n_kept, i_b, recent + i_j - n_kept)
                i_b = tl.where(i_j < n_first, i_j, tl.where(i_b <= own, i_b, -1))
            m_page = (i_b >= 0) & (i_j < TOP_K)
            page = tl.load(p_table + along(i_b, stride_tb), mask=m_page, other=0)
            i_t = (i % STEPS) * BN
            o_t = i_t + o_n  # [BN] token of the page
            m_n = o_t < tl.where(m_page, position + 1 - i_b * BK, 0)
            p_n = p_k + along(page, stride_kp) + along(i_t, stride_kt) + o_nk
            b_k = tl.load(p_n[:, None] + o_d[None, :],
                          mask=m_n[:, None] & (o_d < DIM)[None, :], other=0.0)  # fmt: skip
            p_n = p_v + along(page, stride_vp) + along(i_t, stride_vt) + o_nv
            b_v = tl.load(p_n[:, None] + o_dv[None, :],
                          mask=m_n[:, None] & (o_dv < DIM_V)[None, :], other=0.0)  # fmt: skip
            b_s = tl.dot(b_q, tl.trans(b_k.to(b_q.dtype)), input_precision=PRECISION)
            if EIGHT:
                b_s *= tl.load(p_k_scale + along(page, stride_ksp))
            b_s = tl.where(m_n[None, :], b_s, float("-inf"))  # [HEADS, BN]
            b_new = tl.maximum(b_top, tl.max(b_s, 1))
            b_p = tl.exp2((b_s - b_new[:, None]) * scale)
            b_decay = tl.exp2((b_top - b_new) * scale)
            b_top = b_new
            b_sum = b_sum * b_decay + tl.sum(b_p, 1)
            b_v = b_v.to(b_q.dtype)
            b_pv = tl.dot(b_p.to(b_q.dtype), b_v, input_precision=PRECISION)
            if EIGHT:
                b_pv *= tl.load(p_v_scale + along(page, stride_vsp))
            b_o = b_o * b_decay[:, None] + b_pv
            if not KNOWN:
                i_out = n_first + tl.sum((m_best & (o_b < i_b)).to(tl.int32))  # place by id (R8)
                i_out = tl.where((i_j < n_first) | (i_j >= n_kept), i_j, i_out)
                tl.store(p_id + i_out, i_b, mask=i_j < TOP_K)
        b_lse = b_top * (scale * LN2) + tl.log(b_sum)  # natural logarithm; -inf without a token
        if SPLITS == 1:
            tl.store(p_out, (b_o / b_sum[:, None]).to(out.dtype.element_ty), mask=m_o)
            tl.store(lse + o_x, b_lse, mask=m_g)
        else:
            b_o = b_o / tl.where(b_sum == 0.0, 1.0, b_sum)[:, None]
            p_part = parts + o_x[:, None] * (SPLITS * DIM_V) + o_dv[None, :]
            tl.store(p_part + i_c * DIM_V, b_o.to(parts.dtype.element_ty), mask=m_o)
            tl.store(part_lses + o_x * SPLITS + i_c, b_lse, mask=m_g)
            tl.debug_barrier()  # all of it is written before the arrival is told
            p_arrival = arrivals + i_x.to(tl.int64) * tl.num_programs(2) + i_h
            if tl.atomic_add(p_arrival, 1, sem="acq_rel") == SPLITS - 1:
                b_o, b_lse = add_up(parts, part_lses, o_x, m_g, DIM_V, BDV, SPLITS)
                tl.store(p_out, b_o.to(out.dtype.element_ty), mask=m_o)
                tl.store(lse + o_x, b_lse, mask=m_g)


def attend_pages(
    q: Float[Tensor, "B n Hq D"],
    cache: PagedKV,
    config: MSAConfig,
    scores: Float[Tensor, "B n Hkv width"],
    arrivals: Int[Tensor, "B programs"],
    tile: TileConfig | None = None,
) -> tuple[Float[Tensor, "B n Hq Dv"], Float[Tensor, "B n Hq"], Int[Tensor, "B n Hkv k"]]:
    """out in q's dtype, lse float32, and the selected ids: 0, -inf and -1 for an empty slot."""
    (batch, n, heads, dim), (_, block, groups, dim_v) = q.shape, cache.v_pages.shape
    group, rows, width, device = heads // groups, batch * n * groups, scores.shape[-1], q.device
    out = torch.empty((batch, n, heads, dim_v), dtype=q.dtype, device=device)
    lse = torch.empty((batch, n, heads), dtype=torch.float32, device=device)
    places = config.top_k - config.forced_blocks
    known = places > MOST_PLACES
    if known:
        ids = best_pages(cache, config, scores)
        places = 1  # nothing is left to select
    else:
        ids = torch.empty((batch, n, groups, config.top_k), dtype=torch.int32, device=device)
    tile = tile or choose("paged", q.dtype, max(pad(dim), pad(dim_v)), block)
    some, slots = head_tile(group), pad(config.top_k, 2)
    tiles = triton.cdiv(group, some)
    splits = splits_of(rows * tiles, slots if width < WIDE else max(1, slots // 2), tile.programs)
    parts = torch.empty((rows * group, splits, dim_v), dtype=q.dtype, device=device)
    part_lses = torch.empty((rows * group, splits), dtype=torch.float32, device=device)
    pieces = min(width, pad(isqrt(width), max(64, pad(places))))
    if rows:
        eight = cache.k_scales is not None
        unread = out[0, 0]  # in the place of scales, where there are none
        scales = (cache.k_scales, cache.v_scales) if eight else (unread, unread)
        launch = tile.launch() | {"num_stages": min(tile.stages, 1 + slots // splits)}
        page_attend_kernel[rows, splits, tiles](
            q, cache.k_pages, cache.v_pages, *scales, cache.page_table, cache.lengths, scores, ids,
            parts, part_lses, arrivals, out, lse, config.softmax_scale_for(dim) * LOG2E.value,
            *q.stride()[:3], *cache.k_pages.stride()[:3], *cache.v_pages.stride()[:3],
            *cache.page_table.stride(), cache.lengths.stride(0), *scales[0].stride(),
            *scales[1].stride(), G=group, HEADS=some, DIM=dim, DIM_V=dim_v, BD=pad(dim),
            BDV=pad(dim_v), BK=block, BN=tile.keys, N=n, HKV=groups, TOP_K=config.top_k, P=slots,
            SINK=config.sink_blocks, LOCAL=config.local_blocks, PLACES=places, PP=pad(places, 1),
            PIECES=pieces, LENGTH=width // pieces, STEP=min(width // pieces, STEP), SPLITS=splits,
            KNOWN=known, EIGHT=eight, PRECISION=is_exact(q), **early_launch(device), **launch,
        )  # fmt: skip
    return out, lse, ids


def best_pages(
    cache: PagedKV, config: MSAConfig, scores: Float[Tensor, "B n Hkv width"]
) -> Int[Tensor, "B n Hkv k"]:
    """The selected ids of each row, by a kernel that has room for many; those of an empty slot of
    the batch mean nothing."""
    batch, n, groups, width = scores.shape
    new = torch.arange(n, dtype=torch.int32, device=scores.device) - n
    positions = (cache.lengths[:, None] + new).int().flatten()
    block = cache.k_pages.shape[1]
    ids = select_rows(scores.view(batch * n, groups, width), positions, block, config)
    return ids.view(batch, n, groups, config.top_k)


def head_tile(group: int) -> int:
    """Heads of one program."""
    return min(pad(group), 64)


def splits_of(programs: int, most: int, wanted: int) -> int:
    """How many programs share the selected blocks of a row, so that there are about `wanted`.

    >>> splits_of(4, 16, 132), splits_of(32, 16, 132), splits_of(500, 16, 132)
    (16, 4, 1)
    """
    return min(most, 1 << (max(wanted // max(programs, 1), 1).bit_length() - 1))
