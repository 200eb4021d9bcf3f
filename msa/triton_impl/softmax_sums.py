"""Maximum and sum of a softmax over selected tokens, without its values (R10, R17).

    for each work item (block of one group, edges start ... stop):          # KV-outer
        for each edge (query t, slot s), for each head of the group:
            S = q K^T, tokens after t's own key masked
            top[t, head, s] = max S;  total[t, head, s] = sum exp(scale * (S - top))
    for each query and head:
        top = max over s of top[s]
        log_total = log of the sum over s of total[s] * exp(scale * (top[s] - top))

A softmax is then exp(scale * (S - top) - log_total), its LSE is scale * top + log_total. One number
in place of the two would lose the softmax where the maximum is large, or infinite.

    main branch    a row that holds NaN or +inf, or nothing but -inf, has log_total = NaN
    index branch   NaN -> -inf (R4); where the maximum is infinite, the scores equal to it share all
                   the mass

What the fast form changes: as in partials.py; a block of keys stays on chip for its item.
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
    LOWEST,
    along,
    block_table,
    edge_rows,
    is_exact,
    load_keys,
    pad,
    query_table,
)
from msa.triton_impl.tuning import TileConfig, choose


@triton.jit
def block_sums_kernel(q, k, rows, starts, stops, query_ids, slots, own_keys, first_keys, key_stops,
                      tops, totals, scale, n_blocks, stride_qt, stride_qh, stride_kt, stride_kh,
                      G: tl.constexpr, GP: tl.constexpr, HQ: tl.constexpr, TOP_K: tl.constexpr,
                      DIM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
                      BM: tl.constexpr, INDEX: tl.constexpr,
                      PRECISION: tl.constexpr):  # fmt: skip
    """BN keys of one item; BM = edges x GP rows at a time."""
    i_item, i_n = tl.program_id(0), tl.program_id(1)
    PIECES: tl.constexpr = BK // BN
    start, stop = tl.load(starts + i_item), tl.load(stops + i_item)
    if start < stop:
        row = tl.load(rows + i_item)
        i_r, i_b = row // n_blocks, row % n_blocks
        first, key_stop = tl.load(first_keys + i_b) + i_n * BN, tl.load(key_stops + i_b)
        o_d, o_n = tl.arange(0, BD), first + tl.arange(0, BN)
        p_k = k + along(i_r, stride_kh)
        b_k = load_keys(p_k, first, key_stop, stride_kt, o_d, DIM, BD, BN)  # [BN, BD]
        length = (stop - start).to(tl.int32) * GP
        for x in range(0, length, BM):
            b_t, o_g, m_m = edge_rows(query_ids + start, x, length, G, GP, BM)
            b_slot = tl.load(slots + start + (x + tl.arange(0, BM)) // GP, mask=m_m, other=0)
            b_own = tl.load(own_keys + b_t, mask=m_m, other=0)
            o_h = i_r * G + o_g
            p_q = q + along(b_t, stride_qt) + along(o_h, stride_qh)  # [BM]
            b_q = tl.load(
                p_q[:, None] + o_d[None, :], mask=m_m[:, None] & (o_d < DIM)[None, :], other=0.0
            )
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
            p_x = ((b_t * HQ + o_h) * TOP_K + b_slot) * PIECES + i_n
            tl.store(tops + p_x, b_top, mask=m_m)
            tl.store(totals + p_x, b_total, mask=m_m)


@triton.jit
def merge_sums_kernel(tops, totals, counts, top, log_total, scale, n, G: tl.constexpr,
                      WIDTH: tl.constexpr, P: tl.constexpr, R: tl.constexpr, PIECES: tl.constexpr,
                      INDEX: tl.constexpr):  # fmt: skip
    """R (query, head) pairs; WIDTH parts each, of which the first count * PIECES are in use."""
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
    q: Float[Tensor, "Tq Hq D"],
    k: Float[Tensor, "Tk Hkv D"],
    schedule: Schedule,
    scale: float,
    is_index: bool,
    tile: TileConfig | None = None,
) -> tuple[Float[Tensor, "Tq Hq"], Float[Tensor, "Tq Hq"]]:
    """Highest unscaled score and log of the sum of exp(scale * (score - highest)), float32.

    is_index: of the index branch, whose scores may be infinite or NaN (see above).
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
        )  # fmt: skip
    return top, log_total
