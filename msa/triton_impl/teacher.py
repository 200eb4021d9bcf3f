"""The teacher of the index: the mean of the main branch's probabilities over heads (eq. 9, R17).

    for each work item (block of one group, edges start ... stop):          # KV-outer
        for each edge (query t, slot s):
            P[t, group, s] = mean over the group's heads of
                exp(softmax_scale * (K q^T - top) - log_total)    # or softmax_scale * K q^T - lse

What the fast form changes:
 1. Edges are tiles of neighbouring queries (tile_reverse_index.py). Rows that did not select the
    block are read as zeros and not written.
 2. Keys lie along the rows, so a query's heads lie side by side in a thread's registers: their mean
    costs few exchanges between threads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from msa.triton_impl.launch import heads_of, is_exact, pad
from msa.triton_impl.tables import block_table
from msa.triton_impl.tile_reverse_index import TileEdges, load_edge
from msa.triton_impl.tile_verbs import LOG2E, along, load_item, load_keys, load_tile
from msa.triton_impl.tile_walk import selects
from msa.triton_impl.tuning import TileConfig, choose


@triton.jit
def teacher_kernel(q, k, top, log_total, indices, rows, starts, stops, records, first_keys,
                   key_stops, teacher, scale, n_blocks, stride_qt, stride_qh, stride_kt, stride_kh,
                   G: tl.constexpr, HEADS: tl.constexpr, HKV: tl.constexpr, TOP_K: tl.constexpr,
                   P: tl.constexpr, DIM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
                   BN: tl.constexpr, E: tl.constexpr, DENSE: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """BN keys of one item; E queries x HEADS rows at a time.

    Parameters:
        q: [Tq, Hq, D], 16-bit or float32
        k: [Tk, Hkv, D], as q
        top: [Tq, Hq], float32; highest scores, not scaled, or None where log_total is the LSE
        log_total: [Tq, Hq], float32, natural logarithm; see `softmax_sums`
        indices: [Tq, Hkv, k], int32; the selection, read unless DENSE
        rows: [items], int32; the row of the reverse index: group * n_blocks + block
        starts, stops: [items], int64; the item's edges
        records: [edges, 4], int32; see `TileEdges`
        first_keys, key_stops: [blocks], int32; a `block_table`
        teacher: [Tq, Hkv, k, Bk], float32; probabilities, written in the slots of the edges
        scale: float; softmax scale times log2(e)
        n_blocks: int; blocks of all sequences
        stride_qt, stride_kt: elements from one token of q, k to the next
        stride_qh, stride_kh: elements from one head of q, k to the next
        G, HKV: query heads of a group, groups
        HEADS: heads of one product
        TOP_K, P: k, and rounded up to a power of two
        DIM, BD: D, and rounded up to a power of two
        BK, BN: keys of a block, keys of one program
        E: queries of a tile, a power of two
        DENSE: bool; the slot of a block is its number
        PRECISION: input precision of the products
    """
    i_item, i_n = tl.program_id(0), tl.program_id(1) * BN
    start, stop = tl.load(starts + i_item), tl.load(stops + i_item)
    if start < stop:
        i_r, first, key_stop = load_item(rows, first_keys, key_stops, n_blocks, i_item, i_n)
        o_d, o_n, o_q = tl.arange(0, BD), tl.arange(0, BN), tl.arange(0, E)
        o_i, o_g = tl.arange(0, E * HEADS) // HEADS, tl.arange(0, E * HEADS) % HEADS
        p_k = k + along(i_r, stride_kh)
        p_tile = q + along(o_i, stride_qt) + along(i_r * G + o_g, stride_qh)  # [E * HEADS]
        b_k = load_keys(p_k, first, key_stop, stride_kt, o_d, DIM, BN)  # [BN, BD]
        i_b = tl.load(rows + i_item) % n_blocks
        i_id = i_b - tl.load(records + start * 4 + 3)  # the block's number in its sequence
        i_t, own, bits = load_edge(records, start)
        for i_e in range(start, stop):
            next_t, next_own, next_bits = load_edge(records, tl.minimum(i_e + 1, stop - 1))
            p_t = i_t.to(tl.int64)
            m_q = selects(bits, o_q)
            o_x = o_q * HKV + i_r  # [E] (query, group) pair, from the tile's first query on
            b_slot = tl.full([E], 0, tl.int32) + i_id
            if not DENSE:
                o_s = tl.arange(0, P)[None, :]
                b_ids = tl.load(indices + p_t * (HKV * TOP_K) + (o_x[:, None] * TOP_K + o_s),
                                mask=m_q[:, None] & (o_s < TOP_K), other=-1)  # fmt: skip
                b_slot = tl.sum(tl.where(b_ids == i_id, o_s, 0), 1)  # [E]
            b_p = tl.zeros([BN, E], tl.float32)
            for i_c in tl.static_range(0, G, HEADS):
                m_m = selects(bits, o_i) & (i_c + o_g < G)
                o_h = i_r * G + i_c + o_g
                p_q = p_tile + (along(i_t, stride_qt) + along(i_c, stride_qh))
                b_q = load_tile(p_q, m_m, o_d, DIM)  # [E * HEADS, BD]
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


def teacher_probabilities(
    q: Float[Tensor, "Tq Hq D"], k: Float[Tensor, "Tk Hkv D"],
    sums: tuple[Float[Tensor, "Tq Hq"] | None, Float[Tensor, "Tq Hq"]],
    indices: Int[Tensor, "Tq Hkv k"], edges: TileEdges, softmax_scale: float, dense: bool = False,
    tile: TileConfig | None = None,
) -> Float[Tensor, "Tq Hkv k Bk"]:  # fmt: skip
    """The teacher in the slots of the edges, float32; slots that no edge owns are not written.

    Args:
        sums: what `softmax_sums` returned; or None and the LSE, where only the LSE is known.
        dense: slot b is block b, and only the shape of `indices` is used.
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
