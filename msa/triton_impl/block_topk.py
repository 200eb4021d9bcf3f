"""Index branch, unfused: the best blocks of rows of scores that were written out (R6-R8).

    for each row of scores:
        selection = sorted(forced blocks + best `places` of the others, ties to the lower id)

What the fast form changes:
 1. One read of the row, no exponential and no sort: selection needs the order of scores only.
 2. The row stays in registers, as integers in the order of its scores. A threshold that the best
    `places` reach is found by bisection, counting. It ends as soon as exactly `places` reach it.
 3. Bisection starts close to the threshold: the row is cut into pieces, and the best `places` of
    their maxima bound the threshold from below. Finding these costs a thirtieth of the search.
 4. The chosen columns become bits of a few words, and each output finds its own bit. So ids are
    ascending, as R8 wants them, and a prefix sum over all columns is needed for ties only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from msa import chips
from msa.checks import check_scored_blocks
from msa.config import MSAConfig
from msa.ir import BlockScores, Selection
from msa.triton_impl.bits import count_bits
from msa.triton_impl.launch import pad, require_kernels
from msa.triton_impl.places import on_its_device
from msa.triton_impl.tables import query_table
from msa.triton_impl.topk import (
    NO_BLOCK,
    NO_SCORE,
    keep_best,
    score_key,
    store_selection,
    threshold_of,
)
from msa.triton_impl.tuning import EVERY_LAUNCH


@triton.jit
def nth_kept(m_keep, o_j, R: tl.constexpr, W: tl.constexpr):
    """The column of the j-th kept entry of each row, for each j of o_j [1, P]; [R, P].

    Kept columns become bits of W / 32 words; the word of the j-th bit is found by a prefix sum over
    the words, its place in the word by halving.
    """
    o_w = tl.arange(0, W // 32)
    b_bit = tl.reshape(m_keep.to(tl.int32), [R, W // 32, 32]) << tl.arange(0, 32)[None, None, :]
    b_word = tl.sum(b_bit, 2)  # [R, W / 32]
    b_count = count_bits(b_word.to(tl.uint32))
    b_before = tl.cumsum(b_count, 1) - b_count
    o_j3 = o_j[:, None, :]
    m_in = (b_before[:, :, None] <= o_j3) & (o_j3 < (b_before + b_count)[:, :, None])
    b_j = tl.sum(tl.where(m_in, o_j3 - b_before[:, :, None], 0), 1)  # [R, P] rank within the word
    b_id = tl.sum(tl.where(m_in, 32 * o_w[None, :, None], 0), 1)
    b_word = tl.sum(tl.where(m_in, b_word[:, :, None], 0), 1)
    for i in tl.static_range(5):
        half = 16 >> i
        b_low = count_bits((b_word & ((1 << half) - 1)).to(tl.uint32))
        m_high = b_j >= b_low
        b_j = tl.where(m_high, b_j - b_low, b_j)
        b_id = tl.where(m_high, b_id + half, b_id)
        b_word = tl.where(m_high, b_word >> half, b_word)
    return b_id


@triton.jit
def row_topk_kernel(scores, positions, out, n_rows, n_blocks, HKV: tl.constexpr, BK: tl.constexpr,
                    TOP_K: tl.constexpr, P: tl.constexpr, SINK: tl.constexpr,
                    LOCAL: tl.constexpr, PLACES: tl.constexpr, PIECES: tl.constexpr,
                    W: tl.constexpr, R: tl.constexpr, WORDS: tl.constexpr):  # fmt: skip
    """R rows of up to W scores.

    Parameters:
        scores: [Tq, Hkv, NB], float32
        positions: [Tq], int32; each query's position in its sequence
        out: [Tq, Hkv, k], int32; the selection, written
        n_rows: int; Tq * Hkv
        n_blocks: int; NB
        HKV: groups
        BK: keys of a block
        TOP_K, P: k, and rounded up to a power of two
        SINK, LOCAL: forced first and recent blocks
        PLACES: places for blocks that are not forced
        PIECES: pieces of a row, whose maxima tell where bisection starts
        W: NB rounded up to a power of two
        R: rows of one program
        WORDS: bool; write the ids by way of bits in words
    """
    o_r = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    m_r = o_r < n_rows
    b_own = tl.load(positions + o_r // HKV, mask=m_r, other=0) // BK  # [R]
    b_limit = tl.where(m_r, tl.minimum(b_own - LOCAL + 1, n_blocks), 0)
    o_b = tl.arange(0, W)[None, :]
    m_b = (o_b >= SINK) & (o_b < b_limit[:, None])  # [R, W]
    p_x = scores + o_r[:, None] * n_blocks + o_b
    m_x = (o_b < ((b_limit + 15) // 16 * 16)[:, None]) & (o_b < n_blocks)  # whole vectors
    b_key = tl.where(m_b, score_key(tl.load(p_x, mask=m_x, other=0.0)), NO_SCORE)
    b_low = tl.min(tl.where(m_b, b_key, NO_BLOCK), 1)
    if R == 1 and PIECES < W:
        b_piece = tl.max(tl.reshape(b_key, [R, W // PIECES, PIECES]), 1)
        b_least = tl.min(tl.where(b_piece > NO_SCORE, b_piece, NO_BLOCK), 1)
        guess = tl.max(threshold_of(b_piece, b_piece > NO_SCORE, b_least, PLACES, 0, 1))
        reach = tl.sum(tl.sum((b_key >= guess).to(tl.int32), 1))
        if reach >= PLACES:
            b_low = tl.full([R], guess, tl.int32)
    b_low = threshold_of(b_key, m_b, b_low, PLACES, 0, 1)
    if WORDS:
        m_keep = m_b & (b_key >= b_low[:, None])
        b_kept = tl.sum(m_keep.to(tl.int32), 1)
        if tl.max(b_kept) > PLACES:  # ties at the threshold
            m_keep, _, b_kept = keep_best(b_key, m_b, b_low, PLACES, 1)
        o_j = tl.arange(0, P)[None, :]
        b_kept = (b_kept + tl.minimum(b_own + 1, SINK))[:, None]  # forced first blocks are bits too
        b_id = nth_kept(m_keep | ((o_b < SINK) & (o_b <= b_own[:, None])), o_j, R, W)
        b_last = tl.maximum(b_own - LOCAL + 1, SINK)[:, None] + o_j - b_kept  # the recent blocks
        b_last = tl.where(b_last <= b_own[:, None], b_last, -1)
        b_id = tl.where(o_j < b_kept, b_id, b_last)
        p_out = out + o_r[:, None] * TOP_K + o_j
        tl.store(p_out, b_id, mask=m_r[:, None] & (o_j < TOP_K))
    else:
        m_keep, b_rank, b_kept = keep_best(b_key, m_b, b_low, PLACES, 1)
        b_id = o_b + tl.zeros_like(b_key)
        store_selection(out + o_r * TOP_K, m_r, m_keep, b_rank, b_id, b_kept, b_own,
                        TOP_K, P, SINK, LOCAL, 1)  # fmt: skip


def select_rows(
    values: Float[Tensor, "Tq Hkv NB"], positions: Int[Tensor, " Tq"], block_size: int,
    config: MSAConfig,
) -> Int[Tensor, "Tq Hkv k"]:  # fmt: skip
    """The selected blocks of each row; positions[t] is the position of query t (R6-R8)."""
    n_q, groups, n_blocks = values.shape
    out = torch.empty((n_q, groups, config.top_k), dtype=torch.int32, device=values.device)
    places = config.top_k - config.forced_blocks
    width, slots = pad(n_blocks, 32), pad(config.top_k, 2)
    room = max(width, slots)  # numbers of one row
    most = 1024 // chips.current().family.warp  # a program has at most 1024 threads
    warps = min(most, max(1, room // 1024))
    check_scored_blocks(n_blocks)
    if n_q:
        rows = max(1, warps * 1024 // room)
        row_topk_kernel[triton.cdiv(n_q * groups, rows),](
            values.contiguous(), positions, out, n_q * groups, n_blocks, HKV=groups, BK=block_size,
            TOP_K=config.top_k, P=slots, SINK=config.sink_blocks, LOCAL=config.local_blocks,
            PLACES=places, PIECES=pad(2 * places, 32), W=width, R=rows,
            WORDS=rows * width // 32 * slots <= 2048 * warps, num_warps=warps, **EVERY_LAUNCH,
        )  # fmt: skip
    return out


@on_its_device
def select_blocks(scores: BlockScores, config: MSAConfig) -> Selection:
    """The forced blocks, then the best of the others; ties to the lower id (R6-R8)."""
    require_kernels(scores.block_size, config.top_k, **{"scores.values": scores.values})
    values, sequences = scores.values, scores.sequences
    _, positions, _ = query_table(sequences, scores.block_size, values.device)
    indices = select_rows(values, positions, scores.block_size, config)
    return Selection(indices, sequences, scores.block_size)
