"""Writing new tokens into a paged cache by the device itself, lengths included (R2).

    for each sequence whose table has pages for n more tokens, none of them shared:
        for each page that gets some: write k, v and k_idx, in 8 bits as `msa.eight_bits` says
        lengths[sequence] += n

The host passes pointers only, so a step of generation can be captured in a CUDA graph:
`PagePool.reserve` enters the pages beforehand. There is one program per sequence. It reads the
length before it writes the new one, and no other program reads or writes that length.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from msa.ir import PagedKV
from msa.triton_impl.bits import clamp_e4m3, e4m3_exponent, finite_size, power_of_two
from msa.triton_impl.dependent_launch import dependent_launch, wait_for_previous
from msa.triton_impl.launch import pad
from msa.triton_impl.places import on_its_device
from msa.triton_impl.tile_verbs import along
from msa.triton_impl.tuning import EVERY_LAUNCH

LEAST = tl.constexpr(2.0**-126)  # the least scale of a page


@triton.jit
def put(p_x, p_page, p_scale, first, length, stride_xn, stride_pt, N: tl.constexpr,
        DIM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, EIGHT: tl.constexpr):  # fmt: skip
    """Tokens length ... length + N of one head, as far as they lie in the page of `first`.

    p_x, p_page, p_scale: where the head's new tokens, its page and the page's scale begin.
    """
    o_n, o_d = tl.arange(0, BK), tl.arange(0, BD)
    o_t = first + o_n  # [BK] position in the sequence
    m_d = (o_d < DIM)[None, :]
    m_new = ((o_t >= length) & (o_t < length + N))[:, None] & m_d
    p_y = p_page + along(o_n, stride_pt)[:, None] + o_d[None, :]
    b_x = tl.load(
        p_x + along(o_t - length, stride_xn)[:, None] + o_d[None, :], mask=m_new, other=0.0
    )
    if EIGHT:
        b_x = b_x.to(tl.float32)
        largest = tl.max(tl.max(finite_size(b_x), 1), 0)
        wanted = power_of_two(tl.maximum(e4m3_exponent(largest.to(tl.int32, bitcast=True)), 1))
        known = tl.where(first >= length, LEAST, tl.load(p_scale))  # the page's first token is new
        scale = tl.maximum(known, wanted)
        inverse = tl.div_rn(1.0, scale)  # exact for powers of two
        if (scale > known) & (first < length):
            m_old = (o_t < length)[:, None] & m_d
            b_old = tl.load(p_y, mask=m_old, other=0.0).to(tl.float32) * (known * inverse)
            tl.store(p_y, b_old.to(p_page.dtype.element_ty), mask=m_old)
        b_x = clamp_e4m3(b_x * inverse)
        tl.store(p_scale, scale)
    tl.store(p_y, b_x.to(p_page.dtype.element_ty), mask=m_new)


@triton.jit
def append_kernel(k, v, k_idx, k_pages, v_pages, k_idx_pages, k_scales, v_scales, k_idx_scales,
                  shared, table, lengths, n_pages, n_columns, stride_kb, stride_kn, stride_kh,
                  stride_vb, stride_vn, stride_vh, stride_ib, stride_in, stride_kp, stride_kt,
                  stride_kg, stride_vp, stride_vt, stride_vg, stride_ip, stride_it, stride_ksp,
                  stride_ksg, stride_vsp, stride_vsg, stride_isp, stride_ts, stride_tb, stride_ls,
                  stride_sp,
                  N: tl.constexpr, HKV: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
                  DIM_I: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BDI: tl.constexpr,
                  BK: tl.constexpr, EIGHT: tl.constexpr, EIGHT_INDEX: tl.constexpr,
                  SHARED: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One sequence.

    Parameters:
        k: [B, n, Hkv, D], 16-bit or float32; new keys
        v: [B, n, Hkv, Dv], as k; new values
        k_idx: [B, n, Di], as k; new index keys
        k_pages: [pages, Bk, Hkv, D], as k or e4m3; written
        v_pages: [pages, Bk, Hkv, Dv], as k_pages; written
        k_idx_pages: [pages, Bk, Di], as k or e4m3; written
        k_scales, v_scales: [pages, Hkv], float32; factors of the pages, raised with EIGHT only
        k_idx_scales: [pages], float32; factors of the pages, raised with EIGHT_INDEX only
        shared: [pages], uint8; 1 for a page that several sequences have, read with SHARED only
        table: [B, columns], int32 or int64; a sequence's pages in order
        lengths: [B], int32 or int64; tokens of a sequence, raised by n
        n_pages, n_columns: int; pages, columns of table
        stride_kb, stride_kn, stride_kh: elements from one sequence, token, head of k to the next
        stride_vb, stride_vn, stride_vh: elements from one sequence, token, head of v to the next
        stride_ib, stride_in: elements from one sequence, token of k_idx to the next
        stride_kp, stride_kt, stride_kg: elements from one page, token, head of k_pages to the next
        stride_vp, stride_vt, stride_vg: elements from one page, token, head of v_pages to the next
        stride_ip, stride_it: elements from one page, token of k_idx_pages to the next
        stride_ksp, stride_ksg: elements from one page, head of k_scales to the next
        stride_vsp, stride_vsg: elements from one page, head of v_scales to the next
        stride_isp: elements from one page of k_idx_scales to the next
        stride_ts, stride_tb: elements from one sequence, block of table to the next
        stride_ls: elements from one sequence of lengths to the next
        stride_sp: elements from one page of shared to the next
        N, HKV: new tokens of a sequence, groups
        DIM, DIM_V, DIM_I: D, Dv, Di
        BD, BDV, BDI: D, Dv, Di rounded up to powers of two
        BK: keys of a block
        EIGHT, EIGHT_INDEX: bool; pages of keys and values, of index keys are of 8 bits
        SHARED: bool; leave pages alone that several sequences have
        PDL: bool; see `wait_for_previous`
    """
    i_s = tl.program_id(0)
    wait_for_previous(PDL)
    p_length = lengths + along(i_s, stride_ls)
    length = tl.load(p_length).to(tl.int32)
    first, stop = length // BK, (length + N - 1) // BK + 1  # blocks that get tokens
    p_table = table + along(i_s, stride_ts)
    room = 0  # blocks that have a page
    for i_b in range(first, tl.minimum(stop, n_columns)):
        page = tl.load(p_table + along(i_b, stride_tb)).to(tl.int64)
        m_page = (page >= 0) & (page < n_pages)
        room += m_page.to(tl.int32)
        if SHARED:  # other sequences have this page too: it must not change
            p_shared = shared + along(page, stride_sp)
            room -= tl.load(p_shared, mask=m_page, other=0).to(tl.int32)
    if room == stop - first:
        k += along(i_s, stride_kb)
        v += along(i_s, stride_vb)
        k_idx += along(i_s, stride_ib)
        for i_b in range(first, stop):
            page = tl.load(p_table + along(i_b, stride_tb)).to(tl.int64)
            put(k_idx, k_idx_pages + along(page, stride_ip), k_idx_scales + along(page, stride_isp),
                i_b * BK, length, stride_in, stride_it, N, DIM_I, BDI, BK,
                EIGHT_INDEX)  # fmt: skip
            for i_r in range(HKV):
                put(k + along(i_r, stride_kh),
                    k_pages + along(page, stride_kp) + along(i_r, stride_kg),
                    k_scales + along(page, stride_ksp) + along(i_r, stride_ksg), i_b * BK, length,
                    stride_kn, stride_kt, N, DIM, BD, BK, EIGHT)  # fmt: skip
                put(v + along(i_r, stride_vh),
                    v_pages + along(page, stride_vp) + along(i_r, stride_vg),
                    v_scales + along(page, stride_vsp) + along(i_r, stride_vsg), i_b * BK, length,
                    stride_vn, stride_vt, N, DIM_V, BDV, BK, EIGHT)  # fmt: skip
        tl.store(p_length, (length + N).to(lengths.dtype.element_ty))


