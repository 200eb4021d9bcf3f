"""Top-k without sorting: scores as integers, a threshold by bisection, the kept blocks (R7, R8)."""

from __future__ import annotations

import triton
import triton.language as tl

NO_SCORE = tl.constexpr(-(2**31))  # below the key of any score, -inf included
NO_BLOCK = tl.constexpr(2**31 - 1)  # above any block id
ABOVE_BITS = tl.constexpr(12)  # bits of a count of keys above a threshold: KERNEL_TOP_K and some


@triton.jit
def score_key(b_score):
    """float32 -> int32 in the same order; NaN becomes -inf (R4), -0 becomes 0."""
    b_score = tl.where(b_score == b_score, b_score, float("-inf")) + 0.0
    b_bits = b_score.to(tl.int32, bitcast=True)
    return b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)


@triton.jit
def key_score(b_key):
    """The way back from `score_key`."""
    return (b_key ^ ((b_key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def threshold_of(b_key, m_valid, b_low, PLACES: tl.constexpr, SLACK: tl.constexpr,
                 AXIS: tl.constexpr):  # fmt: skip
    """A key that the best PLACES valid keys along AXIS reach, and few others; or all valid keys.

    Bisection: each step counts how many keys reach the middle. Three steps of four halve the
    distance between scores, which is quick on ordinary scores. The fourth halves the distance
    between integers, which is sure to end. A row is done when at most PLACES + SLACK keys reach its
    threshold, or when only one key is left, which several scores share.
    Keys that are not valid must be NO_SCORE. The search starts at b_low, a key that the best PLACES
    reach: the least valid key, or a better one.
    """
    b_n = tl.sum((m_valid & (b_key >= tl.expand_dims(b_low, AXIS))).to(tl.int32), AXIS)
    b_high = tl.max(b_key, AXIS)
    step = 0
    while tl.max(((b_n > PLACES + SLACK) & (b_low < b_high)).to(tl.int32)) > 0:
        b_mid = (b_low | b_high) - ((b_low ^ b_high) >> 1)  # mean, rounded up, cannot overflow
        if step % 4 != 3:
            b_mid = score_key(0.5 * key_score(b_low) + 0.5 * key_score(b_high))
            b_mid = tl.minimum(tl.maximum(b_mid, b_low + 1), b_high)
        b_reach = tl.sum((b_key >= tl.expand_dims(b_mid, AXIS)).to(tl.int32), AXIS)
        m_open, m_up = (b_n > PLACES + SLACK) & (b_low < b_high), b_reach >= PLACES
        b_n = tl.where(m_open & m_up, b_reach, b_n)
        b_high = tl.where(m_open & ~m_up, b_mid - 1, b_high)
        b_low = tl.where(m_open & m_up, b_mid, b_low)
        step += 1
    return b_low


@triton.jit
def keep_best(b_key, m_valid, b_low, PLACES: tl.constexpr, AXIS: tl.constexpr):
    """Keep all keys above the threshold, and of the keys equal to it the first ones (R7).

    Returns a mask of the kept keys, the rank of each in the order of places, and their number.
    """
    b_low = tl.expand_dims(b_low, AXIS)
    m_above, m_tied = m_valid & (b_key > b_low), m_valid & (b_key == b_low)
    b_both = tl.cumsum(m_above.to(tl.int32) + (m_tied.to(tl.int32) << ABOVE_BITS), AXIS)
    b_above = tl.sum(m_above.to(tl.int32), AXIS)
    b_room = tl.maximum(PLACES - b_above, 0)
    b_kept = b_above + tl.minimum(tl.sum(m_tied.to(tl.int32), AXIS), b_room)
    b_tied = b_both >> ABOVE_BITS  # at most PLACES + SLACK keys lie above; 19 bits are left
    b_room = tl.expand_dims(b_room, AXIS)
    b_rank = b_both - (b_tied << ABOVE_BITS) + tl.minimum(b_tied, b_room) - 1
    return m_above | (m_tied & (b_tied <= b_room)), b_rank, b_kept


@triton.jit
def store_selection(p_out, m_row, m_keep, b_rank, b_id, b_kept, b_own, TOP_K: tl.constexpr,
                    P: tl.constexpr, SINK: tl.constexpr, LOCAL: tl.constexpr,
                    AXIS: tl.constexpr):  # fmt: skip
    """Write rows of a Selection: first blocks, kept candidates, recent blocks, then -1 (R8).

    Candidates lie between the forced blocks, so this order is ascending. p_out, m_row, b_kept,
    b_own [R]; m_keep, b_rank, b_id with the candidates along AXIS.
    """
    b_first = tl.minimum(b_own + 1, SINK)  # [R] forced first blocks
    b_recent = tl.maximum(b_own - LOCAL + 1, SINK)  # [R] first of the recent blocks
    p_x = tl.expand_dims(p_out + b_first, AXIS) + b_rank
    tl.store(p_x, b_id, mask=m_keep & tl.expand_dims(m_row, AXIS))
    o_k = tl.expand_dims(tl.arange(0, P), 1 - AXIS)
    b_first, b_own = tl.expand_dims(b_first, AXIS), tl.expand_dims(b_own, AXIS)
    b_after = o_k - b_first - tl.expand_dims(b_kept, AXIS)  # >= 0 behind the candidates
    b_last = tl.expand_dims(b_recent, AXIS) + b_after
    b_x = tl.where(o_k < b_first, o_k, tl.where(b_last <= b_own, b_last, -1))
    m_x = (o_k < TOP_K) & ((o_k < b_first) | (b_after >= 0)) & tl.expand_dims(m_row, AXIS)
    tl.store(tl.expand_dims(p_out, AXIS) + o_k, b_x, mask=m_x)
