"""What the main branch looks at: each edge's mean of its heads' probabilities (eq. 9, R17).

    for each work item (block of one group, edges start ... stop):          # KV-outer
        for each edge (query t, slot s):
            P[t, group, s] = mean over the group's heads of
                exp(softmax_scale * (K q^T - top) - log_total)    # or softmax_scale * K q^T - lse

What the fast form changes:
 1. Edges are tiles of neighbouring queries (tile_edges.py), rows that did not select the block
    are read as zeros and written nowhere.
 2. Keys lie along the rows, so a query's heads lie side by side in a thread's registers: their mean
    costs few exchanges between threads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from msa.triton_impl.tile_edges import TileEdges, load_edge
from msa.triton_impl.tiles import LOG2E, along, block_table, heads_of, is_exact, load_keys, pad
from msa.triton_impl.tuning import TileConfig, choose


@triton.jit
def teacher_kernel(q, k, top, log_total, indices, rows, starts, stops, records, first_keys,
                   key_stops, teacher, scale, n_blocks, stride_qt, stride_qh, stride_kt, stride_kh,
                   G: tl.constexpr, HEADS: tl.constexpr, HKV: tl.constexpr, TOP_K: tl.constexpr,
                   P: tl.constexpr, DIM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
                   BN: tl.constexpr, E: tl.constexpr, DENSE: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """BN keys of one item; E queries x HEADS rows at a time."""
    i_item, i_n = tl.program_id(0), tl.program_id(1) * BN
    start, stop = tl.load(starts + i_item), tl.load(stops + i_item)
    if start < stop:
        row = tl.load(rows + i_item)
        i_r, i_b = row // n_blocks, row % n_blocks
        first_block, key_stop = tl.load(first_keys + i_b), tl.load(key_stops + i_b)
        first = first_block + i_n
        o_d, o_n, o_q = tl.arange(0, BD), tl.arange(0, BN), tl.arange(0, E)
        o_i, o_g = tl.arange(0, E * HEADS) // HEADS, tl.arange(0, E * HEADS) % HEADS
        p_k = k + along(i_r, stride_kh)
        p_tile = q + along(o_i, stride_qt) + along(i_r * G + o_g, stride_qh)  # [E * HEADS]
        b_k = load_keys(p_k, first, key_stop, stride_kt, o_d, DIM, BD, BN)  # [BN, BD]
        i_id = i_b - tl.load(records + start * 4 + 3)  # the block's number in its sequence
        i_t, own, bits = load_edge(records, start)
        for i_e in range(start, stop):
            next_t, next_own, next_bits = load_edge(records, tl.minimum(i_e + 1, stop - 1))
            p_t = i_t.to(tl.int64)
            m_q = ((bits >> o_q) & 1) != 0
            o_x = o_q * HKV + i_r  # [E] (query, group) pair, from the tile's first query on
            b_slot = tl.full([E], 0, tl.int32) + i_id
            if not DENSE:
                o_s = tl.arange(0, P)[None, :]
                b_ids = tl.load(indices + p_t * (HKV * TOP_K) + (o_x[:, None] * TOP_K + o_s),
                                mask=m_q[:, None] & (o_s < TOP_K), other=-1)  # fmt: skip
                b_slot = tl.sum(tl.where(b_ids == i_id, o_s, 0), 1)  # [E]
            b_p = tl.zeros([BN, E], tl.float32)
            for i_c in tl.static_range(0, G, HEADS):
                m_m = (((bits >> o_i) & 1) != 0) & (i_c + o_g < G)
                o_h = i_r * G + i_c + o_g
                p_q = p_tile + (along(i_t, stride_qt) + along(i_c, stride_qh))
                b_q = tl.load(p_q[:, None] + o_d[None, :],
                              mask=m_m[:, None] & (o_d < DIM)[None, :], other=0.0)  # fmt: skip
                p_x = p_t * (HKV * G) + (o_i * (HKV * G) + o_h)
                b_log = tl.load(log_total + p_x, mask=m_m, other=float("inf")) * LOG2E
                b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BN, E * HEADS]
                if top is not None:
                    b_s -= tl.load(top + p_x, mask=m_m, other=0.0)[None, :]
                b_h = tl.exp2(b_s * scale - b_log[None, :])
                b_p += tl.sum(tl.reshape(b_h, [BN, E, HEADS]), 2)
            m_s = (first + o_n)[:, None] <= (own + o_q)[None, :]
            b_p = tl.where(m_s, b_p * (1.0 / G), 0.0)
            p_x = teacher + ((p_t * HKV + o_x) * TOP_K + b_slot) * BK + i_n
            tl.store(p_x[None, :] + o_n[:, None], b_p, mask=m_q[None, :])
            i_t, own, bits = next_t, next_own, next_bits


def teach(
    q: Float[Tensor, "Tq Hq D"],
    k: Float[Tensor, "Tk Hkv D"],
    sums: tuple[Float[Tensor, "Tq Hq"] | None, Float[Tensor, "Tq Hq"]],
    indices: Int[Tensor, "Tq Hkv k"],
    edges: TileEdges,
    softmax_scale: float,
    dense: bool = False,
    tile: TileConfig | None = None,
) -> Float[Tensor, "Tq Hkv k Bk"]:
    """The teacher in the slots of the edges, float32; slots that no edge owns are not written.

    Args:
        sums: those of `softmax_sums`; or None and the LSE, where only that is known.
        dense: slot b is block b, and `indices` gives the shape alone.
    """
    top, log_total = sums
    schedule, index = edges.schedule, edges.schedule.reverse_index
    items, sequences, block = len(schedule.rows), index.sequences, index.block_size
    (n_q, heads, dim), groups, top_k = q.shape, k.shape[1], indices.shape[2]
    group, positions = heads // groups, pad(edges.tile_size, 1)
    tile = tile or choose("teacher", q.dtype, pad(dim), block)
    some = heads_of(group, positions, tile.rows)
    teacher = torch.empty((n_q, groups, top_k, block), dtype=torch.float32, device=q.device)
    if items:
        teacher_kernel[items, block // tile.keys](
            q, k, top, log_total, indices, schedule.rows, schedule.starts, schedule.stops,
            edges.records, *block_table(sequences, block, q.device), teacher,
            softmax_scale * LOG2E.value, sequences.cu_blocks(block)[-1], *q.stride()[:2],
            *k.stride()[:2], G=group, HEADS=some, HKV=groups, TOP_K=top_k, P=pad(top_k, 1),
            DIM=dim, BD=pad(dim), BK=block, BN=tile.keys, E=positions, DENSE=dense,
            PRECISION=is_exact(q), **tile.launch(),
        )  # fmt: skip
    return teacher
