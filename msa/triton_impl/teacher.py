"""What the main branch looks at: each edge's mean of its heads' probabilities (eq. 9, R17).

    for each work item (block of one group, edges start ... stop):          # KV-outer
        for each edge (query t, slot s):
            P[t, group, s] = mean over the group's heads of exp(softmax_scale * q K^T - lse)

What the fast form changes: keys lie along the rows, so that a query's heads lie side by side in a
thread's registers and their mean costs few exchanges between threads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from msa.ir import Schedule
from msa.triton_impl.tiles import (
    LOG2E,
    block_table,
    edge_rows,
    is_exact,
    load_keys,
    pad,
    query_table,
)
from msa.triton_impl.tuning import TileConfig, choose


@triton.jit
def teacher_kernel(q, k, lse, rows, starts, stops, query_ids, slots, own_keys, first_keys,
                   key_stops, teacher, scale, n_blocks, stride_qt, stride_qh, stride_kt, stride_kh,
                   G: tl.constexpr, GP: tl.constexpr, HQ: tl.constexpr, HKV: tl.constexpr,
                   TOP_K: tl.constexpr, DIM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
                   BN: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """BN keys of one item; BM = E edges x GP rows at a time."""
    i_item, i_n = tl.program_id(0), tl.program_id(1) * BN
    E: tl.constexpr = BM // GP
    start, stop = tl.load(starts + i_item), tl.load(stops + i_item)
    if start < stop:
        row = tl.load(rows + i_item)
        i_r, i_b = row // n_blocks, row % n_blocks
        first, key_stop = tl.load(first_keys + i_b) + i_n, tl.load(key_stops + i_b)
        o_d, o_n = tl.arange(0, BD), first + tl.arange(0, BN)
        b_k = load_keys(k + i_r.to(tl.int64) * stride_kh, first, key_stop, stride_kt, o_d, DIM, BD,
                        BN)  # [BN, BD]  # fmt: skip
        edges = (stop - start).to(tl.int32)
        for i_e in range(0, edges, E):
            b_t, o_g, m_m = edge_rows(query_ids + start, i_e * GP, edges * GP, G, GP, BM)
            o_h = i_r * G + o_g
            p_q = q + b_t[:, None] * stride_qt + o_h[:, None] * stride_qh + o_d[None, :]
            b_q = tl.load(p_q, mask=m_m[:, None] & (o_d < DIM)[None, :], other=0.0)
            b_lse = tl.load(lse + b_t * HQ + o_h, mask=m_m, other=float("inf")) * LOG2E
            b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BN, BM]
            b_p = tl.exp2(b_s * scale - b_lse[None, :])
            b_p = tl.sum(tl.reshape(b_p, [BN, E, GP]), 2) * (1.0 / G)  # [BN, E]
            o_e = start + i_e + tl.arange(0, E)
            m_e = o_e < stop
            b_i = tl.load(query_ids + o_e, mask=m_e, other=0)
            b_slot = tl.load(slots + o_e, mask=m_e, other=0)
            b_own = tl.load(own_keys + b_i, mask=m_e, other=0)
            b_p = tl.where(o_n[:, None] <= b_own[None, :], b_p, 0.0)
            p_x = teacher + ((b_i.to(tl.int64) * HKV + i_r) * TOP_K + b_slot) * BK
            tl.store(p_x[None, :] + (i_n + tl.arange(0, BN))[:, None], b_p, mask=m_e[None, :])


def teach(
    q: Float[Tensor, "Tq Hq D"],
    k: Float[Tensor, "Tk Hkv D"],
    lse: Float[Tensor, "Tq Hq"],
    schedule: Schedule,
    softmax_scale: float,
    tile: TileConfig | None = None,
) -> Float[Tensor, "Tq Hkv k Bk"]:
    """The teacher in the slots of the edges, float32; slots that no edge owns are not written."""
    index, device = schedule.reverse_index, q.device
    sequences, block = index.sequences, index.block_size
    (n_q, heads, dim), groups = q.shape, k.shape[1]
    group, items = heads // groups, len(schedule.rows)
    tile = tile or choose("teacher", q.dtype, pad(dim), block)
    teacher = torch.empty((n_q, groups, index.top_k, block), dtype=torch.float32, device=device)
    if items:
        own = query_table(sequences, block, device)[0]
        teacher_kernel[items, block // tile.keys](
            q, k, lse, schedule.rows, schedule.starts, schedule.stops, index.query_ids,
            index.slots, own, *block_table(sequences, block, device), teacher,
            softmax_scale * LOG2E.value, sequences.cu_blocks(block)[-1], *q.stride()[:2],
            *k.stride()[:2], G=group, GP=pad(group, 1), HQ=heads, HKV=groups, TOP_K=index.top_k,
            DIM=dim, BD=pad(dim), BK=block, BN=tile.keys, BM=max(tile.rows, pad(group, 1)),
            PRECISION=is_exact(q), **tile.launch(),
        )  # fmt: skip
    return teacher
