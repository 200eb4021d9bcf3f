"""Backward of attention, the queries' half: dQ by a walk over each tile's union (R18).

    for each tile, each group:
        delta = <dO, out> - dlse                                            # per query and head
        for each block b of the union:
            P  = exp(softmax_scale * q K[b]^T - lse), 0 where b was not selected or not visible
            dS = P (dO V[b]^T - delta)
            dQ += softmax_scale * dS K[b]

What the fast form changes:
 1. The walk is the forward's: rows that did not select b have +inf in place of their lse.
 2. A tile has dO and out in registers anyway, so this kernel computes delta and writes it for the
    kernel of dK and dV.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from msa.ir import Selection
from msa.triton_impl.launch import can_describe, describe, heads_of, is_exact, pad
from msa.triton_impl.tables import tile_table
from msa.triton_impl.tile_union import SplitUnion
from msa.triton_impl.tile_verbs import LOG2E, along, load_keys, load_tile, store_tile
from msa.triton_impl.tile_walk import (
    inner_blocks,
    load_block,
    load_tile_record,
    load_union,
    selects,
    tile_rows,
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
        b_k = load_keys(p_k, first, key_stop, stride_kt, o_d, DIM, BN)  # [BN, BD]
        b_v = load_keys(p_v, first, key_stop, stride_vt, o_dv, DIM_V, BN)  # [BN, BDV]
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
    """One tile of query positions x HEADS = BM rows.

    Parameters:
        q: [Tq, Hq, D], 16-bit or float32
        k: [Tk, Hkv, D], as q
        v: [Tk, Hkv, Dv], as q
        k_tiles, v_tiles: descriptors of k and v with tiles of BN rows; without TMA k and v
        out, d_out: [Tq, Hq, Dv], as q; the forward's output and its gradient
        lse, d_lse: [Tq, Hq], float32; the forward's LSE, a natural logarithm, and its gradient
        tiles: [tiles, 5], int32; a `tile_table`
        ids: [tiles, Hkv, U], int32; the blocks of each union, ascending
        masks: [tiles, Hkv, U], int32; bit i: position i of the tile selected the block
        counts: [tiles, Hkv], int32; blocks of each union
        d_q: [Tq, Hq, D], as q; written
        delta: [Tq, Hq], float32; <d_out, out> - d_lse, written
        scale: float; softmax scale times log2(e)
        softmax_scale: float
        U: int; width of ids and masks
        stride_qt, stride_kt, stride_vt: elements from one token of q, k, v to the next
        stride_qh, stride_kh, stride_vh: elements from one head of q, k, v to the next
        G, HKV: query heads of a group, groups
        HEADS: heads of one program
        DIM, DIM_V: D, Dv
        BD, BDV: D, Dv rounded up to powers of two
        BK, BN: keys of a block, keys of one product
        BM: rows of the tile
        TMA: bool; blocks without a token mask come by the bulk copy engine
        PRECISION: input precision of the products
    """
    i_t, i_r = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, stop, own, first_key, key_stop = load_tile_record(tiles, i_t)
    o_i, o_t, o_h, m_m = tile_rows(start, stop, i_r, tl.program_id(2), G, HEADS, BM)
    b_own = own + o_i
    o_x = o_t * (HKV * G) + o_h  # [BM] row of out
    o_d, o_dv = tl.arange(0, BD), tl.arange(0, BDV)
    b_q = load_tile(q + along(o_t, stride_qt) + along(o_h, stride_qh), m_m, o_d, DIM)  # [BM, BD]
    b_do = load_tile(d_out + o_x * DIM_V, m_m, o_dv, DIM_V)  # [BM, BDV]
    b_out = load_tile(out + o_x * DIM_V, m_m, o_dv, DIM_V)
    b_delta = tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), 1)
    b_delta -= tl.load(d_lse + o_x, mask=m_m, other=0.0)
    tl.store(delta + o_x, b_delta, mask=m_m)
    b_lse = tl.load(lse + o_x, mask=m_m, other=0.0) * LOG2E
    p_k, p_v = k + along(i_r, stride_kh), v + along(i_r, stride_vh)
    p_id, p_mask, count = load_union(ids, masks, counts, i_t * HKV + i_r, U)

    b_dq = tl.zeros([BM, BD], tl.float32)
    inner = inner_blocks(p_id, count, first_key, own, BK)
    STEPS: tl.constexpr = BK // BN  # products per block
    i_b, b_bits = load_block(p_id, p_mask, 0)
    for i in range(0, inner * STEPS):
        next_b, next_bits = load_block(p_id, p_mask, tl.minimum(i // STEPS + 1, count - 1))
        first = first_key + i_b * BK + (i % STEPS) * BN
        b_dq = gradient_step(
            b_q, b_do, b_lse, b_delta, b_dq, k_tiles, v_tiles, p_k, p_v, i_r, first, key_stop,
            b_own, selects(b_bits, o_i), scale, stride_kt, stride_vt, DIM, DIM_V, BD, BDV, BN,
            False, TMA, PRECISION)  # fmt: skip
        last = i % STEPS == STEPS - 1
        i_b, b_bits = tl.where(last, next_b, i_b), tl.where(last, next_bits, b_bits)
    for i in range(inner * STEPS, count * STEPS):
        i_b, b_bits = load_block(p_id, p_mask, i // STEPS)
        first = first_key + i_b * BK + (i % STEPS) * BN
        b_dq = gradient_step(
            b_q, b_do, b_lse, b_delta, b_dq, k_tiles, v_tiles, p_k, p_v, i_r, first, key_stop,
            b_own, selects(b_bits, o_i), scale, stride_kt, stride_vt, DIM, DIM_V, BD, BDV, BN,
            True, False, PRECISION)  # fmt: skip
    store_tile(d_q + o_x * DIM, m_m, o_d, b_dq * softmax_scale, DIM)


def query_gradients(
    q: Float[Tensor, "Tq Hq D"], k: Float[Tensor, "Tk Hkv D"], v: Float[Tensor, "Tk Hkv Dv"],
    out: Float[Tensor, "Tq Hq Dv"], d_out: Float[Tensor, "Tq Hq Dv"], lse: Float[Tensor, "Tq Hq"],
    d_lse: Float[Tensor, "Tq Hq"], union: SplitUnion, selection: Selection, softmax_scale: float,
    tile: TileConfig | None = None, into: Float[Tensor, "Tq Hq D"] | None = None,
) -> tuple[Float[Tensor, "Tq Hq D"], Float[Tensor, "Tq Hq"]]:  # fmt: skip
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
