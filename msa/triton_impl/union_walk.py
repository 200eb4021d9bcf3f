"""The other loop order: each tile of neighbouring queries walks the union of its blocks (R9, R10).

    for each tile, each group:
        m, l, o = -inf, 0, 0                                     # per query and head
        for each block b of the union:
            S = softmax_scale * q_rows @ K[b]^T, invisible tokens and rows whose query
                did not select b masked
            m, l, o = online softmax step(S, V[b])
        out, lse = o / l, m + log l

What the fast form changes:
 1. Neighbouring queries times heads make one tile, 8 x 16 = 128 rows: no gather, no partials.
 2. A row that did not select b is masked by its running maximum, not score by score: subtracting
    +inf in place of the maximum makes its weights exactly 0.
 3. Only the last blocks of the union reach the diagonal; the others need no token mask.
 4. The next block's id is loaded one step ahead, so that its keys can be fetched early.
 5. The maximum is taken off before the scale is multiplied on: scale * score - scale * maximum
    would become one fused multiply-add, whose residual at the maximum is not 0 but half a unit in
    the last place, enough to lose the whole row where logits pass 2^23.
 6. Blocks that few queries of the tile share can be left to the KV-outer kernel: their partial
    results are folded in at the end, which saves the combine step a kernel and a pass over `out`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from msa.ir import Array, Output, Partials, Sequences, TileUnion
from msa.triton_impl.places import on_its_device
from msa.triton_impl.tiles import (
    LN2,
    LOG2E,
    LOWEST,
    along,
    can_describe,
    contiguous,
    describe,
    heads_of,
    is_exact,
    load_keys,
    pad,
    require_kernels,
    tile_table,
)
from msa.triton_impl.tuning import TileConfig, choose


@triton.jit
def softmax_step(b_q, b_top, b_sum, b_o, k, v, p_k, p_v, i_r, first, key_stop, b_own, m_row, scale,
                 stride_kt, stride_vt, DIM: tl.constexpr, DIM_V: tl.constexpr, BD: tl.constexpr,
                 BDV: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr, TMA: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """BN keys from `first` on, for the rows in m_row [BM]; EDGE where tokens may be invisible."""
    o_n, o_d, o_dv = first + tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BDV)
    if TMA:
        b_k, b_v = k.load([first, i_r * DIM]), v.load([first, i_r * DIM_V])
    elif EDGE or DIM != BD or DIM_V != BDV:
        b_k = load_keys(p_k, first, key_stop, stride_kt, o_d, DIM, BD, BN)  # [BN, BD]
        b_v = load_keys(p_v, first, key_stop, stride_vt, o_dv, DIM_V, BDV, BN)  # [BN, BDV]
    else:
        b_k = tl.load(p_k + along(o_n, stride_kt)[:, None] + o_d[None, :])
        b_v = tl.load(p_v + along(o_n, stride_vt)[:, None] + o_dv[None, :])
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BN]
    if EDGE:
        b_s = tl.where(o_n[None, :] <= b_own[:, None], b_s, float("-inf"))
    b_new = tl.where(m_row, tl.maximum(b_top, tl.max(b_s, 1)), b_top)
    b_p = tl.exp2((b_s - tl.where(m_row, b_new, float("inf"))[:, None]) * scale)
    b_decay = tl.exp2((b_top - b_new) * scale)
    b_sum = b_sum * b_decay + tl.sum(b_p, 1)
    b_o = b_o * b_decay[:, None]
    b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o, input_precision=PRECISION)
    return b_new, b_sum, b_o


@triton.jit
def walk_kernel(q, k, v, k_tiles, v_tiles, tiles, ids, masks, counts, parts, part_lses,
                part_counts, out, lse, scale, U, stride_qt, stride_qh, stride_kt, stride_kh,
                stride_vt, stride_vh, G: tl.constexpr, HEADS: tl.constexpr, HKV: tl.constexpr,
                DIM: tl.constexpr, DIM_V: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
                BK: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, TOP_K: tl.constexpr,
                P: tl.constexpr, FOLD: tl.constexpr, TMA: tl.constexpr,
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
    o_d, o_dv = tl.arange(0, BD), tl.arange(0, BDV)
    p_q = q + along(o_t, stride_qt) + along(o_h, stride_qh)  # [BM]
    b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_m[:, None] & (o_d < DIM)[None, :], other=0.0)
    p_k, p_v = k + along(i_r, stride_kh), v + along(i_r, stride_vh)
    i_tr = i_t * HKV + i_r
    p_id, p_mask = ids + i_tr * U, masks + i_tr * U
    count = tl.load(counts + i_tr)

    b_top = tl.full([BM], LOWEST, tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_o = tl.zeros([BM, BDV], tl.float32)
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
        b_top, b_sum, b_o = softmax_step(
            b_q, b_top, b_sum, b_o, k_tiles, v_tiles, p_k, p_v, i_r, first, key_stop, b_own, m_row,
            scale, stride_kt, stride_vt, DIM, DIM_V, BD, BDV, BN, False, TMA,
            PRECISION)  # fmt: skip
        if STEPS == 1:
            i_b, b_bits = next_b, next_bits
        else:
            last = i % STEPS == STEPS - 1
            i_b, b_bits = tl.where(last, next_b, i_b), tl.where(last, next_bits, b_bits)
    for i in range(inner * STEPS, count * STEPS):
        i_b, b_bits = tl.load(p_id + i // STEPS), tl.load(p_mask + i // STEPS)
        m_row = ((b_bits >> o_i) & 1) != 0
        first = first_key + i_b * BK + (i % STEPS) * BN
        b_top, b_sum, b_o = softmax_step(
            b_q, b_top, b_sum, b_o, k_tiles, v_tiles, p_k, p_v, i_r, first, key_stop, b_own, m_row,
            scale, stride_kt, stride_vt, DIM, DIM_V, BD, BDV, BN, True, False,
            PRECISION)  # fmt: skip

    o_x = o_t * (HKV * G) + o_h  # [BM] row of out
    b_near = b_top * (scale * LN2)  # [BM] natural logarithms, as the partials have them
    if FOLD:
        o_s = tl.arange(0, P)
        b_count = tl.load(part_counts + o_t * HKV + i_r, mask=m_m, other=0)
        m_s = o_s[None, :] < b_count[:, None]
        b_lse = tl.load(part_lses + o_x[:, None] * TOP_K + o_s[None, :], mask=m_s,
                        other=float("-inf"))  # fmt: skip
        b_far = tl.max(b_lse, 1)
        b_decay = tl.where(b_near >= b_far, 1.0, tl.exp(b_near - b_far))
        b_near = tl.maximum(b_near, b_far)
        b_sum = b_sum * b_decay + tl.sum(tl.exp(b_lse - b_near[:, None]), 1)
        b_o = b_o * b_decay[:, None]
        for i_s in range(0, tl.max(b_count)):
            m_o = i_s < b_count
            p_x = o_x * TOP_K + i_s
            b_w = tl.exp(tl.load(part_lses + p_x, mask=m_o, other=float("-inf")) - b_near)
            b_x = tl.load(parts + p_x[:, None] * DIM_V + o_dv[None, :],
                          mask=m_o[:, None] & (o_dv < DIM_V)[None, :], other=0.0)  # fmt: skip
            b_o += b_w[:, None] * b_x.to(tl.float32)
    b_o = b_o / b_sum[:, None]
    p_out = out + o_x[:, None] * DIM_V + o_dv[None, :]
    tl.store(p_out, b_o.to(out.dtype.element_ty), mask=m_m[:, None] & (o_dv < DIM_V)[None, :])
    tl.store(lse + o_x, b_near + tl.log(b_sum), mask=m_m)


def walk(
    q: Float[Tensor, "Tq Hq D"],
    k: Float[Tensor, "Tk Hkv D"],
    v: Float[Tensor, "Tk Hkv Dv"],
    sequences: Sequences,
    block_size: int,
    block_ids: Int[Tensor, "tiles Hkv U"],
    row_masks: Int[Tensor, "tiles Hkv U"],
    counts: Int[Tensor, "tiles Hkv"],
    tile_size: int,
    softmax_scale: float,
    partials: Partials | None = None,
    into: Output | None = None,
    tile: TileConfig | None = None,
) -> Output:
    """Walk the first `counts` blocks of each tile; then fold in the partials of other blocks."""
    (n_q, heads, dim), groups, dim_v = q.shape, k.shape[1], v.shape[2]
    group = heads // groups
    if into is None:
        out = torch.empty((n_q, heads, dim_v), dtype=q.dtype, device=q.device)
        into = Output(out, torch.empty((n_q, heads), dtype=torch.float32, device=q.device))
    if not n_q:
        return into
    tiles = tile_table(sequences, tile_size, q.device)
    tile = tile or choose("union", q.dtype, max(pad(dim), pad(dim_v)), block_size)
    positions = pad(tile_size, 1)
    some = heads_of(group, positions, tile.rows)
    fold = partials is not None
    parts, lses, part_counts = (
        (partials.out, partials.lse, partials.counts) if fold else (into.out, into.lse, counts)
    )
    top_k = lses.shape[-1] if fold else 1
    tma = tile.descriptors and can_describe(k, dim) and can_describe(v, dim_v)
    key_tiles = tuple(describe(x, tile.keys) for x in (k, v)) if tma else ()
    walk_kernel[len(tiles), groups, triton.cdiv(group, some)](
        q, k, v, *(key_tiles if tma else (k, v)), tiles, block_ids, row_masks, counts, parts, lses,
        part_counts, into.out, into.lse, softmax_scale * LOG2E.value, block_ids.shape[2],
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], G=group, HEADS=some, HKV=groups,
        DIM=dim, DIM_V=dim_v, BD=pad(dim), BDV=pad(dim_v), BK=block_size, BN=tile.keys,
        BM=positions * some, TOP_K=top_k, P=pad(top_k, 1), FOLD=fold, TMA=tma,
        PRECISION=is_exact(q), **tile.launch(),
    )  # fmt: skip
    return into


@on_its_device
def attend_union(
    q: Float[Array, "Tq Hq D"],
    k: Float[Array, "Tk Hkv D"],
    v: Float[Array, "Tk Hkv Dv"],
    tile_union: TileUnion,
    softmax_scale: float,
) -> Output:
    """Attention by a running softmax along each tile's union (R9, R10)."""
    require_kernels(tile_union.block_size, q=q, k=k, v=v)
    tile_union = contiguous(tile_union)
    ids, masks = tile_union.block_ids, tile_union.row_masks
    counts = (ids >= 0).sum(-1, dtype=torch.int32)
    return walk(
        q, k, v, tile_union.sequences, tile_union.block_size, ids, masks, counts,
        tile_union.tile_size, softmax_scale,
    )  # fmt: skip
