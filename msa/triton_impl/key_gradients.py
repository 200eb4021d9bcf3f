"""Backward of attention, the keys' half: dK, dV of a block over the queries that read it (R18).

    for each work item (block of one group, edges start ... stop):          # KV-outer
        for each edge (query t), for each head of the group:
            P  = exp(softmax_scale * K q^T - lse)                           # recomputed
            dV += P dO            dP = V dO^T
            dS = P (dP - delta)   dK += softmax_scale * dS q    # delta = <dO, out> - dlse
    dK, dV of a block = the sum of its items, in order

What the fast form changes:
 1. Edges are tiles of neighbouring queries (tile_reverse_index.py): their rows lie side by side, so
    nothing is gathered. Rows of queries that did not select the block are read as zeros, with
    lse = +inf.
 2. Everything is transposed, keys along the rows: P and dS are the result of one product and the
    left operand of the next, and do not go through memory.
 3. The next edge's record is loaded one step ahead, so that its rows can be fetched early.
 4. Blocks that many queries read are cut into items. Each item writes its own sums, in float32, and
 a second kernel
    adds them up. No atomics, so the bits are the same every time (R19).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from msa.triton_impl.item_sums import sum_items
from msa.triton_impl.launch import heads_of, is_exact, pad
from msa.triton_impl.tables import block_table
from msa.triton_impl.tile_reverse_index import TileEdges, load_edge
from msa.triton_impl.tile_verbs import LOG2E, along, load_item, load_keys, load_tile
from msa.triton_impl.tile_walk import selects
from msa.triton_impl.tuning import TileConfig, choose


@triton.jit
def key_gradients_kernel(q, k, v, d_out, lse, delta, rows, starts, stops, records, first_keys,
                         key_stops, d_k, d_v, scale, n_blocks, stride_qt, stride_qh, stride_kt,
                         stride_kh, stride_vt, stride_vh, G: tl.constexpr, HEADS: tl.constexpr,
                         HKV: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
                         BD: tl.constexpr, BDV: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
                         BM: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """BN keys of one item; BM = query positions x HEADS rows at a time.

    Parameters:
        q: [Tq, Hq, D], 16-bit or float32
        k: [Tk, Hkv, D], as q
        v: [Tk, Hkv, Dv], as q
        d_out: [Tq, Hq, Dv], as q; the gradient of the output
        lse: [Tq, Hq], float32, natural logarithm; the forward's LSE
        delta: [Tq, Hq], float32; <d_out, out> - d_lse
        rows: [items], int32; the row of the reverse index: group * n_blocks + block
        starts, stops: [items], int64; the item's edges
        records: [edges, 4], int32; see `TileEdges`
        first_keys, key_stops: [blocks], int32; a `block_table`
        d_k: [items, Bk, D], float32; not yet times the softmax scale, written
        d_v: [items, Bk, Dv], float32; written
        scale: float; softmax scale times log2(e)
        n_blocks: int; blocks of all sequences
        stride_qt, stride_kt, stride_vt: elements from one token of q, k, v to the next
        stride_qh, stride_kh, stride_vh: elements from one head of q, k, v to the next
        G, HKV: query heads of a group, groups
        HEADS: heads of one product
        DIM, DIM_V: D, Dv
        BD, BDV: D, Dv rounded up to powers of two
        BK, BN: keys of a block, keys of one program
        BM: rows of one product
        PRECISION: input precision of the products
    """
    i_item, i_n = tl.program_id(0), tl.program_id(1) * BN
    start, stop = tl.load(starts + i_item), tl.load(stops + i_item)
    if start < stop:
        i_r, first, key_stop = load_item(rows, first_keys, key_stops, n_blocks, i_item, i_n)
        o_d, o_dv, o_n = tl.arange(0, BD), tl.arange(0, BDV), first + tl.arange(0, BN)
        o_i, o_g = tl.arange(0, BM) // HEADS, tl.arange(0, BM) % HEADS
        p_k, p_v = k + along(i_r, stride_kh), v + along(i_r, stride_vh)
        p_tile = q + along(o_i, stride_qt) + along(i_r * G + o_g, stride_qh)  # [BM]
        b_k = load_keys(p_k, first, key_stop, stride_kt, o_d, DIM, BN)  # [BN, BD]
        b_v = load_keys(p_v, first, key_stop, stride_vt, o_dv, DIM_V, BN)  # [BN, BDV]
        b_dk, b_dv = tl.zeros([BN, BD], tl.float32), tl.zeros([BN, BDV], tl.float32)
        i_t, own, bits = load_edge(records, start)
        for i_e in range(start, stop):
            next_t, next_own, next_bits = load_edge(records, tl.minimum(i_e + 1, stop - 1))
            for i_c in tl.static_range(0, G, HEADS):
                m_m = selects(bits, o_i) & (i_c + o_g < G)
                o_h = i_r * G + i_c + o_g
                p_q = p_tile + (along(i_t, stride_qt) + along(i_c, stride_qh))
                b_q = load_tile(p_q, m_m, o_d, DIM)  # [BM, BD]
                p_x = i_t.to(tl.int64) * (HKV * G)
                o_x = o_i * (HKV * G) + o_h  # [BM] row of out, from the tile's first on
                b_do = tl.load(d_out + p_x * DIM_V + (o_x[:, None] * DIM_V + o_dv[None, :]),
                               mask=m_m[:, None] & (o_dv < DIM_V)[None, :], other=0.0)  # fmt: skip
                b_lse = tl.load(lse + p_x + o_x, mask=m_m, other=float("inf")) * LOG2E
                b_delta = tl.load(delta + p_x + o_x, mask=m_m, other=0.0)
                b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BN, BM]
                b_p = tl.exp2(b_s * scale - b_lse[None, :])
                if own < first + BN - 1:
                    b_p = tl.where(o_n[:, None] <= (own + o_i)[None, :], b_p, 0.0)
                b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
                b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)  # [BN, BM]
                b_ds = b_p * (b_dp - b_delta[None, :])
                b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
            i_t, own, bits = next_t, next_own, next_bits
        o_y = i_item.to(tl.int64) * BK + i_n + tl.arange(0, BN)  # [BN] row of d_k and d_v
        m_d, m_dv = (o_d < DIM)[None, :], (o_dv < DIM_V)[None, :]
        tl.store(d_k + o_y[:, None] * DIM + o_d[None, :], b_dk, mask=m_d)
        tl.store(d_v + o_y[:, None] * DIM_V + o_dv[None, :], b_dv, mask=m_dv)


def key_gradients(
    q: Float[Tensor, "Tq Hq D"], k: Float[Tensor, "Tk Hkv D"], v: Float[Tensor, "Tk Hkv Dv"],
    d_out: Float[Tensor, "Tq Hq Dv"], lse: Float[Tensor, "Tq Hq"], delta: Float[Tensor, "Tq Hq"],
    edges: TileEdges, softmax_scale: float, tile: TileConfig | None = None,
    add_to: tuple[Float[Tensor, "Tk Hkv D"], Float[Tensor, "Tk Hkv Dv"]] | None = None,
) -> tuple[Float[Tensor, "Tk Hkv D"], Float[Tensor, "Tk Hkv Dv"]]:  # fmt: skip
    """dK and dV in the dtypes of k and v; d_out is contiguous, lse and delta are float32.

    The items leave 4 * Bk * (D + Dv) bytes each: one item for each block and group that is read,
    and one more for every KEY_TILES tiles that read it.

    Args:
        add_to: add to these tensors instead of making new ones.
    """
    schedule, index = edges.schedule, edges.schedule.reverse_index
    items, sequences, block = len(schedule.rows), index.sequences, index.block_size
    (_, heads, dim), groups, dim_v = q.shape, k.shape[1], v.shape[2]
    group, positions = heads // groups, pad(edges.tile_size, 1)
    tile = tile or choose("keys", q.dtype, max(pad(dim), pad(dim_v)), block)
    some = heads_of(group, positions, tile.rows)
    parts = [
        torch.empty((items, block, size), dtype=torch.float32, device=q.device)
        for size in (dim, dim_v)
    ]
    if items:
        key_gradients_kernel[items, block // tile.keys](
            q, k, v, d_out, lse, delta, schedule.rows, schedule.starts, schedule.stops,
            edges.records, *block_table(sequences, block, q.device), *parts,
            softmax_scale * LOG2E.value, sequences.cu_blocks(block)[-1], *q.stride()[:2],
            *k.stride()[:2], *v.stride()[:2], G=group, HEADS=some, HKV=groups, DIM=dim,
            DIM_V=dim_v, BD=pad(dim), BDV=pad(dim_v), BK=block, BN=tile.keys,
            BM=positions * some, PRECISION=is_exact(q), **tile.launch(),
        )  # fmt: skip
    if add_to is None:
        d_k, d_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    else:
        d_k, d_v = add_to
    sum_items(parts[0], schedule, d_k, softmax_scale, add=add_to is not None)
    sum_items(parts[1], schedule, d_v, add=add_to is not None)
    return d_k, d_v
