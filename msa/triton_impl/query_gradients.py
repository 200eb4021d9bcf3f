"""Backward of attention, the queries' half: dQ by a walk over each tile's union (R18).

    for each tile, each group:
        delta = <dO, out> - dlse                                            # per query and head
        for each block b of the union:
            P  = exp(softmax_scale * q K[b]^T - lse), 0 where b was not selected or not visible
            dS = P (dO V[b]^T - delta)
            dQ += softmax_scale * dS K[b]

What the fast form changes:
 1. The walk is that of the forward: rows that did not select b have +inf in place of their lse.
 2. A tile holds dO and out anyway, so it computes delta and leaves it for the keys' half.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from msa.ir import Selection
from msa.triton_impl.tile_union import SplitUnion
from msa.triton_impl.tiles import (
    LOG2E,
    along,
    can_describe,
    describe,
    heads_of,
    is_exact,
    load_keys,
    pad,
    tile_table,
)
from msa.triton_impl.tuning import TileConfig, choose


@triton.jit
def gradient_step(b_q, b_do, b_lse, b_delta, b_dq, k, v, p_k, p_v, i_r, first, key_stop, b_own,
                  m_row, scale, stride_kt, stride_vt, DIM: tl.constexpr, DIM_V: tl.constexpr,
                  BD: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr,
                  TMA: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """BN keys from `first` on, for the rows in m_row [BM]; EDGE where tokens may be invisible."""
    o_n, o_d, o_dv = first + tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BDV)
    if TMA:
        b_k, b_v = k.load([first, i_r * DIM]), v.load([first, i_r * DIM_V])
    else:
        b_k = load_keys(p_k, first, key_stop, stride_kt, o_d, DIM, BD, BN)  # [BN, BD]
        b_v = load_keys(p_v, first, key_stop, stride_vt, o_dv, DIM_V, BDV, BN)  # [BN, BDV]
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BN]
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
    b_p = tl.exp2(b_s * scale - tl.where(m_row, b_lse, float("inf"))[:, None])
    if EDGE:
        b_p = tl.where(o_n[None, :] <= b_own[:, None], b_p, 0.0)
    b_ds = b_p * (b_dp - b_delta[:, None])
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)


@triton.jit
def query_gradients_kernel(q, k, v, k_tiles, v_tiles, out, d_out, lse, d_lse, tiles, ids, masks,
                           counts, d_q, delta, scale, softmax_scale, U, stride_qt,
                           stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, G: tl.constexpr,
                           HEADS: tl.constexpr, HKV: tl.constexpr, DIM: tl.constexpr,
                           DIM_V: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
                           BK: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, TMA: tl.constexpr,
                           PRECISION: tl.constexpr):  # fmt: skip
    """One tile of query positions x HEADS = BM rows."""
    i_t, i_r = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p_tile = tiles + i_t * 5
    start, stop, own = tl.load(p_tile), tl.load(p_tile + 1), tl.load(p_tile + 2)
    first_key, key_stop = tl.load(p_tile + 3), tl.load(p_tile + 4)
    o_m = tl.arange(0, BM)
    o_i = o_m // HEADS  # [BM] query within the tile
    o_g = tl.program_id(2) * HEADS + o_m % HEADS
    o_h = i_r * G + o_g
    b_own = own + o_i
    m_m = (start + o_i < stop) & (o_g < G)
    o_t = (start + o_i).to(tl.int64)
    o_x = o_t * (HKV * G) + o_h  # [BM] row of out
    o_d, o_dv = tl.arange(0, BD), tl.arange(0, BDV)
    m_q, m_o = m_m[:, None] & (o_d < DIM)[None, :], m_m[:, None] & (o_dv < DIM_V)[None, :]
    p_q = q + along(o_t, stride_qt) + along(o_h, stride_qh)  # [BM]
    b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_q, other=0.0)
    b_do = tl.load(d_out + o_x[:, None] * DIM_V + o_dv[None, :], mask=m_o, other=0.0)
    b_out = tl.load(out + o_x[:, None] * DIM_V + o_dv[None, :], mask=m_o, other=0.0)
    b_delta = tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), 1)
    b_delta -= tl.load(d_lse + o_x, mask=m_m, other=0.0)
    tl.store(delta + o_x, b_delta, mask=m_m)
    b_lse = tl.load(lse + o_x, mask=m_m, other=0.0) * LOG2E
    p_k, p_v = k + along(i_r, stride_kh), v + along(i_r, stride_vh)
    i_tr = i_t * HKV + i_r
    p_id, p_mask = ids + i_tr * U, masks + i_tr * U
    count = tl.load(counts + i_tr)

    b_dq = tl.zeros([BM, BD], tl.float32)
    # blocks that reach beyond the first query's own key: at most three, the last of the union
    o_l = count - 1 - tl.arange(0, 4)
    b_last = tl.load(p_id + o_l, mask=o_l >= 0, other=-1)
    inner = count - tl.sum((first_key + (b_last + 1) * BK - 1 > own).to(tl.int32))
    STEPS: tl.constexpr = BK // BN  # products per block
    i_b, b_bits = tl.load(p_id), tl.load(p_mask)
    for i in range(0, inner * STEPS):
        i_next = tl.minimum(i // STEPS + 1, count - 1)
        next_b, next_bits = tl.load(p_id + i_next), tl.load(p_mask + i_next)
        m_row = ((b_bits >> o_i) & 1) != 0
        first = first_key + i_b * BK + (i % STEPS) * BN
        b_dq = gradient_step(
            b_q, b_do, b_lse, b_delta, b_dq, k_tiles, v_tiles, p_k, p_v, i_r, first, key_stop,
            b_own, m_row, scale, stride_kt, stride_vt, DIM, DIM_V, BD, BDV, BN, False, TMA,
            PRECISION)  # fmt: skip
        last = i % STEPS == STEPS - 1
        i_b, b_bits = tl.where(last, next_b, i_b), tl.where(last, next_bits, b_bits)
    for i in range(inner * STEPS, count * STEPS):
        i_b, b_bits = tl.load(p_id + i // STEPS), tl.load(p_mask + i // STEPS)
        m_row = ((b_bits >> o_i) & 1) != 0
        first = first_key + i_b * BK + (i % STEPS) * BN
        b_dq = gradient_step(
            b_q, b_do, b_lse, b_delta, b_dq, k_tiles, v_tiles, p_k, p_v, i_r, first, key_stop,
            b_own, m_row, scale, stride_kt, stride_vt, DIM, DIM_V, BD, BDV, BN, True, False,
            PRECISION)  # fmt: skip
    p_dq = d_q + o_x[:, None] * DIM + o_d[None, :]
    tl.store(p_dq, (b_dq * softmax_scale).to(d_q.dtype.element_ty), mask=m_q)


def query_gradients(
    q: Float[Tensor, "Tq Hq D"],
    k: Float[Tensor, "Tk Hkv D"],
    v: Float[Tensor, "Tk Hkv Dv"],
    out: Float[Tensor, "Tq Hq Dv"],
    d_out: Float[Tensor, "Tq Hq Dv"],
    lse: Float[Tensor, "Tq Hq"],
    d_lse: Float[Tensor, "Tq Hq"],
    union: SplitUnion,
    selection: Selection,
    softmax_scale: float,
    tile: TileConfig | None = None,
    into: Float[Tensor, "Tq Hq D"] | None = None,
) -> tuple[Float[Tensor, "Tq Hq D"], Float[Tensor, "Tq Hq"]]:
    """dQ in q's dtype, and delta in float32; all but q, k and v are contiguous.

    Args:
        into: write dQ to this contiguous tensor instead of a new one.
    """
    (n_q, heads, dim), groups, dim_v = q.shape, k.shape[1], v.shape[2]
    group, block = heads // groups, selection.block_size
    d_q = torch.empty(q.shape, dtype=q.dtype, device=q.device) if into is None else into
    delta = torch.empty((n_q, heads), dtype=torch.float32, device=q.device)
    if not n_q:
        return d_q, delta
    tile = tile or choose("queries", q.dtype, max(pad(dim), pad(dim_v)), block)
    positions = pad(union.tile_size, 1)
    some = heads_of(group, positions, tile.rows)
    tiles = tile_table(selection.sequences, union.tile_size, q.device)
    tma = tile.descriptors and can_describe(k, dim) and can_describe(v, dim_v)
    k_tiles, v_tiles = (describe(k, tile.keys), describe(v, tile.keys)) if tma else (k, v)
    query_gradients_kernel[len(tiles), groups, triton.cdiv(group, some)](
        q, k, v, k_tiles, v_tiles, out, d_out, lse, d_lse, tiles, union.block_ids,
        union.row_masks, union.counts, d_q, delta, softmax_scale * LOG2E.value, softmax_scale,
        union.block_ids.shape[2], *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], G=group,
        HEADS=some, HKV=groups, DIM=dim, DIM_V=dim_v, BD=pad(dim), BDV=pad(dim_v), BK=block,
        BN=tile.keys, BM=positions * some, TMA=tma, PRECISION=is_exact(q), **tile.launch(),
    )  # fmt: skip
    return d_q, delta
