"""The other loop order: each tile of neighbouring queries walks the union of its blocks (R9, R10).

    for each tile, each group:
        m, l, o = -inf, 0, 0                                     # per query and head
        for each block b of the union:
            S = softmax_scale * q_rows @ K[b]^T, invisible tokens and rows whose query
                did not select b masked
            m, l, o = online softmax step(S, V[b])
        out, lse = o / l, m + log l

What the fast form changes:
 1. Neighbouring queries times heads make one tile, such as 4 x 16 = 64 rows: no gather, no
 partials.
 2. A row that did not select b is masked by its running maximum, not score by score: +inf is
    subtracted in place of the maximum, which makes the row's weights exactly 0.
 3. Only the last blocks of the union reach the diagonal; the others need no token mask.
 4. The next block's id is loaded one step ahead, so that its keys can be fetched early; in a paged
    cache, the id two steps ahead and the page one step ahead (`paged_keys.py`).
 5. Blocks that few queries of the tile share can be left to the KV-outer kernel. Their partial
    results are folded in at the end, so no separate combine kernel has to read and write `out`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from msa.ir import Array, Output, Sequences, TileUnion
from msa.triton_impl.combine import Slots
from msa.triton_impl.launch import (
    can_describe,
    contiguous,
    describe,
    heads_of,
    is_exact,
    pad,
    require_kernels,
)
from msa.triton_impl.paged_keys import (
    Pages,
    describe_matrix,
    key_offset,
    key_row,
    load_page,
    load_scale,
    page_arguments,
    page_matrix,
)
from msa.triton_impl.places import on_its_device
from msa.triton_impl.tables import tile_owners, tile_table
from msa.triton_impl.tile_verbs import (
    LN2,
    LOG2E,
    LOWEST,
    along,
    load_keys,
    load_tile,
    online_softmax_step,
    scaled_softmax_step,
    slot_weight,
    store_tile,
)
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
def attend_step(b_q, b_top, b_sum, b_o, unit, k, v, k_tiles, v_tiles, offset_k, offset_v, page,
                first, i_n, key_stop, b_own, m_row, scale, p_k_scale, p_v_scale, stride_kp,
                stride_kt, stride_vp, stride_vt, stride_ksp, stride_vsp, DIM: tl.constexpr,
                DIM_V: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr,
                EDGE: tl.constexpr, TMA: tl.constexpr, PAGED: tl.constexpr, SCALED: tl.constexpr,
                UNITS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Keys i_n ... i_n + BN of a block, for the rows in m_row [BM]; EDGE with a token mask.

    offset_k, offset_v: elements before the head; page, first: where the block lies in pages, in
    packed keys; p_k_scale, p_v_scale: where the factors of the head's first page lie; unit: with
    UNITS the factor in which b_o is kept.
    """
    o_n, o_d, o_dv = tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BDV)
    k_scale = load_scale(p_k_scale, page, 0, stride_ksp, 0, SCALED)
    v_scale = load_scale(p_v_scale, page, 0, stride_vsp, 0, SCALED)
    if TMA:
        row_k, column_k = key_row(page, first, i_n, offset_k, stride_kp, stride_kt, PAGED)
        row_v, column_v = key_row(page, first, i_n, offset_v, stride_vp, stride_vt, PAGED)
        b_k, b_v = k_tiles.load([row_k, column_k]), v_tiles.load([row_v, column_v])
    else:
        p_k = k + offset_k + key_offset(page, first, i_n, stride_kp, stride_kt, PAGED)
        p_v = v + offset_v + key_offset(page, first, i_n, stride_vp, stride_vt, PAGED)
        if EDGE or DIM != BD or DIM_V != BDV:
            n_keys = key_stop - first - i_n
            b_k = load_keys(p_k, 0, n_keys, stride_kt, o_d, DIM, BN)  # [BN, BD]
            b_v = load_keys(p_v, 0, n_keys, stride_vt, o_dv, DIM_V, BN)  # [BN, BDV]
        else:
            b_k = tl.load(p_k + along(o_n, stride_kt)[:, None] + o_d[None, :])
            b_v = tl.load(p_v + along(o_n, stride_vt)[:, None] + o_dv[None, :])
    b_v = b_v.to(b_q.dtype)
    b_s = tl.dot(b_q, tl.trans(b_k.to(b_q.dtype)), input_precision=PRECISION)  # [BM, BN]
    if EDGE:
        b_s = tl.where((first + i_n + o_n)[None, :] <= b_own[:, None], b_s, float("-inf"))
    if SCALED:
        b_top, b_sum, b_p, b_decay = scaled_softmax_step(b_s, b_top, b_sum, scale, k_scale, m_row)
    else:
        b_top, b_sum, b_p, b_decay = online_softmax_step(b_s, b_top, b_sum, scale, m_row)
    if UNITS:
        b_decay *= unit / v_scale
        unit = v_scale
    b_o = b_o * b_decay[:, None]
    if SCALED and not UNITS:
        b_o += tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION) * v_scale
    else:
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o, input_precision=PRECISION)
    return b_top, b_sum, b_o, unit


