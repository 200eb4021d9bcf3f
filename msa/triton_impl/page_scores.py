"""Decoding, first kernel: the score of each block of a paged cache for each new query (R4, R5).

    for each sequence, each block b before the recent ones:
        K = page_table[b]'s index keys, times their scale if they are in 8 bits
        for each new query and group:
            score[b] = max over tokens of index_scale * K @ q_idx

What the fast form changes:
 1. The time is that of reading memory, so an index key is read once for all new queries and groups.
    Keys are the tall operand of the product, queries times groups its few columns.
 2. Forced blocks are never scored (see `selection`), so no block is partial and no token masked.
 3. A program takes one block, or every n-th block, and writes their scores, so there is nothing to
    merge: the next kernel selects from whole rows, and the number of programs changes no bit.
 4. Lengths are read on the device, and the programs of a sequence go on until its last block. So a
    captured launch stays right while the sequences grow.
 5. Keys of 8 bits are multiplied by queries that are sums of three e4m3 tensors, on the tensor
    cores. Widening the keys would take longer than reading them. Float32 queries and older devices
    get widened keys. A page's scale multiplies its maximum: a power of two changes no order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from msa.config import MSAConfig
from msa.ir import PagedKV
from msa.triton_impl.bits import e4m3_stretch, finite_size, power_of_two
from msa.triton_impl.dependent_launch import can_overlap, dependent_launch, wait_for_previous
from msa.triton_impl.launch import can_describe, describe, is_exact, pad
from msa.triton_impl.tile_verbs import along, load_tile, table_row
from msa.triton_impl.tuning import TileConfig, choose

MOST_PROGRAMS = 2**15


@triton.jit
def three_parts(b_q):
    """Rows as sums of three e4m3 tensors, and the power of two that undoes the stretch [BM].

    A row is stretched until its largest number is 224 to 448. bfloat16 has 8 significant bits and
    each part has 4, so only what is below 2^-17 of the largest number is lost. As in `quantize`,
    NaN stays NaN, infinities become large numbers, and neither changes the stretch.
    """
    b_x = b_q.to(tl.float32)
    b_largest = tl.max(finite_size(b_x), 1)
    b_stretch = e4m3_stretch(b_largest.to(tl.int32, bitcast=True))
    b_x *= power_of_two(b_stretch)[:, None]
    b_high = b_x.to(tl.float8e4nv)
    b_x -= b_high.to(tl.float32)
    b_middle = b_x.to(tl.float8e4nv)
    b_low = (b_x - b_middle.to(tl.float32)).to(tl.float8e4nv)
    return b_high, b_middle, b_low, power_of_two(254 - b_stretch)


@triton.jit
def page_scores_kernel(q, k, k_scales, table, rows, lengths, scores, arrivals, scale, n_arrivals,
                       width, stride_qb, stride_qn, stride_qr, stride_kp, stride_kt, stride_ts,
                       stride_tb, stride_ls, stride_sp, N: tl.constexpr, HKV: tl.constexpr,
                       DIM: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
                       BN: tl.constexpr, SINK: tl.constexpr, LOCAL: tl.constexpr,
                       EIGHT: tl.constexpr, PARTS: tl.constexpr, TMA: tl.constexpr,
                       NAMED: tl.constexpr, PDL: tl.constexpr, A: tl.constexpr,
                       PRECISION: tl.constexpr):  # fmt: skip
    """Every n-th block of one sequence, for BM rows of (query, group).

    Parameters:
        q: [B, n, Hkv, Di], 16-bit or float32; index queries
        k: [pages, Bk, Di], as q or e4m3; index keys, with TMA their descriptor, tiles of BN rows
        k_scales: [pages], float32; factors of the pages, read with EIGHT only
        table: [B, columns], int32 or int64; a sequence's pages in order. With NAMED [any, columns]
        rows: [B], int32 or int64; the row of table of each sequence, read with NAMED only
        lengths: [B], int32 or int64; tokens of a sequence, 0 for an empty slot of the batch
        scores: [B, n, Hkv, width], float32; written for blocks that are not forced
        arrivals: [B, n_arrivals], int32; counters of the next kernel, set to 0
        scale: float; index scale
        n_arrivals: int; counters of a sequence
        width: int; row length of scores
        stride_qb, stride_qn, stride_qr: elements from one sequence, query, group of q to the next
        stride_kp, stride_kt: elements from one page, token of k to the next
        stride_ts, stride_tb: elements from one sequence, block of table to the next
        stride_ls: elements from one sequence of lengths to the next
        stride_sp: elements from one page of k_scales to the next
        N, HKV: new queries of a sequence, groups
        DIM, BD: Di, and rounded up to a power of two
        BM: rows of one program: queries times groups
        BK, BN: keys of a block, keys of one product
        SINK, LOCAL: forced first and recent blocks
        EIGHT: bool; pages have factors
        PARTS: bool; queries are split into three e4m3 tensors
        TMA: bool; keys come by the bulk copy engine
        NAMED: bool; rows says which rows of the table to read
        PDL: bool; see `wait_for_previous`
        A: n_arrivals rounded up to a power of two
        PRECISION: input precision of the products
    """
    i_p, i_s, i_m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    wait_for_previous(PDL)
    if (i_p == 0) & (i_m == 0):  # no program of the next kernel has arrived yet
        o_a = tl.arange(0, A)
        p_a = arrivals + i_s.to(tl.int64) * n_arrivals + o_a
        tl.store(p_a, tl.zeros_like(o_a), mask=o_a < n_arrivals)
    length = tl.load(lengths + along(i_s, stride_ls)).to(tl.int32)
    stop = (length - 1) // BK - LOCAL + 1  # blocks from here on are forced
    if SINK + i_p < stop:
        o_m = i_m * BM + tl.arange(0, BM)  # row: query, then group
        m_m = o_m < N * HKV
        o_d, o_n = tl.arange(0, BD), tl.arange(0, BN)
        p_q = q + along(i_s, stride_qb) + along(o_m // HKV, stride_qn) + along(o_m % HKV, stride_qr)
        b_q = load_tile(p_q, m_m, o_d, DIM)  # [BM, BD]
        if PARTS:
            b_high, b_middle, b_low, b_shrink = three_parts(b_q)
        p_table = table + along(table_row(rows, i_s, NAMED), stride_ts)
        o_nk = along(o_n, stride_kt)  # [BN]
        p_score = scores + (i_s.to(tl.int64) * (N * HKV) + o_m) * width
        STEPS: tl.constexpr = BK // BN  # products per block
        for i_b in range(SINK + i_p, stop, tl.num_programs(0)):
            page = tl.load(p_table + along(i_b, stride_tb)).to(tl.int64)
            b_max = tl.full([BM], float("-inf"), tl.float32)
            for i in tl.static_range(STEPS):
                if TMA:
                    b_k = k.load([(page * BK + i * BN).to(tl.int32), 0])  # [BN, BD]
                else:
                    p_k = k + along(page, stride_kp) + along(i * BN, stride_kt) + o_nk
                    b_k = tl.load(p_k[:, None] + o_d[None, :], mask=(o_d < DIM)[None, :], other=0.0)
                if PARTS:
                    b_s = tl.dot(b_k, tl.trans(b_low))  # the smallest first
                    b_s = tl.dot(b_k, tl.trans(b_middle), b_s)
                    b_s = tl.dot(b_k, tl.trans(b_high), b_s)
                else:
                    b_s = tl.dot(b_k.to(b_q.dtype), tl.trans(b_q), input_precision=PRECISION)
                b_max = tl.maximum(b_max, tl.max(b_s, 0))
            if PARTS:
                b_max *= b_shrink
            if EIGHT:
                b_max *= tl.load(k_scales + along(page, stride_sp))
            tl.store(p_score + i_b, b_max * scale, mask=m_m)


def score_pages(
    q_idx: Float[Tensor, "B n Hkv Di"],
    cache: PagedKV, config: MSAConfig, arrivals: Int[Tensor, "B programs"],
    tile: TileConfig | None = None, rows: Int[Tensor, " B"] | None = None,
) -> Float[Tensor, "B n Hkv width"]:  # fmt: skip
    """The score of each block that is not forced; other places hold anything.

    The width is the number of the table's columns rounded up to a power of two.

    Args:
        arrivals: counters of the next kernel, set to 0 here.
        rows: the row of the table of each sequence; None means that row s is that of sequence s.
    """
    (batch, n, groups, dim), pages = q_idx.shape, cache.k_idx_pages
    block, columns = pages.shape[1], cache.page_table.shape[1]
    width = pad(columns, 32)
    scores = torch.empty((batch, n, groups, width), dtype=torch.float32, device=q_idx.device)
    wide = q_idx.dtype == torch.float32
    tile = tile or choose("pages", q_idx.dtype if wide else pages.dtype, pad(dim), block)
    some = min(pad(n * groups), tile.rows)
    programs = max(1, min(columns, programs_for(batch * columns, tile) // max(batch, 1)))
    eight = cache.k_idx_scales is not None
    scales = cache.k_idx_scales if eight else pages  # not read
    parts = eight and not wide and can_overlap(q_idx.device)
    tokens = pages.view(-1, dim) if pages.is_contiguous() else pages
    tma = tile.descriptors and tokens.dim() == 2 and can_describe(tokens, dim)
    page_scores_kernel[programs, batch, triton.cdiv(n * groups, some)](
        q_idx, describe(tokens, tile.keys) if tma else pages, scales, cache.page_table,
        cache.lengths if rows is None else rows, cache.lengths, scores, arrivals,
        config.index_scale_for(dim), arrivals.shape[1], width,
        *q_idx.stride()[:3], *pages.stride()[:2], *cache.page_table.stride(),
        cache.lengths.stride(0), scales.stride(0), N=n, HKV=groups, DIM=dim,
        BD=pad(dim, 32 if parts else 16), BM=some, BK=block, BN=tile.keys,
        SINK=config.sink_blocks, LOCAL=config.local_blocks, EIGHT=eight, PARTS=parts, TMA=tma,
        NAMED=rows is not None, A=pad(arrivals.shape[1], 1), PRECISION=is_exact(q_idx),
        **dependent_launch(q_idx.device), **tile.launch(),
    )  # fmt: skip
    return scores


def programs_for(blocks: int, tile: TileConfig) -> int:
    """One wave of programs if each gets at most two blocks then, else one program per block.

    A single wave leaves room on the device for the next kernel to be set up beside it. This gains
    more time than a second block in the same program costs. There are MOST_PROGRAMS at most: a
    table may have far more columns than its sequences have blocks, and a program without a block
    takes time, too.

    >>> tile = TileConfig(rows=64, keys=128, programs=528)
    >>> programs_for(1000, tile), programs_for(5000, tile), programs_for(256 * 8192, tile)
    (528, 5000, 32768)
    """
    return tile.programs if blocks <= 2 * tile.programs else min(blocks, MOST_PROGRAMS)
