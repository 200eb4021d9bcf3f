"""The loss of the index branch, KL(main || index), and its gradient (eq. 9-10, R17).

    for each work item (block of one group, edges start ... stop):          # KV-outer
        for each edge (query t, slot s):
            log P_idx = index_scale * (q_idx k_idx^T - top) - log_total     # the student
            loss[t, group, s] = sum of P (log P - log P_idx), 0 where P = 0
            dS = P_idx - P
            d_k_idx += dS^T q_idx;  d_q_idx[t, group, s] = dS k_idx
    then sums over items and over slots, in order

What the fast form changes:
 1. All groups share the index keys, so edges alone are the rows: a tile is 64 gathered queries.
 2. Of all numbers for each query and token, only the teacher's probabilities are ever written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from msa.ir import Schedule
from msa.triton_impl.item_sums import sum_items, sum_slots
from msa.triton_impl.launch import is_exact, pad
from msa.triton_impl.tables import block_table, query_table
from msa.triton_impl.tile_verbs import (
    along,
    edge_rows,
    fast_log,
    load_item,
    load_keys,
    load_tile,
    store_tile,
)
from msa.triton_impl.tuning import TileConfig, choose


@triton.jit
def index_loss_kernel(q_idx, k_idx, teacher, top, log_total, rows, starts, stops, query_ids, slots,
                 own_keys, first_keys, key_stops, losses, d_q, d_k, scale, n_blocks, stride_qt,
                 stride_qh, stride_kt, HKV: tl.constexpr, TOP_K: tl.constexpr, DIM: tl.constexpr,
                 BD: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
                 GRADIENT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """BN keys of one item; BM edges at a time.

    Parameters:
        q_idx: [Tq, Hkv, Di], 16-bit or float32
        k_idx: [Tk, Di], as q_idx
        teacher: [Tq, Hkv, k, Bk], float32; probabilities
        top: [Tq, Hkv], float32; each row's highest score, not scaled
        log_total: [Tq, Hkv], float32, natural logarithm; see `softmax_sums`
        rows: [items], int32; the row of the reverse index: group * n_blocks + block
        starts, stops: [items], int64; the item's edges
        query_ids, slots: [edges], int32; query of an edge, place of the block in its selection
        own_keys: [Tq], int32; each query's own key among the packed keys
        first_keys, key_stops: [blocks], int32; a `block_table`
        losses: [Tq, Hkv, k, Bk / BN], float32; written in the slots of the edges
        d_q: [Tq, Hkv, k, Bk / BN, Di], float32; not yet times the scale, written with GRADIENT only
        d_k: [items, Bk, Di], float32; not yet times the scale, written with GRADIENT only
        scale: float; index scale
        n_blocks: int; blocks of all sequences
        stride_qt, stride_kt: elements from one token of q_idx, k_idx to the next
        stride_qh: elements from one group of q_idx to the next
        HKV: groups
        TOP_K: k
        DIM, BD: Di, and rounded up to a power of two
        BK, BN: keys of a block, keys of one program
        BM: edges of one product
        GRADIENT: bool; write d_q and d_k
        PRECISION: input precision of the products
    """
    i_item, i_n = tl.program_id(0), tl.program_id(1)
    start, stop = tl.load(starts + i_item), tl.load(stops + i_item)
    if start < stop:
        i_r, first, key_stop = load_item(rows, first_keys, key_stops, n_blocks, i_item, i_n * BN)
        o_d, o_n = tl.arange(0, BD), tl.arange(0, BN)
        b_k = load_keys(k_idx, first, key_stop, stride_kt, o_d, DIM, BN)  # [BN, BD]
        b_dk = tl.zeros([BN, BD], tl.float32)
        length = (stop - start).to(tl.int32)
        for x in range(0, length, BM):
            b_t, _, m_m = edge_rows(query_ids + start, x, length, 1, 1, BM)
            b_slot = tl.load(slots + start + x + tl.arange(0, BM), mask=m_m, other=0)
            b_own = tl.load(own_keys + b_t, mask=m_m, other=-1)
            p_q = q_idx + along(b_t, stride_qt) + along(i_r, stride_qh)  # [BM]
            b_q = load_tile(p_q, m_m, o_d, DIM)  # [BM, BD]
            o_x = b_t * HKV + i_r
            b_top = tl.load(top + o_x, mask=m_m, other=0.0)[:, None]
            b_log = tl.load(log_total + o_x, mask=m_m, other=0.0)[:, None]
            p_p = teacher + ((o_x * TOP_K + b_slot) * BK + i_n * BN)[:, None] + o_n[None, :]
            b_p = tl.load(p_p, mask=m_m[:, None], other=0.0)  # [BM, BN]
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BN]
            m_s = (first + o_n)[None, :] <= b_own[:, None]
            b_s = tl.where(m_s & (b_s == b_s), b_s, float("-inf"))
            b_student = tl.where(b_s == b_top, 0.0, (b_s - b_top) * scale) - b_log
            b_gap = b_p * (fast_log(b_p) - b_student)
            b_loss = tl.sum(tl.where(m_s & (b_p != 0.0), b_gap, 0.0), 1)  # NaN is not 0
            p_x = (o_x * TOP_K + b_slot) * (BK // BN) + i_n
            tl.store(losses + p_x, b_loss, mask=m_m)
            if GRADIENT:
                b_ds = tl.where(m_s, tl.exp(b_student) - b_p, 0.0).to(b_q.dtype)
                b_dk = tl.dot(tl.trans(b_ds), b_q, b_dk, input_precision=PRECISION)
                b_dq = tl.dot(b_ds, b_k, input_precision=PRECISION)
                store_tile(d_q + p_x * DIM, m_m, o_d, b_dq, DIM)
        if GRADIENT:
            o_y = i_item.to(tl.int64) * BK + i_n * BN + o_n  # [BN] row of d_k
            tl.store(d_k + o_y[:, None] * DIM + o_d[None, :], b_dk, mask=(o_d < DIM)[None, :])


def index_loss(
    q_idx: Float[Tensor, "Tq Hkv Di"], k_idx: Float[Tensor, "Tk Di"],
    teacher: Float[Tensor, "Tq Hkv k Bk"], top: Float[Tensor, "Tq Hkv"],
    log_total: Float[Tensor, "Tq Hkv"], schedule: Schedule, index_scale: float,
    gradients: tuple[Float[Tensor, "Tq Hkv Di"], Float[Tensor, "Tk Di"]] | None = None,
    tile: TileConfig | None = None,
) -> Float[Tensor, ""]:  # fmt: skip
    """The KL summed over queries and groups, float64.

    `gradients`: float32 and contiguous; d_q_idx is written and d_k_idx added to.
    """
    index, device = schedule.reverse_index, q_idx.device
    sequences, block = index.sequences, index.block_size
    (n_q, groups, dim), items = q_idx.shape, len(schedule.rows)
    tile = tile or choose("index_loss", q_idx.dtype, pad(dim), block)
    pieces = block // tile.keys
    losses = torch.zeros((n_q, groups, index.top_k, pieces), dtype=torch.float32, device=device)
    parts = [losses, losses]
    if gradients:
        shapes = ((*losses.shape, dim), (items, block, dim))
        parts = [torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes]
    if items:
        own = query_table(sequences, block, device)[0]
        index_loss_kernel[items, pieces](
            q_idx, k_idx, teacher, top, log_total, schedule.rows, schedule.starts, schedule.stops,
            index.query_ids, index.slots, own, *block_table(sequences, block, device), losses,
            *parts, index_scale, sequences.cu_blocks(block)[-1], *q_idx.stride()[:2],
            k_idx.stride(0), HKV=groups, TOP_K=index.top_k, DIM=dim, BD=pad(dim), BK=block,
            BN=tile.keys, BM=tile.rows, GRADIENT=gradients is not None, PRECISION=is_exact(q_idx),
            **tile.launch(),
        )  # fmt: skip
    if gradients:
        sum_slots(parts[0], index.counts, gradients[0], index_scale)
        sum_items(parts[1], schedule, gradients[1][:, None], index_scale, add=True)
    return losses.sum(dtype=torch.float64)