@on_its_device
@torch.no_grad()
def append_tokens(
    cache: PagedKV, k: Float[Tensor, "B n Hkv D"], v: Float[Tensor, "B n Hkv Dv"],
    k_idx: Float[Tensor, "B n Di"],
) -> None:  # fmt: skip
    """n more tokens for each sequence whose table has pages for them; the others stay as they are.

    Writes into the cache's own pages, scales and lengths, but not into pages that are shared.
    """
    (batch, n, groups, dim), dim_v, dim_i = k.shape, v.shape[-1], k_idx.shape[-1]
    k, v, k_idx = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v, k_idx))
    total, block = cache.k_pages.shape[:2]
    eight, eight_index = cache.k_scales is not None, cache.k_idx_scales is not None
    if batch and n:
        unread = k[0, 0]  # where there are no scales
        scales = (cache.k_scales, cache.v_scales) if eight else (unread, unread)
        index_scales = cache.k_idx_scales if eight_index else unread
        shared = unread if cache.shared is None else cache.shared
        append_kernel[batch,](
            k, v, k_idx, cache.k_pages, cache.v_pages, cache.k_idx_pages, *scales, index_scales,
            shared, cache.page_table, cache.lengths, total, cache.page_table.shape[1],
            *k.stride()[:3], *v.stride()[:3], *k_idx.stride()[:2], *cache.k_pages.stride()[:3],
            *cache.v_pages.stride()[:3], *cache.k_idx_pages.stride()[:2], *scales[0].stride(),
            *scales[1].stride(), index_scales.stride(0), *cache.page_table.stride(),
            cache.lengths.stride(0), shared.stride(0), N=n, HKV=groups, DIM=dim, DIM_V=dim_v,
            DIM_I=dim_i, BD=pad(dim), BDV=pad(dim_v), BDI=pad(dim_i), BK=block, EIGHT=eight,
            EIGHT_INDEX=eight_index, SHARED=cache.shared is not None, **dependent_launch(k.device),
            num_warps=4, **EVERY_LAUNCH,
        )  # fmt: skip
