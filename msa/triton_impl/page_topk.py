"""Decoding: the best blocks of one row of scores, found by one program (R6, R7).

A row is read by one program, which does nothing else meanwhile, so the time is set by the number of
reductions that follow one another, not by the work:

 1. Every PIECES-th block makes a piece. The best PLACES blocks lie in the PLACES pieces whose
    maxima are best, found by comparing all pairs of maxima at once. Only these pieces are read
    again.
 2. The least of these maxima is reached by the best PLACES blocks and few others. Up to four of the
    others are taken off one by one; if there are more, bisection finds the threshold.
"""

from __future__ import annotations

import triton
import triton.language as tl

from msa.triton_impl.topk import NO_BLOCK, NO_SCORE, score_key

LOWEST_RANK, HIGHEST_RANK = tl.constexpr(-(2**63)), tl.constexpr(2**63 - 1)


@triton.jit
def ranked(b_score, o_b, m_b):
    """Scores and block ids as one integer each: higher score first, then lower id (R7); unique."""
    b_key = tl.where(m_b, score_key(b_score), NO_SCORE)
    return (b_key.to(tl.int64) << 32) | (NO_BLOCK - o_b)


@triton.jit
def piece_maxima(p_score, first, stop, PIECES: tl.constexpr, LENGTH: tl.constexpr,
                 STEP: tl.constexpr):  # fmt: skip
    """The rank of each piece's best block among the blocks first ... stop [PIECES]."""
    o_p, o_l = tl.arange(0, PIECES), tl.arange(0, STEP)
    b_best = tl.full([PIECES], LOWEST_RANK, tl.int64)
    for i in range(0, LENGTH, STEP):
        o_b = (i + o_l)[:, None] * PIECES + o_p[None, :]
        b_x = ranked(tl.load(p_score + o_b), o_b, (o_b >= first) & (o_b < stop))
        b_best = tl.maximum(b_best, tl.max(b_x, 0))
    return b_best


@triton.jit
def best_of_scores(p_score, first, stop, PLACES: tl.constexpr, PP: tl.constexpr,
                   PIECES: tl.constexpr, LENGTH: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    """The best PLACES of the blocks first ... stop: ids of some candidates, and a mask of the best.

    Both are [PP, LENGTH]; a row's candidates are those of one piece, ascending.

    Parameters:
        p_score: [PIECES * LENGTH], float32; the row of scores
        first, stop: int; the blocks that may be chosen
        PLACES, PP: blocks to choose, and rounded up to a power of two
        PIECES, LENGTH: pieces of the row, blocks of a piece
        STEP: blocks of each piece that are held in registers at a time
    """
    b_best = piece_maxima(p_score, first, stop, PIECES, LENGTH, STEP)
    b_above = tl.sum((b_best[None, :] > b_best[:, None]).to(tl.int32), 1)  # [PIECES]
    o_p, o_x = tl.arange(0, PIECES), tl.arange(0, PP)
    b_piece = tl.sum(tl.where(b_above[None, :] == o_x[:, None], o_p[None, :], 0), 1)  # [PP]
    low = tl.min(tl.where(b_above < PLACES, b_best, HIGHEST_RANK), 0)
    high = tl.full((), HIGHEST_RANK, tl.int64)

    o_b = tl.arange(0, LENGTH)[None, :] * PIECES + b_piece[:, None]  # [PP, LENGTH]
    m_b = (o_b >= first) & (o_b < stop) & (o_x < min(PLACES, PIECES))[:, None]
    b_x = ranked(tl.load(p_score + o_b), o_b, m_b)
    n = tl.sum((m_b & (b_x >= low)).to(tl.int32))
    tries = 0
    while n > PLACES:
        if tries < 4:
            low = tl.min(tl.where(b_x > low, b_x, HIGHEST_RANK))
            n -= 1
        else:
            middle = (low | high) - ((low ^ high) >> 1)  # mean, rounded up, cannot overflow
            n_middle = tl.sum((b_x >= middle).to(tl.int32))
            low = tl.where(n_middle >= PLACES, middle, low)
            n = tl.where(n_middle >= PLACES, n_middle, n)
            high = tl.where(n_middle >= PLACES, high, middle - 1)
        tries += 1
    return o_b, m_b & (b_x >= low)
