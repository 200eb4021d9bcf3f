"""Top-k of block scores on Hopper: one thread for each row, and no thread waits (R6-R8).

    scores = [pieces, 256 rows, 8 blocks] and maxima = [pieces, 256 rows], of index_scores.py
    for each row, in one thread:
        bound  = the last of the best `places` maxima             # long rows only
        kept   = pieces that reach the bound, `places` at most    # equal ones: the lower ids
        bound  = the last of the best `places` scores inside kept
        selection = sorted(scores inside kept that reach the bound + forced blocks)

What the fast form changes:
 1. A row lies in the registers of one thread: no shuffle, no shared memory, no barrier. Rows lie
    side by side in memory, so that the 32 threads of a warp read whole lines.
 2. A thread keeps the best K values so far, in descending order. It sorts the next K values in
    ascending order, takes the larger of each pair, and sorts again: 15 instructions for each value
    with K = 16. The number of steps does not depend on the scores, so all threads of a warp always
    take the same steps.
 3. Only values are sorted. The same numbers are then read again, and the ids of those that reach
    the bound are written in ascending order, as R8 wants them. Most of this second reading is
    served by the L2 cache.
 4. The best `places` blocks lie in the best `places` pieces, if pieces of equal maxima are taken in
    the order of their ids: each of these pieces has a block that comes before any block of a piece
    that was left out. So the number of pieces that are read again is bounded, whatever the scores.
 5. The 8 scores of a piece and a row are one sector of 32 bytes, the least that memory delivers.
 6. The score kernel wrote -inf for NaN and 0 for -0, so plain maxima and minima give the order of
    R4. It also wrote -inf where a block is not visible. These blocks have the highest ids of a row,
    so they come last among equals.
 7. Only the first `places` of equal values can be kept, so their count stops at MOST_TIED. Without
    this stop it would overflow in rows of hundreds of thousands of equal scores.

Who waits for whom: each thread waits for its own loads only.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from msa.config import MSAConfig
from msa.ir import Array
from msa.triton_impl.hopper.plan import PIECE, ROWS, ScorePlan, SuperTile
from msa.triton_impl.launch import pad
from msa.triton_impl.tuning import EVERY_LAUNCH

MOST_TIED = gl.constexpr(2**14)
"""Equal values of a row that are counted: more than places, and with 16 more still in 15 bits."""

WARPS = 1
"""Warps of one program, 32 rows each."""


# -- sorting inside a thread ----------------------------------------------------------------------
@gluon.jit
def pairs(x, APART: gl.constexpr):
    """The entries of x [R, N] that lie APART columns from one another, as two tensors."""
    R: gl.constexpr = x.shape[0]
    x = gl.reshape(x, [R, x.shape[1] // (2 * APART), 2, APART])
    return gl.split(gl.permute(x, (0, 1, 3, 2)))


@gluon.jit
def unite(a, b):
    """What `pairs` took apart."""
    R: gl.constexpr = a.shape[0]
    N: gl.constexpr = 2 * a.shape[1] * a.shape[2]
    return gl.reshape(gl.permute(gl.join(a, b), (0, 1, 3, 2)), [R, N])


@gluon.jit
def merge(x, LOG: gl.constexpr, UP: gl.constexpr):
    """Sort runs of 2 ** LOG columns, each of which first rises and then falls, or the reverse."""
    for i in gl.static_range(LOG):
        a, b = pairs(x, 2 ** (LOG - 1 - i))
        if UP:
            x = unite(gl.minimum(a, b), gl.maximum(a, b))
        else:
            x = unite(gl.maximum(a, b), gl.minimum(a, b))
    return x


@gluon.jit
def sort(x, LOG: gl.constexpr):
    """Sort 2 ** LOG columns, ascending: runs of 2, 4, 8 ... columns, up and down by turns."""
    R: gl.constexpr = x.shape[0]
    N: gl.constexpr = x.shape[1]
    for i in gl.static_range(1, LOG):
        a, b = pairs(x, 2**i)
        a = merge(gl.reshape(a, [R, N // 2]), i, True)
        b = merge(gl.reshape(b, [R, N // 2]), i, False)
        x = unite(gl.reshape(a, [R, N // 2 ** (i + 1), 2**i]),
                  gl.reshape(b, [R, N // 2 ** (i + 1), 2**i]))  # fmt: skip
    return merge(x, LOG, True)


@gluon.jit
def keep_larger(best, x, LOG: gl.constexpr):
    """The largest 2 ** LOG of best (descending) and x (in any order), descending [R, 2 ** LOG]."""
    L: gl.constexpr = best.type.layout
    x = gl.convert_layout(sort(x, LOG), L, assert_trivial=True)
    return gl.convert_layout(merge(gl.maximum(best, x), LOG, False), L, assert_trivial=True)


@gluon.jit
def add(a, b):
    """The sum, for a prefix sum."""
    return a + b


@gluon.jit
def as_row(x, L: gl.constexpr):
    """Numbers of rows [R], to be used beside tensors [R, C] of layout L; no number moves."""
    return gl.convert_layout(x, gl.SliceLayout(1, L), assert_trivial=True)


@gluon.jit
def bound_of(best, PLACES: gl.constexpr, L_C: gl.constexpr):
    """The last of the best PLACES values, and how many values equal to it are among them [R]."""
    o_k = gl.arange(0, best.shape[1], layout=gl.SliceLayout(0, best.type.layout))[None, :]
    bound = gl.max(gl.where(o_k == PLACES - 1, best, float("-inf")), 1)
    above = gl.sum((best > bound[:, None]).to(gl.int32), 1)
    return as_row(bound, L_C), as_row(PLACES - above, L_C)


@gluon.jit
def write_kept(p_out, x, ids, limit, bound, ties, above, tied, SHIFT: gl.constexpr,
               STEP: gl.constexpr):  # fmt: skip
    """Write the ids [R, K] (+ SHIFT) of the x that reach the bound, behind those written before.

    above, tied [R]: how many values above the bound, and equal to it, came before; of the equal
    ones `ties` are kept. Only ids below `limit` are written. Returns both counts after this batch,
    `tied` at most MOST_TIED. One prefix sum counts both, in 16 bits each.
    """
    m_above = x > bound[:, None]
    m_tied = x == bound[:, None]
    both = m_above.to(gl.int32) + (m_tied.to(gl.int32) << 16)
    b_both = gl.associative_scan(both, 1, add) + (above + (tied << 16))[:, None]
    b_tied = b_both >> 16
    rank = (b_both & 0xFFFF) + gl.minimum(b_tied, ties[:, None]) - 1
    keep = (m_above | (m_tied & (b_tied <= ties[:, None]))) & (ids < limit[:, None])
    gl.store(p_out[:, None] + rank * STEP, ids + SHIFT, mask=keep)
    total = gl.sum(both, 1)
    return above + (total & 0xFFFF), gl.minimum(tied + (total >> 16), MOST_TIED)


# -- reading --------------------------------------------------------------------------------------
@gluon.jit
def load_maxima(p_x, first, stop, ROWS: gl.constexpr, L: gl.constexpr, K: gl.constexpr):
    """Maxima first ... first + K of every row [R, K]; -inf from stop on."""
    o_k = first + gl.arange(0, K, layout=gl.SliceLayout(0, L))[None, :]
    return gl.load(p_x[:, None] + o_k * ROWS, mask=o_k < stop, other=float("-inf"))


@gluon.jit
def load_pieces(p_x, pieces, real, ROWS: gl.constexpr, PIECE: gl.constexpr, L: gl.constexpr,
                L_3: gl.constexpr):  # fmt: skip
    """The scores of some pieces of every row, and the blocks' ids; -inf where not `real`.

    p_x [R]; pieces, real [R, K / PIECE]; results [R, K].
    """
    R: gl.constexpr = pieces.shape[0]
    K: gl.constexpr = pieces.shape[1] * PIECE
    o_p = gl.arange(0, PIECE, layout=gl.SliceLayout(0, gl.SliceLayout(1, L_3)))[None, None, :]
    p_x = as_row(p_x, gl.SliceLayout(2, L_3))
    p_x = p_x[:, None, None] + (pieces.to(gl.int64) * (ROWS * PIECE))[:, :, None] + o_p
    x = gl.load(p_x, mask=real[:, :, None], other=float("-inf"))
    ids = pieces[:, :, None] * PIECE + o_p
    x = gl.convert_layout(gl.reshape(x, [R, K]), L, assert_trivial=True)
    return x, gl.convert_layout(gl.reshape(ids, [R, K]), L, assert_trivial=True)


@gluon.jit
def load_row(p_x, p_ids, first, n, LONG: gl.constexpr, K: gl.constexpr, ROWS: gl.constexpr,
             PIECE: gl.constexpr, L: gl.constexpr):  # fmt: skip
    """Scores of pieces first ... first + K / PIECE of the n to look at, and the ids, [R, K] each.

    LONG: these are the pieces whose ids lie at p_ids [R]; otherwise the pieces of the slab.
    """
    R: gl.constexpr = p_x.shape[0]
    N: gl.constexpr = K // PIECE
    WARPS: gl.constexpr = R // 32
    L_3: gl.constexpr = gl.BlockedLayout([1, N, PIECE], [32, 1, 1], [WARPS, 1, 1], [2, 1, 0])
    L_2: gl.constexpr = gl.SliceLayout(2, L_3)
    pieces = first + gl.arange(0, N, layout=gl.SliceLayout(0, L_2))[None, :]
    pieces = pieces + gl.zeros([R, N], gl.int32, layout=L_2)
    real = pieces < n
    if LONG:
        pieces = gl.load(
            as_row(p_ids, L_2)[:, None] + pieces * R, mask=real, other=2**27
        )  # behind every real piece
    return load_pieces(p_x, pieces, real, ROWS, PIECE, L, L_3)


# -- the kernel -----------------------------------------------------------------------------------
@gluon.jit
def pick_kernel(scores, maxima, tiles, kept, out, HKV: gl.constexpr, BK: gl.constexpr,
                TOP_K: gl.constexpr, SINK: gl.constexpr, LOCAL: gl.constexpr,
                PLACES: gl.constexpr, LONG: gl.constexpr, LOG: gl.constexpr,
                ROWS: gl.constexpr, PIECE: gl.constexpr, WARPS: gl.constexpr):  # fmt: skip
    """32 * WARPS rows of one tile.

    Parameters:
        scores: [pieces, ROWS, PIECE], float32; the scores of the super-tile
        maxima: [pieces, ROWS], float32; the maximum of each piece, read if LONG
        tiles: [tiles, 8], int32; see `ScorePlan`, from the first tile of the super-tile on
        kept: [programs, PLACES, 32 * WARPS], int32; scratch, the kept pieces of each row, if LONG
        out: [Tq, Hkv, k], int32; the selection, written
        HKV: groups
        BK: keys of a block
        TOP_K: k
        SINK, LOCAL: forced first and recent blocks
        PLACES: places for blocks that are not forced
        LONG: bool; look at the maxima of pieces first
        LOG: logarithm of PLACES rounded up to a power of two, 4 at least
        ROWS: rows of a tile
        PIECE: blocks of a piece
        WARPS: warps of one program
    """
    R: gl.constexpr = 32 * WARPS
    K: gl.constexpr = 2**LOG  # columns of a batch that is sorted
    C: gl.constexpr = 16  # columns of a batch whose ids are written
    L: gl.constexpr = gl.BlockedLayout([1, K], [32, 1], [WARPS, 1], [1, 0])
    L_C: gl.constexpr = gl.BlockedLayout([1, C], [32, 1], [WARPS, 1], [1, 0])
    L_R: gl.constexpr = gl.SliceLayout(1, L)
    p_tile = tiles + gl.program_id(0).to(gl.int64) * 8
    start, stop, position = gl.load(p_tile), gl.load(p_tile + 1), gl.load(p_tile + 2)
    slab, blocks = gl.load(p_tile + 3).to(gl.int64), gl.load(p_tile + 4)
    first_row = gl.program_id(1) * R
    if start + first_row // HKV < stop:
        o_m = first_row + gl.arange(0, R, layout=L_R)
        o_t = start + o_m // HKV  # [R] query
        m_m = (o_t < stop) & (o_m < ROWS // HKV * HKV)
        own = (position + o_m // HKV) // BK
        limit = gl.where(m_m, gl.maximum(own - LOCAL + 1 - SINK, 0), 0)  # [R] scored blocks
        if PLACES == 0:
            limit = gl.zeros_like(limit)
        before = gl.minimum(own + 1, SINK)  # [R] forced first blocks
        p_out = out + (o_t.to(gl.int64) * HKV + o_m % HKV) * TOP_K
        p_x = scores + slab * ROWS + o_m * PIECE
        p_max = maxima + slab // PIECE * ROWS + o_m
        program = gl.program_id(0).to(gl.int64) * gl.num_programs(1) + gl.program_id(1)
        p_ids = kept + program * (PLACES * R) + gl.arange(0, R, layout=L_R)
        zero = gl.zeros([R], gl.int32, layout=L_R)
        n = (blocks + PIECE - 1) // PIECE  # pieces to look at
        if LONG:
            best = gl.full([R, K], float("-inf"), gl.float32, layout=L)
            x_k = load_maxima(p_max, 0, n, ROWS, L, K)
            for first in range(0, n, K):
                if K < 64:  # more would not fit into the registers
                    next_k = load_maxima(p_max, first + K, n, ROWS, L, K)
                    best = keep_larger(best, x_k, LOG)
                    x_k = next_k
                else:
                    best = keep_larger(best, x_k, LOG)
                    x_k = load_maxima(p_max, first + K, n, ROWS, L, K)
            bound, ties = bound_of(best, PLACES, L_C)
            above, tied = as_row(zero, L_C), as_row(zero, L_C)
            x_c = load_maxima(as_row(p_max, L_C), 0, n, ROWS, L_C, C)
            for first in range(0, n, C):
                next_c = load_maxima(as_row(p_max, L_C), first + C, n, ROWS, L_C, C)
                ids = first + gl.arange(0, C, layout=gl.SliceLayout(0, L_C))[None, :] + gl.zeros(
                    [R, C], gl.int32, layout=L_C)  # fmt: skip
                above, tied = write_kept(as_row(p_ids, L_C), x_c, ids, as_row(zero + n, L_C), bound,
                                         ties, above, tied, 0, R)  # fmt: skip
                x_c = next_c
            n = gl.minimum(n, PLACES)
        best = gl.full([R, K], float("-inf"), gl.float32, layout=L)
        for first in range(0, n, K // PIECE):
            x_k, _ = load_row(p_x, p_ids, first, n, LONG, K, ROWS, PIECE, L)
            best = keep_larger(best, x_k, LOG)
        bound, ties = bound_of(best, PLACES, L_C)
        above, tied = as_row(zero, L_C), as_row(zero, L_C)
        for first in range(0, n, C // PIECE):
            x_c, ids = load_row(p_x, p_ids, first, n, LONG, C, ROWS, PIECE, L_C)
            above, tied = write_kept(as_row(p_out + before, L_C), x_c, ids, as_row(limit, L_C),
                                     bound, ties, above, tied, SINK, 1)  # fmt: skip
        # forced first blocks, then room for the candidates, then the recent blocks, then -1
        before, own = as_row(before, L_C)[:, None], as_row(own, L_C)[:, None]
        filled = before + as_row(gl.minimum(limit, PLACES), L_C)[:, None]
        p_row, m_row = as_row(p_out, L_C)[:, None], as_row(m_m, L_C)[:, None]
        for first in range(0, TOP_K, C):
            o_p = first + gl.arange(0, C, layout=gl.SliceLayout(0, L_C))[None, :] + 0 * own
            last = gl.maximum(own - LOCAL + 1, SINK) + o_p - filled
            x = gl.where(o_p < before, o_p, gl.where(last <= own, last, -1))
            m_x = ((o_p < before) | (o_p >= filled)) & (o_p < TOP_K) & m_row
            gl.store(p_row + o_p, x, mask=m_x)


def select_scores(
    scores: Float[Tensor, "pieces ROWS PIECE"],
    maxima: Float[Tensor, "pieces ROWS"] | None,
    plan: ScorePlan,
    part: SuperTile,
    config: MSAConfig,
    out: Array,
) -> None:
    """Write the selected blocks of every row of one super-tile whose scores are there (R6-R8).

    `maxima` of the pieces are wanted where `part.long`.
    """
    _, groups, top_k = out.shape
    places = top_k - config.forced_blocks
    kept = scores  # the ids of the kept pieces of each row, where maxima are looked at
    if part.long:
        kept = torch.empty((part.tiles * ROWS, max(places, 1)), dtype=torch.int32,
                           device=out.device)  # fmt: skip
    pick_kernel[part.tiles, ROWS // (32 * WARPS)](
        scores, scores if maxima is None else maxima, plan.tiles[part.first_tile :], kept, out,
        HKV=groups, BK=config.block_size, TOP_K=top_k, SINK=config.sink_blocks,
        LOCAL=config.local_blocks, PLACES=places, LONG=part.long,
        LOG=pad(places).bit_length() - 1, ROWS=ROWS, PIECE=PIECE, WARPS=WARPS, num_warps=WARPS,
        **EVERY_LAUNCH,
    )  # fmt: skip
