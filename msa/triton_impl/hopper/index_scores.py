"""Index branch on Hopper: the score of every scored block, written out (eq. 6, R4, R5).

    for each segment (256 rows, a run of blocks) of this program:
        q = the rows, in registers
        for each block b of the run:
            S                = q @ k_idx[b]^T
            scores[b, rows]  = index_scale * max over tokens of S;  -inf from the row's limit on
        maxima[p, rows]      = max over the 8 blocks of piece p        # long rows only

What the asynchronous form changes:
 1. Three groups of warps run at the same time. A producer warp copies tiles of index keys into a
    ring in shared memory. Two consumers of four warps own 128 rows each and multiply.
 2. While one consumer takes its maxima, the product of the other one runs on the tensor cores.
    The consumers do not wait for one another: each releases a stage of the ring when its own
    product has ended.
 3. Rows are the first operand and stay in registers for a whole segment. The tile of index keys is
    the only operand that is read from shared memory.
 4. The rows of the next segment arrive while the last blocks of this one are computed, in a
    ring of one stage. A consumer releases this stage after its first product. It must not do so
    right after the instruction that loads the rows: this load may still run when the next
    instruction starts. A product that has ended has used the rows, so the load has ended, too.
 5. The grid is one program for each multiprocessor. The host gives every program an equal share of
    all (tile, block) pairs, in chunks of keys that fit into the L2 cache (see `plan.py`).
 6. Forced blocks are never scored. The own block is always forced (R6), so every scored block lies
    wholly in the past, and no token needs a mask. Blocks that are forced or invisible for some
    rows of the tile become -inf there.
 7. Scores lie as [pieces, rows, 8 blocks] for each tile of rows. The four threads that share a row
    collect the scores of one piece, two each, and write 32 bytes at a time. The top-k reads a piece
    of a row by one access, and the pieces of neighbouring rows fill whole lines of memory.
 8. Where rows are long, the maximum of each piece is written, too. Here this costs four shuffles
    for eight blocks; in a kernel of its own it would cost a pass over all scores.
 9. In a paged cache the producer finds each block through the page table (`page_rows.py`). A page's
    factor multiplies its maximum, and is loaded while the block before it is multiplied.
10. NaN is written as -inf (R4) and -0 as 0, so that the top-k compares plain numbers.

Who waits for whom (K: ring of STAGES tiles of keys, Q: ring of one stage of 256 rows):

    producer warp      Q0  K0  K1  K2  K3 ..wait.. K4 ....... Q1 ...
                        |   |   |              ^    (K4 takes the stage of K0)
                        v   v   v              | released by both
    consumer 0         load q | K0 product | max, store | K1 product | max, store | ...
    consumer 1         load q .... | K0 product | max, store | K1 product | max, store | ...
    tensor cores              |0:K0|1:K0       |0:K1         |1:K1 ...
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from msa.triton_impl.hopper.page_rows import load_page, page_row
from msa.triton_impl.hopper.plan import PIECE, ROWS
from msa.triton_impl.hopper.ring import (
    copy_tile,
    make_barriers,
    produce,
    release,
    wait_empty,
    wait_full,
)
from msa.triton_impl.paged_keys import IndexPages, page_matrix
from msa.triton_impl.tuning import EVERY_LAUNCH

KINDS = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.float8_e4m3fn: gl.float8e4nv,
}
"""The dtypes of index queries and keys that the kernel multiplies."""


@gluon.jit
def score_rows(W: gl.constexpr, q_tile, k_tiles, q_full, q_empty, k_full, k_empty, segments, runs,
               scores, maxima, pages, scale, HKV: gl.constexpr, BK: gl.constexpr,
               LOCAL: gl.constexpr, LONG: gl.constexpr, STAGES: gl.constexpr, PIECE: gl.constexpr,
               WIDTH: gl.constexpr, MMA: gl.constexpr, EIGHT: gl.constexpr,
               PAGED: gl.constexpr, SCALED: gl.constexpr):  # fmt: skip
    """Consumer W: rows 128 * W ... 128 * W + 128 of every segment."""
    HALF: gl.constexpr = q_tile.shape[1]
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, WIDTH)
    where, _steps, factors = pages
    table, stride_ts, stride_tb = where
    k_scales, stride_sp = factors
    row = W * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, EIGHT))
    column = gl.arange(0, PIECE, layout=gl.SliceLayout(0, EIGHT))[None, :]
    zero = gl.zeros([HALF, BK], gl.float32, layout=MMA)
    first = gl.load(runs + gl.program_id(0))
    stop = gl.load(runs + gl.program_id(0) + 1)
    step = 0
    for item in range(first, stop):
        p_item = segments + item * 8
        n = gl.load(p_item + 2)
        slab = gl.load(p_item + 3)
        limit = (gl.load(p_item + 4) + row // HKV) // BK - LOCAL + 1 - gl.load(p_item + 5)
        written = slab + gl.load(p_item + 6)
        factor = scale
        if SCALED:
            b = gl.load(p_item + 5)
            p_table = table + gl.load(p_item + 7).to(gl.int64) * stride_ts
            following = gl.load(k_scales + load_page(p_table, b, stride_tb) * stride_sp)
            page = load_page(p_table, b + gl.minimum(1, n - 1), stride_tb)
        wait_full(q_full, item - first, 1)
        q = q_tile.index(W).load(OPERAND)
        i = 0
        while i < n:  # one piece after another
            piece = (slab + i) // PIECE
            last = gl.minimum(n, (piece + 1) * PIECE - slab)
            eight = gl.full([HALF, PIECE], float("-inf"), gl.float32, layout=EIGHT)
            while i < last:
                if SCALED:
                    factor = following * scale
                    following = gl.load(k_scales + page * stride_sp)
                    page = load_page(p_table, b + gl.minimum(i + 2, n - 1), stride_tb)
                wait_full(k_full, step, STAGES)
                k = k_tiles.index(step % STAGES)
                acc = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
                part = warpgroup_mma_wait(0, deps=[acc])
                release(k_empty, step, STAGES)
                if i == 0:  # the product has read all of q, so every load of q has ended
                    fence_async_shared()
                    release(q_empty, item - first, 1)
                best = gl.convert_layout(gl.max(part, 1), gl.SliceLayout(1, EIGHT))
                if SCALED:
                    best = best * factor
                eight = gl.where(column == (slab + i) % PIECE, best[:, None], eight)
                i += 1
                step += 1
            o_x = piece * PIECE + column
            eight = gl.maximum(eight, float("-inf"))  # no NaN
            if not SCALED:
                eight = eight * factor
            eight = gl.where(o_x - slab < limit[:, None], eight + 0.0, float("-inf"))  # no -0
            p_x = scores + piece.to(gl.int64) * (2 * HALF * PIECE) + row[:, None] * PIECE
            gl.store(p_x + column, eight, mask=(o_x >= slab) & (o_x < written))
            if LONG:
                p_max = maxima + piece.to(gl.int64) * (2 * HALF) + row
                gl.store(p_max, gl.max(eight, 1))


@gluon.jit
def consumer_0(q_desc, k_desc, q_tile, k_tiles, q_full, q_empty, k_full, k_empty, segments, runs,
               scores, maxima, pages, scale, HKV: gl.constexpr, BK: gl.constexpr,
               LOCAL: gl.constexpr, LONG: gl.constexpr, STAGES: gl.constexpr, PIECE: gl.constexpr,
               WIDTH: gl.constexpr, MMA: gl.constexpr, EIGHT: gl.constexpr,
               PAGED: gl.constexpr, SCALED: gl.constexpr):  # fmt: skip
    """The first half of the rows."""
    score_rows(0, q_tile, k_tiles, q_full, q_empty, k_full, k_empty, segments, runs, scores, maxima,
               pages, scale, HKV, BK, LOCAL, LONG, STAGES, PIECE, WIDTH, MMA, EIGHT,
               PAGED, SCALED)  # fmt: skip


@gluon.jit
def consumer_1(q_desc, k_desc, q_tile, k_tiles, q_full, q_empty, k_full, k_empty, segments, runs,
               scores, maxima, pages, scale, HKV: gl.constexpr, BK: gl.constexpr,
               LOCAL: gl.constexpr, LONG: gl.constexpr, STAGES: gl.constexpr, PIECE: gl.constexpr,
               WIDTH: gl.constexpr, MMA: gl.constexpr, EIGHT: gl.constexpr,
               PAGED: gl.constexpr, SCALED: gl.constexpr):  # fmt: skip
    """The second half of the rows."""
    score_rows(1, q_tile, k_tiles, q_full, q_empty, k_full, k_empty, segments, runs, scores, maxima,
               pages, scale, HKV, BK, LOCAL, LONG, STAGES, PIECE, WIDTH, MMA, EIGHT,
               PAGED, SCALED)  # fmt: skip


@gluon.jit
def producer(q_desc, k_desc, q_tile, k_tiles, q_full, q_empty, k_full, k_empty, segments, runs,
             scores, maxima, pages, scale, HKV: gl.constexpr, BK: gl.constexpr, LOCAL: gl.constexpr,
             LONG: gl.constexpr, STAGES: gl.constexpr, PIECE: gl.constexpr, WIDTH: gl.constexpr,
             MMA: gl.constexpr, EIGHT: gl.constexpr, PAGED: gl.constexpr,
             SCALED: gl.constexpr):  # fmt: skip
    """Copy the rows of each segment, then its blocks of keys one after another."""
    HALF: gl.constexpr = q_tile.shape[1]
    where, steps, _factors = pages
    table, stride_ts, stride_tb = where
    stride_kp, stride_kt = steps
    first = gl.load(runs + gl.program_id(0))
    stop = gl.load(runs + gl.program_id(0) + 1)
    step = 0
    for item in range(first, stop):
        p_item = segments + item * 8
        row = gl.load(p_item)
        key = gl.load(p_item + 1)
        n = gl.load(p_item + 2)
        wait_empty(q_empty, item - first, 1)
        mbarrier.expect(q_full.index(0), 2 * q_desc.block_type.nbytes)
        copy_tile(q_desc, [row, 0], q_full.index(0), q_tile.index(0))
        copy_tile(q_desc, [row + HALF, 0], q_full.index(0), q_tile.index(1))
        if PAGED:
            b = gl.load(p_item + 5)
            p_table = table + gl.load(p_item + 7).to(gl.int64) * stride_ts
            page = load_page(p_table, b, stride_tb)
            for i in range(n):
                row = page_row(page, stride_kp, stride_kt)
                page = load_page(p_table, b + gl.minimum(i + 1, n - 1), stride_tb)
                produce(k_desc, row, k_tiles, k_full, k_empty, step, STAGES)
                step += 1
        else:
            for i in range(n):
                produce(k_desc, key + i * BK, k_tiles, k_full, k_empty, step, STAGES)
                step += 1


@gluon.jit
def block_scores_kernel(q_desc, k_desc, segments, runs, scores, maxima, table, k_scales, scale,
                        stride_kp, stride_kt, stride_ts, stride_tb, stride_sp, HKV: gl.constexpr,
                        BK: gl.constexpr, LOCAL: gl.constexpr, LONG: gl.constexpr,
                        STAGES: gl.constexpr, PIECE: gl.constexpr, WIDTH: gl.constexpr,
                        MMA: gl.constexpr, EIGHT: gl.constexpr,
                        PAGED: gl.constexpr, SCALED: gl.constexpr,
                        REGISTERS: gl.constexpr):  # fmt: skip
    """The segments runs[p] ... runs[p + 1] of program p.

    Parameters:
        q_desc: descriptors of [Tq * Hkv, Di], 16-bit or e4m3, in tiles of 128 rows
        k_desc: descriptors of [Tk, Di], as q_desc, in tiles of BK rows; with PAGED of a
            `page_matrix`
        segments: [segments, 8], int32; see `ScorePlan`
        runs: [programs + 1], int32; see `ScorePlan`
        scores: [pieces, 256, PIECE], float32; written
        maxima: [pieces, 256], float32; the maximum of each piece, written if LONG
        table: [B, columns], int32 or int64; a sequence's pages in order, read with PAGED only
        k_scales: [pages], float32; factors of the pages, read with SCALED only
        scale: float; index scale
        stride_kp, stride_kt: elements from one page, token of k to the next, read with PAGED only
        stride_ts, stride_tb: elements from one sequence, block of table to the next
        stride_sp: elements from one page of k_scales to the next
        HKV: groups
        BK: keys of a block
        LOCAL: forced recent blocks
        LONG: bool; write the maxima, too
        STAGES: tiles of keys in the ring
        PIECE: blocks of a piece
        WIDTH: numbers of the first operand that lie side by side in 32 bits
        MMA: layout of a product [128, BK]
        EIGHT: layout of the scores of a piece [128, PIECE]
        PAGED: bool; index keys are pages
        SCALED: bool; pages have factors
        REGISTERS: of a thread of the second consumer
    """
    HALF: gl.constexpr = q_desc.block_type.shape[0]
    DIM: gl.constexpr = q_desc.block_type.shape[1]
    q_tile = gl.allocate_shared_memory(q_desc.dtype, [2, HALF, DIM], q_desc.layout)
    k_tiles = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BK, DIM], k_desc.layout)
    q_full, q_empty = make_barriers(1, 1), make_barriers(1, 2)
    k_full, k_empty = make_barriers(STAGES, 1), make_barriers(STAGES, 2)
    pages = ((table, stride_ts, stride_tb), (stride_kp, stride_kt), (k_scales, stride_sp))
    gl.warp_specialize([
        (consumer_0, (q_desc, k_desc, q_tile, k_tiles, q_full, q_empty, k_full, k_empty, segments,
                      runs, scores, maxima, pages, scale, HKV, BK, LOCAL, LONG, STAGES, PIECE,
                      WIDTH, MMA, EIGHT, PAGED, SCALED)),
        (consumer_1, (q_desc, k_desc, q_tile, k_tiles, q_full, q_empty, k_full, k_empty, segments,
                      runs, scores, maxima, pages, scale, HKV, BK, LOCAL, LONG, STAGES, PIECE,
                      WIDTH, MMA, EIGHT, PAGED, SCALED)),
        (producer, (q_desc, k_desc, q_tile, k_tiles, q_full, q_empty, k_full, k_empty, segments,
                    runs, scores, maxima, pages, scale, HKV, BK, LOCAL, LONG, STAGES, PIECE, WIDTH,
                    MMA, EIGHT, PAGED, SCALED)),
    ], [4, 1], [REGISTERS, 24])  # fmt: skip


def describe(
    matrix: Float[Tensor, "rows columns"], rows: int, dim: int | None = None
) -> TensorDescriptor:
    """A matrix, to be copied in tiles of `rows` rows by the copy engine.

    dim: the columns of a tile; None means all.
    """
    dim = dim or matrix.shape[1]
    layout = gl.NVMMASharedLayout.get_default_for([rows, dim], KINDS[matrix.dtype])
    return TensorDescriptor.from_tensor(matrix, [rows, dim], layout)


def options(dtype: torch.dtype, dim: int, block_size: int) -> dict[str, Any]:
    """The compile-time options of the kernel that depend on the dtype and on the sizes."""
    size = dtype.itemsize
    stages = min(8, (212 * 1024 - ROWS * dim * size) // (block_size * dim * size))
    return {
        "STAGES": stages,
        "WIDTH": 4 // size,
        "MMA": gl.NVMMADistributedLayout([3, 0], [4, 1], [16, block_size, 32 // size]),
        "EIGHT": gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PIECE, 32 // size]),
        "REGISTERS": 240,
    }


def score_segments(
    q_idx: Float[Tensor, "rows dim"],
    k_idx: Float[Tensor, "*where dim"],
    segments: Int[Tensor, "segments 8"],
    runs: Int[Tensor, " programs_plus_1"],
    scores: Float[Tensor, "pieces ROWS PIECE"],
    maxima: Float[Tensor, "pieces ROWS"] | None,
    groups: int,
    block_size: int,
    local_blocks: int,
    scale: float,
    pages: IndexPages | None = None,
    **changes: Any,
) -> None:
    """Fill `scores`, and their maxima where these are wanted.

    `segments` and `runs` come from `plan.py`, `changes` replace `options`. With `pages`, k_idx
    [pages, Bk, dim] has a `page_matrix`.
    """
    table, scales, steps, keys = runs, runs, [0] * 5, k_idx  # only keys is read
    if pages is not None:
        matrix = page_matrix(k_idx)
        assert matrix is not None
        table, keys = pages.table, matrix
        scales = k_idx if pages.scales is None else pages.scales
        steps = [*k_idx.stride()[:2], *table.stride(), scales.stride(0)]
    chosen = options(q_idx.dtype, q_idx.shape[1], block_size) | changes
    block_scores_kernel[(len(runs) - 1,)](
        describe(q_idx, ROWS // 2), describe(keys, block_size, k_idx.shape[-1]), segments, runs,
        scores, scores if maxima is None else maxima, table, scales, scale, *steps, HKV=groups,
        BK=block_size, LOCAL=local_blocks, LONG=maxima is not None, PIECE=PIECE,
        PAGED=pages is not None, SCALED=pages is not None and pages.scales is not None,
        num_warps=4, **chosen, **EVERY_LAUNCH,
    )  # fmt: skip
