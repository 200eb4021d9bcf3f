"""Writing new tokens into a paged cache by the device itself, lengths included (R2).

    for each sequence whose table has pages for n more tokens, none of them shared:
        for each page that gets some: write k, v and k_idx, in 8 bits as `msa.eight_bits` says
        lengths[sequence] += n

Nothing comes from the host but pointers, so a step of generation can be captured in a CUDA graph:
`PagePool.reserve` enters the pages beforehand. One program per sequence: it has read the length
before it writes the new one, and nobody else looks at either.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from msa.ir import PagedKV
from msa.triton_impl.early import early_launch, wait_for_others
from msa.triton_impl.tiles import pad

LEAST = tl.constexpr(1)  # bits of the exponent of 2^-126, the least scale there is


@triton.jit
def put(x, pages, scales, page, first, length, p_x, p_page, scale_at, stride_xn, stride_pt,
        N: tl.constexpr, DIM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
        EIGHT: tl.constexpr):  # fmt: skip
    """Tokens length ... length + N of one head, as far as they lie in the page of `first`."""
    o_t, o_d = first + tl.arange(0, BK), tl.arange(0, BD)  # [BK] position in the sequence
    m_d = (o_d < DIM)[None, :]
    m_new = ((o_t >= length) & (o_t < length + N))[:, None] & m_d
    p_x = x + p_x + (o_t - length)[:, None] * stride_xn + o_d[None, :]
    p_y = pages + p_page + tl.arange(0, BK)[:, None] * stride_pt + o_d[None, :]
    b_x = tl.load(p_x, mask=m_new, other=0.0)
    if EIGHT:
        b_x = b_x.to(tl.float32)
        b_size = tl.abs(b_x)
        largest = tl.max(tl.max(tl.where(b_size < float("inf"), b_size, 0.0), 1), 0)
        bits = largest.to(tl.int32, bitcast=True)
        wanted = tl.maximum((bits >> 23) + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32) - 8, LEAST)
        known = tl.load(scales + scale_at).to(tl.int32, bitcast=True) >> 23
        known = tl.where(first >= length, LEAST, known)  # the page's first token is a new one
        scale = tl.maximum(known, wanted)  # all of them powers of two, by their exponents
        inverse = ((254 - scale) << 23).to(tl.float32, bitcast=True)
        if (scale > known) & (first < length):
            m_old = (o_t < length)[:, None] & m_d
            b_old = tl.load(p_y, mask=m_old, other=0.0).to(tl.float32)
            b_old *= (known << 23).to(tl.float32, bitcast=True) * inverse
            tl.store(p_y, b_old.to(pages.dtype.element_ty), mask=m_old)
        b_x *= inverse
        b_x = tl.where(b_x > 448.0, 448.0, tl.where(b_x < -448.0, -448.0, b_x))  # NaN is neither
        tl.store(scales + scale_at, (scale << 23).to(tl.float32, bitcast=True))
    tl.store(p_y, b_x.to(pages.dtype.element_ty), mask=m_new)


@triton.jit
def append_kernel(k, v, k_idx, k_pages, v_pages, k_idx_pages, k_scales, v_scales, k_idx_scales,
                  shared,
                  table, lengths, n_pages, n_columns, stride_kb, stride_kn, stride_kh, stride_vb,
                  stride_vn, stride_vh, stride_ib, stride_in, stride_kp, stride_kt, stride_kg,
                  stride_vp, stride_vt, stride_vg, stride_ip, stride_it, stride_table,
                  N: tl.constexpr, HKV: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
                  DIM_I: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BDI: tl.constexpr,
                  BK: tl.constexpr, EIGHT: tl.constexpr, EIGHT_INDEX: tl.constexpr,
                  SHARED: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """One sequence."""
    i_s = tl.program_id(0).to(tl.int64)
    wait_for_others(EARLY)
    length = tl.load(lengths + i_s).to(tl.int32)
    first, stop = length // BK, (length + N - 1) // BK + 1  # blocks that get tokens
    p_table = table + i_s * stride_table
    room = 0  # blocks that have a page
    for i_b in range(first, tl.minimum(stop, n_columns)):
        page = tl.load(p_table + i_b)
        room += ((page >= 0) & (page < n_pages)).to(tl.int32)
        if SHARED:  # what other sequences hold, too, is not to be changed
            m_page = (page >= 0) & (page < n_pages)
            room -= tl.load(shared + page, mask=m_page, other=0).to(tl.int32)
    if room == stop - first:
        for i_b in range(first, stop):
            page = tl.load(p_table + i_b).to(tl.int64)
            put(k_idx, k_idx_pages, k_idx_scales, page, i_b * BK, length, i_s * stride_ib,
                page * stride_ip, page, stride_in, stride_it, N, DIM_I, BDI, BK,
                EIGHT_INDEX)  # fmt: skip
            for i_r in range(HKV):
                put(k, k_pages, k_scales, page, i_b * BK, length,
                    i_s * stride_kb + i_r * stride_kh, page * stride_kp + i_r * stride_kg,
                    page * HKV + i_r, stride_kn, stride_kt, N, DIM, BD, BK, EIGHT)  # fmt: skip
                put(v, v_pages, v_scales, page, i_b * BK, length,
                    i_s * stride_vb + i_r * stride_vh, page * stride_vp + i_r * stride_vg,
                    page * HKV + i_r, stride_vn, stride_vt, N, DIM_V, BDV, BK, EIGHT)  # fmt: skip
        tl.store(lengths + i_s, (length + N).to(lengths.dtype.element_ty))


@torch.no_grad()
def append_tokens(
    cache: PagedKV,
    k: Float[Tensor, "B n Hkv D"],
    v: Float[Tensor, "B n Hkv Dv"],
    k_idx: Float[Tensor, "B n Di"],
) -> None:
    """n more tokens for each sequence whose table has pages for them; the others stay as they are.

    Writes into the cache's own pages, scales and lengths, but not into pages that are shared.
    """
    (batch, n, groups, dim), dim_v, dim_i = k.shape, v.shape[-1], k_idx.shape[-1]
    k, v, k_idx = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v, k_idx))
    total, block = cache.k_pages.shape[:2]
    eight, eight_index = cache.k_scales is not None, cache.k_idx_scales is not None
    if batch and n:
        append_kernel[batch,](
            k, v, k_idx, cache.k_pages, cache.v_pages, cache.k_idx_pages,
            cache.k_scales if eight else k, cache.v_scales if eight else k,
            cache.k_idx_scales if eight_index else k,
            k if cache.shared is None else cache.shared,
            cache.page_table, cache.lengths, total,
            cache.page_table.shape[1], *k.stride()[:3], *v.stride()[:3], *k_idx.stride()[:2],
            *cache.k_pages.stride()[:3], *cache.v_pages.stride()[:3],
            *cache.k_idx_pages.stride()[:2], cache.page_table.stride(0), N=n, HKV=groups, DIM=dim,
            DIM_V=dim_v, DIM_I=dim_i, BD=pad(dim), BDV=pad(dim_v), BDI=pad(dim_i), BK=block,
            EIGHT=eight, EIGHT_INDEX=eight_index, SHARED=cache.shared is not None,
            **early_launch(k.device), num_warps=4,
        )  # fmt: skip