@triton.jit
def walk_kernel(q, k, v, k_tiles, v_tiles, tiles, ids, masks, counts, owners, table, k_scales,
                v_scales, stride_kp, stride_vp, stride_ts, stride_tb, stride_ksp, stride_ksh,
                stride_vsp, stride_vsh, parts, part_tops, part_totals, part_counts, out, lse, scale,
                U, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
                G: tl.constexpr, HEADS: tl.constexpr, HKV: tl.constexpr, DIM: tl.constexpr,
                DIM_V: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BK: tl.constexpr,
                BN: tl.constexpr, BM: tl.constexpr, TOP_K: tl.constexpr, P: tl.constexpr,
                FOLD: tl.constexpr, TMA: tl.constexpr, PAGED: tl.constexpr, SCALED: tl.constexpr,
                UNITS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One tile of query positions x HEADS = BM rows.

    Parameters:
        q: [Tq, Hq, D], 16-bit or float32
        k: [Tk, Hkv, D], as q; with PAGED [pages, Bk, Hkv, D], as q or e4m3
        v: [Tk, Hkv, Dv], with PAGED [pages, Bk, Hkv, Dv], as k
        k_tiles, v_tiles: descriptors of k and v with tiles of BN rows; without TMA k and v
        tiles: [tiles, 5], int32; a `tile_table`
        ids: [tiles, Hkv, U], int32; the blocks of each union, ascending
        masks: [tiles, Hkv, U], int32; bit i: position i of the tile selected the block
        counts: [tiles, Hkv], int32; blocks of each union
        owners: [tiles], int32; `tile_owners`, read with PAGED only
        table: [B, columns], int32 or int64; a sequence's pages in order, read with PAGED only
        k_scales, v_scales: [pages, Hkv], float32; factors of the pages, read with SCALED only
        stride_kp, stride_vp: elements from one page of k, v to the next
        stride_ts, stride_tb: elements from one sequence, block of table to the next
        stride_ksp, stride_ksh: elements from one page, head of k_scales to the next
        stride_vsp, stride_vsh: elements from one page, head of v_scales to the next
        parts: [Tq, Hq, k, Dv], as q; outputs of other blocks to fold in, read with FOLD only
        part_tops: [Tq, Hq, k], float32; their highest scores, not scaled
        part_totals: [Tq, Hq, k], float32; their sums of exp2(scale * (score - top))
        part_counts: [Tq, Hkv], int32; slots of the parts that are in use
        out: [Tq, Hq, Dv], as q; written
        lse: [Tq, Hq], float32, natural logarithm; written
        scale: float; softmax scale times log2(e)
        U: int; width of ids and masks
        stride_qt, stride_kt, stride_vt: elements from one token of q, k, v to the next
        stride_qh, stride_kh, stride_vh: elements from one head of q, k, v to the next
        G, HKV: query heads of a group, groups
        HEADS: heads of one program
        DIM, DIM_V: D, Dv
        BD, BDV: D, Dv rounded up to powers of two
        BK, BN: keys of a block, keys of one product
        BM: rows of the tile
        TOP_K, P: k of the parts, and rounded up to a power of two
        FOLD: bool; fold in the parts
        TMA: bool; blocks without a token mask come by the bulk copy engine
        PAGED: bool; k and v are pages
        SCALED: bool; pages have factors
        UNITS: bool; outputs are kept in units of a block's factor, which none can overflow
        PRECISION: input precision of the products
    """
    i_t, i_r = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, stop, own, first_key, key_stop = load_tile_record(tiles, i_t)
    o_i, o_t, o_h, m_m = tile_rows(start, stop, i_r, tl.program_id(2), G, HEADS, BM)
    b_own = own + o_i
    o_d, o_dv = tl.arange(0, BD), tl.arange(0, BDV)
    b_q = load_tile(q + along(o_t, stride_qt) + along(o_h, stride_qh), m_m, o_d, DIM)  # [BM, BD]
    offset_k, offset_v = along(i_r, stride_kh), along(i_r, stride_vh)
    p_k_scale, p_v_scale = k_scales + along(i_r, stride_ksh), v_scales + along(i_r, stride_vsh)
    p_id, p_mask, count = load_union(ids, masks, counts, i_t * HKV + i_r, U)
    p_table = table
    if PAGED:
        p_table += along(tl.load(owners + i_t), stride_ts)

    b_top = tl.full([BM], LOWEST, tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_o = tl.zeros([BM, BDV], tl.float32)
    unit = tl.full((), 1.0, tl.float32)
    inner = inner_blocks(p_id, count, first_key, own, BK)
    STEPS: tl.constexpr = BK // BN  # products per block
    i_b, b_bits = load_block(p_id, p_mask, 0)
    page, ahead = load_page(p_table, i_b, stride_tb, PAGED), i_b
    if PAGED:
        ahead = tl.load(p_id + tl.minimum(1, tl.maximum(count - 1, 0)))
    for i in range(0, inner * STEPS):
        next_b, next_bits = load_block(p_id, p_mask, tl.minimum(i // STEPS + 1, count - 1))
        next_page = load_page(p_table, ahead, stride_tb, PAGED)
        b_top, b_sum, b_o, unit = attend_step(
            b_q, b_top, b_sum, b_o, unit, k, v, k_tiles, v_tiles, offset_k, offset_v, page,
            first_key + i_b * BK, (i % STEPS) * BN, key_stop, b_own, selects(b_bits, o_i), scale,
            p_k_scale, p_v_scale, stride_kp, stride_kt, stride_vp, stride_vt, stride_ksp,
            stride_vsp, DIM, DIM_V, BD, BDV, BN, False, TMA, PAGED, SCALED, UNITS,
            PRECISION)  # fmt: skip
        last = i % STEPS == STEPS - 1
        if PAGED:
            page = tl.where(last, next_page, page)
            ahead = tl.where(last, tl.load(p_id + tl.minimum(i // STEPS + 2, count - 1)), ahead)
        if STEPS == 1:
            i_b, b_bits = next_b, next_bits
        else:
            i_b, b_bits = tl.where(last, next_b, i_b), tl.where(last, next_bits, b_bits)
    for i in range(inner * STEPS, count * STEPS):
        i_b, b_bits = load_block(p_id, p_mask, i // STEPS)
        b_top, b_sum, b_o, unit = attend_step(
            b_q, b_top, b_sum, b_o, unit, k, v, k_tiles, v_tiles, offset_k, offset_v,
            load_page(p_table, i_b, stride_tb, PAGED), first_key + i_b * BK, (i % STEPS) * BN,
            key_stop, b_own, selects(b_bits, o_i), scale, p_k_scale, p_v_scale, stride_kp,
            stride_kt, stride_vp, stride_vt, stride_ksp, stride_vsp, DIM, DIM_V, BD, BDV, BN, True,
            False, PAGED, SCALED, UNITS, PRECISION)  # fmt: skip

    if UNITS:
        b_o *= unit
    o_x = o_t * (HKV * G) + o_h  # [BM] row of out
    if FOLD:
        o_s = tl.arange(0, P)
        b_count = tl.load(part_counts + o_t * HKV + i_r, mask=m_m, other=0)
        m_s = o_s[None, :] < b_count[:, None]
        p_s = o_x[:, None] * TOP_K + o_s[None, :]
        b_tops = tl.load(part_tops + p_s, mask=m_s, other=LOWEST)
        b_totals = tl.load(part_totals + p_s, mask=m_s, other=0.0)
        b_most = tl.maximum(b_top, tl.max(b_tops, 1))
        b_decay = tl.exp2((b_top - b_most) * scale)
        b_sum = b_sum * b_decay + tl.sum(
            slot_weight(b_tops, b_totals, b_most[:, None], scale), 1)  # fmt: skip
        b_o = b_o * b_decay[:, None]
        b_top = b_most
        for i_s in range(0, tl.max(b_count)):
            m_o = i_s < b_count
            p_x = o_x * TOP_K + i_s
            b_w = slot_weight(tl.load(part_tops + p_x, mask=m_o, other=LOWEST),
                              tl.load(part_totals + p_x, mask=m_o, other=0.0), b_top,
                              scale)  # fmt: skip
            b_o += b_w[:, None] * load_tile(parts + p_x * DIM_V, m_o, o_dv, DIM_V).to(tl.float32)
    store_tile(out + o_x * DIM_V, m_m, o_dv, b_o / b_sum[:, None], DIM_V)
    tl.store(lse + o_x, b_top * (scale * LN2) + tl.log(b_sum), mask=m_m)


def walk(
    q: Float[Tensor, "Tq Hq D"], k: Float[Tensor, "*where Hkv D"],
    v: Float[Tensor, "*where Hkv Dv"], sequences: Sequences, block_size: int,
    block_ids: Int[Tensor, "tiles Hkv U"], row_masks: Int[Tensor, "tiles Hkv U"],
    counts: Int[Tensor, "tiles Hkv"], tile_size: int, softmax_scale: float,
    slots: Slots | None = None, into: Output | None = None, tile: TileConfig | None = None,
    pages: Pages | None = None,
) -> Output:  # fmt: skip
    """Walk the first `counts` blocks of each tile; then fold in the slots of other blocks.

    With `pages`, k and v are pages.
    """
    (n_q, heads, dim), groups, dim_v = q.shape, k.shape[-2], v.shape[-1]
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
    fold = slots is not None
    parts = (
        (slots.out, slots.top, slots.total, slots.counts)
        if fold
        else (into.out, into.lse, into.lse, counts)
    )
    top_k = slots.top.shape[-1] if fold else 1
    key_tiles = descriptors(k, v, tile.keys, pages) if tile.descriptors else None
    owners = counts if pages is None else tile_owners(sequences, tile_size, q.device)
    walk_kernel[len(tiles), groups, triton.cdiv(group, some)](
        q, k, v, *(key_tiles or (k, v)), tiles, block_ids, row_masks, counts, owners,
        *page_arguments(pages, k, v), *parts, into.out, into.lse, softmax_scale * LOG2E.value,
        block_ids.shape[2], *q.stride()[:2], *k.stride()[-3:-1], *v.stride()[-3:-1], G=group,
        HEADS=some, HKV=groups, DIM=dim, DIM_V=dim_v, BD=pad(dim), BDV=pad(dim_v), BK=block_size,
        BN=tile.keys, BM=positions * some, TOP_K=top_k, P=pad(top_k, 1), FOLD=fold,
        TMA=key_tiles is not None, PAGED=pages is not None,
        SCALED=pages is not None and pages.k_scales is not None,
        UNITS=pages is not None and pages.mild, PRECISION=is_exact(q), **tile.launch(),
    )  # fmt: skip
    return into


def descriptors(
    k: Tensor, v: Tensor, keys: int, pages: Pages | None
) -> tuple[TensorDescriptor, TensorDescriptor] | None:
    """Descriptors of keys and values, packed or in pages; None where the copy engine cannot."""
    if pages is None:
        found = can_describe(k, k.shape[-1]) and can_describe(v, v.shape[-1])
        return (describe(k, keys), describe(v, keys)) if found else None
    matrices = page_matrix(k), page_matrix(v)
    if matrices[0] is None or matrices[1] is None:
        return None
    of_k, of_v = (describe_matrix(m, keys, x.shape[-1]) for m, x in zip(matrices, (k, v)))
    return of_k, of_v


@on_its_device
def attend_union(
    q: Float[Array, "Tq Hq D"], k: Float[Array, "Tk Hkv D"], v: Float[Array, "Tk Hkv Dv"],
    tile_union: TileUnion, softmax_scale: float,
) -> Output:  # fmt: skip
    """Attention by a running softmax along each tile's union (R9, R10)."""
    require_kernels(tile_union.block_size, q=q, k=k, v=v)
    tile_union = contiguous(tile_union)
    ids, masks = tile_union.block_ids, tile_union.row_masks
    counts = (ids >= 0).sum(-1, dtype=torch.int32)
    return walk(
        q, k, v, tile_union.sequences, tile_union.block_size, ids, masks, counts,
        tile_union.tile_size, softmax_scale,
    )  # fmt: skip
