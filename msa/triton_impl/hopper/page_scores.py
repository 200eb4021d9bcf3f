"""Decoding on Hopper, first kernel: the score of each block of a paged cache (R4, R5).

    for each block b of this program's share of the scored blocks of all sequences:
        K = page_table[b]'s index keys
        for each new query and group:
            score[b] = max over tokens of index_scale * K @ q_idx, times the page's scale

What the asynchronous form changes:
 1. The time is that of reading index keys, so as many bytes as possible have to be on their way at
    any time. A producer warp copies one page after another into a ring in shared memory. It never
    waits for arithmetic as long as a stage of the ring is empty.
 2. The grid is PROGRAMS programs for each multiprocessor, whatever the batch and the width of the
    table. Each program reads the lengths and takes an equal share of all scored blocks, in the
    order of the sequences. So the load is even for any lengths, and empty columns of the table cost
    nothing. The number of programs changes no bit of a score.
 3. Keys are the tall operand of the product. Queries times groups are its few columns.
 4. Keys of 8 bits are multiplied by queries that are sums of three e4m3 tensors (`three_parts` of
    the portable kernel). The parts are columns of one product, so the keys are read once from
    shared memory. The sums of the three parts are added in float32.
 5. The producer reads the ids of 32 pages by one load, and the consumers their scales likewise.
 6. A maximum over the keys of a page is formed by all four warps, which wait for one another at
    each step of it. So the maxima of two pages are formed at a time, where registers allow it.
 7. The barriers of the ring are set up while the kernel in front still runs.

Who waits for whom (a ring of STAGES pages):

    kernel before   ............... ends
    all warps            barriers   |wait| lengths, share
    producer warp                         | ids | K0 K1 K2 K3 ..wait.. K4 ....
                                                   |  |               ^ K0 is released
                                                   v  v               |
    four warps                            | q       | K0 K1 products, max, store | K2 K3 products ..
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from msa import chips
from msa.config import MSAConfig
from msa.ir import PagedKV
from msa.triton_impl.hopper.page_queries import load_queries
from msa.triton_impl.hopper.page_shares import LANES, find_share, next_blocks
from msa.triton_impl.hopper.ring import make_barriers, produce, release, wait_full
from msa.triton_impl.launch import pad
from msa.triton_impl.paged_keys import matrix_sizes
from msa.triton_impl.tile_verbs import along, table_row
from msa.triton_impl.tuning import EVERY_LAUNCH

KINDS = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.float8_e4m3fn: gl.float8e4nv,
}
RING_BYTES = 128 * 2**10
"""The ring of one multiprocessor. It leaves room for a program of the next kernel."""


# -- a producer warp and four warps ---------------------------------------------------------------
@gluon.jit
def load_ids(p_id, i_b, n, stride_tb, L: gl.constexpr):
    """Pages of the blocks i_b ... i_b + LANES; 0 from n on [LANES]."""
    o_b = i_b + gl.arange(0, LANES, layout=L)
    return gl.load(p_id + along(o_b, stride_tb), mask=o_b < n, other=0).to(gl.int32)


@gluon.jit
def pick(x, i, L: gl.constexpr):
    """Entry i of the integers x [LANES]: one instruction adds up the numbers of a warp."""
    return gl.sum(gl.where(gl.arange(0, LANES, layout=L) == i, x, 0), 0)


@gluon.jit
def producer(k_desc, ring, share, table, rows, lengths, page_rows, stride_ts, stride_tb, stride_ls,
             BK: gl.constexpr, SINK: gl.constexpr, LOCAL: gl.constexpr, NAMED: gl.constexpr,
             L: gl.constexpr):  # fmt: skip
    """Copy the pages of the share, one after another."""
    i_s, i_b, n, blocks = share
    k_tiles, full, empty = ring
    STAGES: gl.constexpr = k_tiles.shape[0]
    gdc_wait()
    step = 0
    while step < n:
        stop = gl.minimum(blocks, i_b + n - step)
        p_id = table + along(table_row(rows, i_s, NAMED), stride_ts) + along(SINK, stride_tb)
        ids = load_ids(p_id, i_b, stop, stride_tb, L)
        for first in range(i_b, stop, LANES):
            next_ids = load_ids(p_id, first + LANES, stop, stride_tb, L)
            for i in range(gl.minimum(stop - first, LANES)):
                row = pick(ids, i, L) * page_rows
                produce(k_desc, row, k_tiles, full, empty, step, STAGES)
                step += 1
            ids = next_ids
        i_s, i_b = i_s + 1, 0
        blocks = next_blocks(lengths, i_s, step < n, stride_ls, BK, SINK, LOCAL)


@gluon.jit
def best_of_block(acc, PARTS: gl.constexpr):
    """The maximum of every column over the keys, the parts added up [EACH]."""
    return gl.max(sum_of_parts(acc, PARTS), 0)


@gluon.jit
def sum_of_parts(acc, PARTS: gl.constexpr):
    """The parts of every column added up [BK, EACH]."""
    if PARTS > 1:
        BK: gl.constexpr = acc.shape[0]
        acc = gl.sum(gl.reshape(acc, [BK, PARTS, acc.shape[1] // PARTS]), 1)
    return acc


@gluon.jit
def best_of_pair(first, second, PARTS: gl.constexpr):
    """`best_of_block` of two pages [EACH, 2]: as many steps as for one."""
    return gl.max(gl.join(sum_of_parts(first, PARTS), sum_of_parts(second, PARTS)), 0)


@gluon.jit
def multiply(k_tiles, step, q_tile, zero):
    """Start the product of the page of this step, which has arrived, with the queries."""
    STAGES: gl.constexpr = k_tiles.shape[0]
    return warpgroup_mma(k_tiles.index(step % STAGES), q_tile.permute((1, 0)), zero,
                         use_acc=False, is_async=True)  # fmt: skip


@gluon.jit
def consumer(ring, share, q_tile, q, k_scales, table, rows, lengths, scores, scale, width,
             q_strides, strides, N: gl.constexpr, HKV: gl.constexpr, BK: gl.constexpr,
             SINK: gl.constexpr, LOCAL: gl.constexpr, EIGHT: gl.constexpr, PARTS: gl.constexpr,
             PAIRS: gl.constexpr, NAMED: gl.constexpr, MMA: gl.constexpr, Q_LAYOUT: gl.constexpr,
             L: gl.constexpr):  # fmt: skip
    """Multiply the pages of the share, take the maxima, write the scores.

    With PAIRS two pages at a time. The last page of an odd number is multiplied twice.
    """
    k_tiles, full, empty = ring
    stride_ts, stride_tb, stride_ls, stride_sp = strides
    i_s, i_b, n, blocks = share
    STAGES: gl.constexpr = k_tiles.shape[0]
    ROWS: gl.constexpr = q_tile.shape[0]
    EACH: gl.constexpr = ROWS // PARTS
    zero = gl.zeros([BK, ROWS], gl.float32, layout=MMA)
    if PAIRS:
        like = best_of_pair(zero, zero, PARTS)
        L_M: gl.constexpr = gl.SliceLayout(1, like.type.layout)
        o_i = gl.arange(0, 2, layout=gl.SliceLayout(0, like.type.layout))
    else:
        like = best_of_block(zero, PARTS)
        L_M: gl.constexpr = like.type.layout
    o_m = gl.arange(0, EACH, layout=L_M)
    m_m = o_m < N * HKV
    step = 0
    while step < n:
        stop = gl.minimum(blocks, i_b + n - step)
        p_id = table + along(table_row(rows, i_s, NAMED), stride_ts) + along(SINK, stride_tb)
        p_score = scores + (i_s.to(gl.int64) * (N * HKV) + o_m) * width + SINK
        shrink = load_queries(q, i_s, q_tile, q_strides, N, HKV, PARTS, Q_LAYOUT)
        if PARTS > 1:  # all parts of a row were stretched alike
            shrink = gl.max(gl.reshape(shrink, [PARTS, EACH]), 0)
        b_scale = gl.convert_layout(shrink, L_M) * scale
        factors = gl.full([LANES], 0, gl.int32, layout=L)
        if EIGHT:
            ids = load_ids(p_id, i_b, stop, stride_tb, L)
            factors = gl.load(k_scales + along(ids, stride_sp)).to(gl.int32, bitcast=True)
        for first in range(i_b, stop, LANES):
            if EIGHT:
                ids = load_ids(p_id, first + LANES, stop, stride_tb, L)
            count = gl.minimum(stop - first, LANES)
            if PAIRS:
                for i in range(0, count, 2):
                    two = (i + 1 < count).to(gl.int32)
                    wait_full(full, step, STAGES)
                    wait_full(full, step + two, STAGES)
                    acc = multiply(k_tiles, step, q_tile, zero)
                    acc_2 = multiply(k_tiles, step + two, q_tile, zero)
                    done = warpgroup_mma_wait(0, deps=[acc, acc_2])
                    acc, acc_2 = done[0], done[1]
                    release(empty, step, STAGES)
                    if two > 0:
                        release(empty, step + 1, STAGES)
                    best = gl.maximum(best_of_pair(acc, acc_2, PARTS), float("-inf"))
                    best *= b_scale[:, None]
                    if EIGHT:
                        factor = gl.where(o_i == 0, pick(factors, i, L), pick(factors, i + two, L))
                        best *= factor.to(gl.float32, bitcast=True)[None, :]
                    gl.store(p_score[:, None] + (first + i + o_i)[None, :], best,
                             mask=m_m[:, None] & (o_i <= two)[None, :])  # fmt: skip
                    step += 1 + two
            else:
                for i in range(count):
                    wait_full(full, step, STAGES)
                    acc = multiply(k_tiles, step, q_tile, zero)
                    acc = warpgroup_mma_wait(0, deps=[acc])
                    release(empty, step, STAGES)
                    best = gl.maximum(best_of_block(acc, PARTS), float("-inf")) * b_scale
                    if EIGHT:
                        best *= pick(factors, i, L).to(gl.float32, bitcast=True)
                    gl.store(p_score + first + i, best, mask=m_m)
                    step += 1
            if EIGHT:
                factors = gl.load(k_scales + along(ids, stride_sp)).to(gl.int32, bitcast=True)
        i_s, i_b = i_s + 1, 0
        blocks = next_blocks(lengths, i_s, step < n, stride_ls, BK, SINK, LOCAL)


@gluon.jit(do_not_specialize=["batch", "n_arrivals"])  # so they compile nothing anew
def hopper_page_scores_kernel(q, k_desc, table, rows, lengths, k_scales, scores, arrivals,
                              scale, batch, n_arrivals, width, page_rows, stride_qb,
                              stride_qn, stride_qr, stride_ts, stride_tb, stride_ls,
                              stride_sp, N: gl.constexpr, HKV: gl.constexpr,
                              BK: gl.constexpr, SINK: gl.constexpr, LOCAL: gl.constexpr,
                              EIGHT: gl.constexpr, PARTS: gl.constexpr, PAIRS: gl.constexpr,
                              ROWS: gl.constexpr, STAGES: gl.constexpr, CHUNK: gl.constexpr,
                              NAMED: gl.constexpr, Q_DTYPE: gl.constexpr, MMA: gl.constexpr,
                              Q_SHARED: gl.constexpr):  # fmt: skip
    """A share of the scored blocks of all sequences, for all new queries and groups.

    Parameters:
        q: [B, n, Hkv, Di], 16-bit; index queries
        k_desc: descriptors of [rows of all pages, Di], as q or e4m3; index keys, in tiles of BK
        table: [B, columns], int32 or int64; a sequence's pages in order. With NAMED [any, columns]
        rows: [B], int32 or int64; the row of table of each sequence, read with NAMED only
        lengths: [B], int32 or int64; tokens of a sequence, 0 for an empty slot of the batch
        k_scales: [pages], float32; factors of the pages, read with EIGHT only
        scores: [B, n, Hkv, width], float32; written for blocks that are not forced
        arrivals: [B, n_arrivals], int32; counters of the next kernel, set to 0
        scale: float; index scale
        batch, n_arrivals: int; sequences, counters of a sequence
        width: int; row length of scores
        page_rows: int; rows of k_desc from one page to the next
        stride_qb, stride_qn, stride_qr: elements from one sequence, query, group of q to the next
        stride_ts, stride_tb: elements from one sequence, block of table to the next
        stride_ls: elements from one sequence of lengths to the next
        stride_sp: elements from one page of k_scales to the next
        N, HKV: new queries of a sequence, groups
        BK: keys of a block
        SINK, LOCAL: forced first and recent blocks
        EIGHT: bool; pages have scales
        NAMED: bool; rows says which rows of the table to read
        PARTS: e4m3 tensors whose sum is a query, and one of zeros: 4 for e4m3 keys, else 1
        PAIRS: bool; the maxima of two pages are taken at a time
        ROWS: columns of a product: queries times groups, padded, times PARTS
        STAGES: pages in the ring
        CHUNK: lengths that are read by one load
        Q_DTYPE: dtype of the queries in the product
        MMA: layout of a product [BK, ROWS]
        Q_SHARED: layout of the queries in shared memory
    """
    DIM: gl.constexpr = k_desc.block_type.shape[1]
    WARPS: gl.constexpr = gl.num_warps()
    L: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    L_1: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    L_C: gl.constexpr = gl.BlockedLayout([CHUNK // 32], [32], [WARPS], [0])  # each warp has all
    Q_LAYOUT: gl.constexpr = gl.BlockedLayout([1, DIM // 8], [4, 8], [WARPS, 1], [1, 0])
    k_tiles = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BK, DIM], k_desc.layout)
    q_tile = gl.allocate_shared_memory(Q_DTYPE, [ROWS, DIM], Q_SHARED)
    full, empty = make_barriers(STAGES, 1), make_barriers(STAGES, 1)
    gdc_wait()
    gdc_launch_dependents()
    o_a = gl.program_id(0) * LANES + gl.arange(0, LANES, layout=L)
    for first in range(0, batch * n_arrivals, gl.num_programs(0) * LANES):
        gl.store(arrivals + first + o_a, gl.zeros_like(o_a), mask=first + o_a < batch * n_arrivals)
    share = find_share(lengths, batch, stride_ls, BK, SINK, LOCAL, L_C, CHUNK)
    ring = (k_tiles, full, empty)
    q_strides = (stride_qb, stride_qn, stride_qr)
    strides = (stride_ts, stride_tb, stride_ls, stride_sp)
    gl.warp_specialize([
        (consumer, (ring, share, q_tile, q, k_scales, table, rows, lengths, scores, scale, width,
                    q_strides, strides, N, HKV, BK, SINK, LOCAL, EIGHT, PARTS, PAIRS, NAMED, MMA,
                    Q_LAYOUT, L)),
        (producer, (k_desc, ring, share, table, rows, lengths, page_rows, stride_ts, stride_tb,
                    stride_ls, BK, SINK, LOCAL, NAMED, L_1)),
    ], [1], [40])  # fmt: skip


# -- host -----------------------------------------------------------------------------------------
def options(dtype: torch.dtype, q_dtype: torch.dtype, rows: int, dim: int, block: int,
            programs: int = 1) -> dict[str, Any]:  # fmt: skip
    """The compile-time options of the kernel, for `programs` programs of a multiprocessor.

    rows: queries of a sequence times groups.
    """
    eight = dtype.itemsize == 1
    parts, page = 4 if eight else 1, block * dim * dtype.itemsize
    columns = parts * pad(rows, 8)
    kind = KINDS[dtype if eight else q_dtype]
    return {
        "EIGHT": eight,  # e4m3 pages have scales
        "PARTS": parts,
        "PAIRS": eight and columns <= 32,  # more do not fit into registers
        "ROWS": columns,
        "STAGES": max(2, RING_BYTES // programs // page),
        "CHUNK": 128,
        "Q_DTYPE": kind,
        "MMA": gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 32 // dtype.itemsize]),
        "Q_SHARED": gl.NVMMASharedLayout.get_default_for([columns, dim], kind),
        "num_warps": 4,
        # the usual ones leave room for a program of the next kernel
        "maxnreg": 128 if columns > 32 else 80 if eight else 64,
    }


def describe(pages: Float[Tensor, "pages Bk Di"]) -> tuple[TensorDescriptor, int]:
    """The pages as a `page_matrix` for the copy engine, and the rows from one page to the next."""
    _, block, dim = pages.shape
    step_p, step_t, _ = pages.stride()
    sizes = matrix_sizes(pages)
    assert sizes is not None  # else `msa.kernel_choice` refuses them
    layout = gl.NVMMASharedLayout.get_default_for([block, dim], KINDS[pages.dtype])
    return TensorDescriptor(pages, list(sizes), [step_t, 1], [block, dim], layout), step_p // step_t


def score_pages_on_hopper(
    q_idx: Float[Tensor, "B n Hkv Di"],
    cache: PagedKV, config: MSAConfig, arrivals: Int[Tensor, "B programs"], programs: int = 1,
    rows: Int[Tensor, " B"] | None = None, **changes: Any,
) -> Float[Tensor, "B n Hkv width"]:  # fmt: skip
    """`score_pages` by the kernel of this file, for arguments that `msa.kernel_choice` takes.

    Args:
        arrivals: counters of the next kernel, set to 0 here.
        programs: programs of a multiprocessor; `changes` replace `options`.
        rows: as in `score_pages`.
    """
    (batch, n, groups, dim), pages = q_idx.shape, cache.k_idx_pages
    block, width = pages.shape[1], pad(cache.page_table.shape[1], 32)
    scores = torch.empty((batch, n, groups, width), dtype=torch.float32, device=q_idx.device)
    eight = cache.k_idx_scales is not None
    scales = cache.k_idx_scales if eight else pages  # not read
    desc, page_rows = describe(pages)
    chosen = options(pages.dtype, q_idx.dtype, n * groups, dim, block, programs)
    chosen["EIGHT"] = eight
    many = chips.current().multiprocessors
    hopper_page_scores_kernel[(many * programs,)](
        q_idx, desc, cache.page_table, cache.lengths if rows is None else rows, cache.lengths,
        scales, scores, arrivals, config.index_scale_for(dim), batch, arrivals.shape[1], width,
        page_rows, *q_idx.stride()[:3], *cache.page_table.stride(), cache.lengths.stride(0),
        scales.stride(0), N=n, HKV=groups, BK=block, SINK=config.sink_blocks,
        LOCAL=config.local_blocks, NAMED=rows is not None, launch_pdl=True, **chosen | changes,
        **EVERY_LAUNCH,
    )  # fmt: skip
    return scores
