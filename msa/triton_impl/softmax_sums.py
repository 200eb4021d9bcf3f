"""Maximum and sum of a softmax over selected tokens, without its values (R10, R17).

    for each work item (block of one group, edges start ... stop):          # KV-outer
        for each edge (query t, slot s), for each head of the group:
            S = q K^T, tokens after t's own key masked
            top[t, head, s] = max S;  total[t, head, s] = sum exp(scale * (S - top))
    for each query and head:
        top = max over s of top[s]
        log_total = log of the sum over s of total[s] * exp(scale * (top[s] - top))

A softmax is then exp(scale * (S - top) - log_total), and its LSE is scale * top + log_total. Two
numbers are kept because the LSE alone loses the softmax where the maximum is large or infinite.

    main branch    a row that holds NaN or +inf, or nothing but -inf, has log_total = NaN
    index branch   NaN -> -inf (R4); where the maximum is infinite, the scores equal to it share all
                   the mass

What the fast form changes:
 1. Keys are loaded once per item and stay on chip. Edges times heads make one tile of rows.
 2. Every edge owns its slot: no atomics, and a second kernel merges the slots in order (R19).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from msa.ir import Schedule
from msa.triton_impl.launch import is_exact, pad
from msa.triton_impl.tables import block_table, query_table
from msa.triton_impl.tile_verbs import (
    LOG2E,
    LOWEST,
    along,
    edge_rows,
    load_item,
    load_keys,
    load_tile,
)
from msa.triton_impl.tuning import EVERY_LAUNCH, TileConfig, choose


@triton.jit
def block_sums_kernel(q, k, rows, starts, stops, query_ids, slots, own_keys, first_keys, key_stops,
                      tops, totals, scale, n_blocks, stride_qt, stride_qh, stride_kt, stride_kh,
                      G: tl.constexpr, GP: tl.constexpr, HQ: tl.constexpr, TOP_K: tl.constexpr,
                      DIM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
                      BM: tl.constexpr, INDEX: tl.constexpr,
                      PRECISION: tl.constexpr):  # fmt: skip
    """BN keys of one item; BM = edges x GP rows at a time.

    Parameters:
        q: [Tq, Hq, D], 16-bit or float32
        k: [Tk, Hkv, D], as q
        rows: [items], int32; the row of the reverse index: group * n_blocks + block
        starts, stops: [items], int64; the item's edges
        query_ids, slots: [edges], int32; query of an edge, place of the block in its selection
        own_keys: [Tq], int32; each query's own key among the packed keys
        first_keys, key_stops: [blocks], int32; a `block_table`
        tops, totals: [Tq, Hq, k, Bk / BN], float32; highest score, not scaled, and sum of
            exp2(scale * (score - highest)), written in the slots of the edges
        scale: float; softmax or index scale times log2(e)
        n_blocks: int; blocks of all sequences
        stride_qt, stride_kt: elements from one token of q, k to the next
        stride_qh, stride_kh: elements from one head of q, k to the next
        G, GP: query heads of a group, and rounded up to a power of two
        HQ: query heads of all groups
        TOP_K: k
        DIM, BD: D, and rounded up to a power of two
        BK, BN: keys of a block, keys of one program
        BM: rows of one product
        INDEX: bool; scores are those of the index branch
        PRECISION: input precision of the products
    """
    i_item, i_n = tl.program_id(0), tl.program_id(1)
    start, stop = tl.load(starts + i_item), tl.load(stops + i_item)
    if start < stop:
        i_r, first, key_stop = load_item(rows, first_keys, key_stops, n_blocks, i_item, i_n * BN)
        o_d, o_n = tl.arange(0, BD), first + tl.arange(0, BN)
        p_k = k + along(i_r, stride_kh)
        b_k = load_keys(p_k, first, key_stop, stride_kt, o_d, DIM, BN)  # [BN, BD]
        length = (stop - start).to(tl.int32) * GP
        for x in range(0, length, BM):
            b_t, o_g, m_m = edge_rows(query_ids + start, x, length, G, GP, BM)
            b_slot = tl.load(slots + start + (x + tl.arange(0, BM)) // GP, mask=m_m, other=0)
            b_own = tl.load(own_keys + b_t, mask=m_m, other=0)
            o_h = i_r * G + o_g
            p_q = q + along(b_t, stride_qt) + along(o_h, stride_qh)  # [BM]
            b_q = load_tile(p_q, m_m, o_d, DIM)  # [BM, BD]
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BN]
            m_s = o_n[None, :] <= b_own[:, None]
            if INDEX:
                b_s = tl.where(m_s & (b_s == b_s), b_s, float("-inf"))
                b_top = tl.max(b_s, 1)
                b_x = tl.where(b_s == b_top[:, None], 0.0, (b_s - b_top[:, None]) * scale)
            else:
                b_s = tl.where(m_s, b_s, float("-inf"))
                b_top = tl.maximum(tl.max(b_s, 1), LOWEST)
                b_x = (b_s - b_top[:, None]) * scale
            b_total = tl.sum(tl.where(m_s, tl.exp2(b_x), 0.0), 1)
            p_x = ((b_t * HQ + o_h) * TOP_K + b_slot) * (BK // BN) + i_n
            tl.store(tops + p_x, b_top, mask=m_m)
            tl.store(totals + p_x, b_total, mask=m_m)


@triton.jit
def merge_sums_kernel(tops, totals, counts, top, log_total, scale, n, G: tl.constexpr,
                      WIDTH: tl.constexpr, P: tl.constexpr, R: tl.constexpr, PIECES: tl.constexpr,
                      INDEX: tl.constexpr):  # fmt: skip
    """R (query, head) pairs; WIDTH parts each, of which the first count * PIECES are in use.

    Parameters:
        tops, totals: [Tq, Hq, WIDTH], float32; what `block_sums_kernel` wrote
        counts: [Tq, Hkv], int32; slots in use
        top: [Tq, Hq], float32; highest score, not scaled, written
        log_total: [Tq, Hq], float32, natural logarithm of the sum of exp2(scale * (score - top));
            written
        scale: float; softmax or index scale times log2(e)
        n: int; Tq * Hq
        G: query heads of a group
        WIDTH: k * PIECES
        P: parts of one step, a power of two
        R: pairs of one program
        PIECES: parts of a slot
        INDEX: bool; scores are those of the index branch
    """
    o_x = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    m_x = o_x < n
    b_count = tl.load(counts + o_x // G, mask=m_x, other=0) * PIECES
    b_most = tl.full([R, P], float("-inf"), tl.float32)
    for i_s in range(0, WIDTH, P):
        o_s = i_s + tl.arange(0, P)[None, :]
        p_x = o_x[:, None] * WIDTH + o_s
        b_tops = tl.load(tops + p_x, mask=o_s < b_count[:, None], other=float("-inf"))
        b_most = tl.maximum(b_most, b_tops)
    b_top = tl.max(b_most, 1)  # [R]
    b_sums = tl.zeros([R, P], tl.float32)
    for i_s in range(0, WIDTH, P):
        o_s = i_s + tl.arange(0, P)[None, :]
        p_x, m_s = o_x[:, None] * WIDTH + o_s, o_s < b_count[:, None]
        b_tops = tl.load(tops + p_x, mask=m_s, other=float("-inf"))
        b_totals = tl.load(totals + p_x, mask=m_s, other=0.0)
        b_x = tl.where(b_tops == b_top[:, None], 0.0, (b_tops - b_top[:, None]) * scale)
        b_sums += b_totals * tl.exp2(b_x)
    b_total = tl.sum(b_sums, 1)  # [R]
    if not INDEX:
        b_total = tl.where(b_total > 0.0, b_total, float("nan"))
    tl.store(top + o_x, b_top, mask=m_x)
    tl.store(log_total + o_x, tl.log(b_total), mask=m_x)


def softmax_sums(
    q: Float[Tensor, "Tq Hq D"], k: Float[Tensor, "Tk Hkv D"],
    schedule: Schedule, scale: float, is_index: bool, tile: TileConfig | None = None,
) -> tuple[Float[Tensor, "Tq Hq"], Float[Tensor, "Tq Hq"]]:  # fmt: skip
    """Highest unscaled score and log of the sum of exp(scale * (score - highest)), float32.

    is_index: the scores are those of the index branch, which may be infinite or NaN (see above).
    """
    index, device = schedule.reverse_index, q.device
    sequences, block = index.sequences, index.block_size
    (n_q, heads, dim), groups = q.shape, k.shape[1]
    group, items = heads // groups, len(schedule.rows)
    tile = tile or choose("sums", q.dtype, pad(dim), block)
    pieces = block // tile.keys
    width = index.top_k * pieces
    tops, totals = (
        torch.empty((n_q, heads, width), dtype=torch.float32, device=device) for _ in range(2)
    )
    top, log_total = (
        torch.empty((n_q, heads), dtype=torch.float32, device=device) for _ in range(2)
    )
    if items:
        own = query_table(sequences, block, device)[0]
        block_sums_kernel[items, pieces](
            q, k, schedule.rows, schedule.starts, schedule.stops, index.query_ids, index.slots,
            own, *block_table(sequences, block, device), tops, totals, scale * LOG2E.value,
            sequences.cu_blocks(block)[-1], *q.stride()[:2], *k.stride()[:2], G=group,
            GP=pad(group, 1), HQ=heads, TOP_K=index.top_k, DIM=dim, BD=pad(dim), BK=block,
            BN=tile.keys, BM=tile.rows, INDEX=is_index, PRECISION=is_exact(q), **tile.launch(),
        )  # fmt: skip
        some = max(1, 1024 // pad(width, 1))
        merge_sums_kernel[triton.cdiv(n_q * heads, some),](
            tops, totals, index.counts, top, log_total, scale * LOG2E.value, n_q * heads,
            G=group, WIDTH=width, P=min(pad(width, 1), 256), R=some, PIECES=pieces, INDEX=is_index,
            **EVERY_LAUNCH,
        )  # fmt: skip
    return top, log_total
