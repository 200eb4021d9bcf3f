"""What many kernels do with a tile: load its rows, look up its item, take a step of a softmax.

Triton inlines these functions, so sharing them costs nothing. In all kernels of this package a name
says what a variable is:

    i_x     number of x, one for the program
    o_x     numbers of x, a vector
    p_x     where x lies: one address or a tensor of addresses
    m_x     mask of x
    b_x     values of x, held in registers
    X       a size that is known when the kernel is compiled (tl.constexpr)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from msa.triton_impl.launch import INTERPRETED

FAST = tl.constexpr(not INTERPRETED and torch.version.hip is None)
"""Whether CUDA's own functions can be called."""
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-(2.0**128 - 2.0**104))  # float32's lowest number: a maximum of no scores


# -- addresses and loads --------------------------------------------------------------------------
@triton.jit
def along(o_x, stride):
    """The offset, in 64 bits, of index o_x along a dim with that stride: views may reach that far.

    Every product of an index and a stride is this one. Offsets within a tile of a contiguous tensor
    stay in 32 bits.
    """
    return tl.cast(o_x, tl.int64) * stride


@triton.jit
def table_row(rows, i_s, NAMED: tl.constexpr):
    """The row of the page table of sequence i_s: rows[i_s] if rows are NAMED, else i_s."""
    if NAMED:
        return tl.load(rows + i_s)
    else:
        return i_s


@triton.jit
def load_tile(p_row, m_row, o_d, DIM: tl.constexpr):
    """Rows that start at p_row [R] as [R, BD]; zeros where m_row is False and from DIM on."""
    m_x = m_row[:, None] & (o_d < DIM)[None, :]
    return tl.load(p_row[:, None] + o_d[None, :], mask=m_x, other=0.0)


@triton.jit
def store_tile(p_row, m_row, o_d, b_x, DIM: tl.constexpr):
    """Write rows b_x [R, BD] to p_row [R], in the dtype there; nothing from DIM on."""
    m_x = m_row[:, None] & (o_d < DIM)[None, :]
    tl.store(p_row[:, None] + o_d[None, :], b_x.to(p_row.dtype.element_ty), mask=m_x)


@triton.jit
def load_keys(base, first, stop, stride, o_d, DIM: tl.constexpr, BN: tl.constexpr):
    """Tokens first ... first + BN of one head as [BN, BD]; zeros from `stop` on."""
    o_n = first + tl.arange(0, BN)
    return load_tile(base + along(o_n, stride), o_n < stop, o_d, DIM)


@triton.jit
def wait_for_threads():
    """Wait until all threads of the program are here; then each sees what the others wrote.

    Some kernels exchange data between the threads of one program through global memory: they store
    a tile, wait here, and load it in another order or shape. This is sound because
     1. `tl.debug_barrier` is the barrier of a CUDA block. It also orders memory: writes to global
        memory before it are visible to every thread of the block after it, and a load before it is
        done before a store after it. The compiler moves no load or store across it;
     2. only this program uses the memory while the exchange lasts, so no other program has to be
        waited for;
     3. the loads are ordinary loads, which do not go through the cache for constant data.
    Before the same places are written again, a second barrier must follow the loads. Where another
    program reads what was written (see `page_attention`), an atomic with release and acquire
    follows the barrier.
    """
    tl.debug_barrier()


# -- work items -----------------------------------------------------------------------------------
@triton.jit
def load_item(rows, first_keys, key_stops, n_blocks, i_item, i_n=0):
    """The group of an item, key i_n of its block, and the end of the keys of its sequence."""
    row = tl.load(rows + i_item)
    i_b = row % n_blocks
    return row // n_blocks, tl.load(first_keys + i_b) + i_n, tl.load(key_stops + i_b)


@triton.jit
def edge_rows(query_ids, x, length, G: tl.constexpr, GP: tl.constexpr, BM: tl.constexpr):
    """Rows x ... x + BM of an item, edges times heads padded to GP: query, head, whether real."""
    o_x = x + tl.arange(0, BM)
    m_x = o_x < length
    b_t = tl.load(query_ids + o_x // GP, mask=m_x, other=0).to(tl.int64)
    return b_t, o_x % GP, m_x & (o_x % GP < G)


# -- softmax --------------------------------------------------------------------------------------
@triton.jit
def online_softmax_step(b_s, b_top, b_sum, scale, m_row=None):
    """Take in the scores b_s [BM, BN], for the rows in m_row [BM] (None: all rows).

    b_top is the highest score of each row so far, not yet scaled; b_sum is the sum of
    exp2((score - b_top) * scale). Returns the new b_top and b_sum, the weights of the scores, and
    the factor by which what was summed up before has to shrink.

    The maximum is taken off before the scale is multiplied on. scale * score - scale * maximum
    would become one fused multiply-add. Its residual at the maximum is not 0 but half a unit in the
    last place, enough to lose the whole row where logits pass 2^23.
    """
    b_new = tl.maximum(b_top, tl.max(b_s, 1))
    b_less = b_new
    if m_row is not None:
        b_new = tl.where(m_row, b_new, b_top)
        b_less = tl.where(m_row, b_new, float("inf"))  # makes the weights of the others exactly 0
    b_p = tl.exp2((b_s - b_less[:, None]) * scale)
    b_decay = tl.exp2((b_top - b_new) * scale)
    return b_new, b_sum * b_decay + tl.sum(b_p, 1), b_p, b_decay


@triton.jit
def scaled_softmax_step(b_s, b_top, b_sum, scale, by, m_row):
    """The same for scores that have yet to be multiplied by a positive number `by`.

    b_top is the highest product so far. Within b_s the maximum is taken off before it is multiplied
    on, so at the maximum the difference is exactly 0. The distance to the highest product of other
    calls is part of a fused multiply-add. So a score costs no more than in `online_softmax_step`.
    """
    b_peak = tl.maximum(tl.max(b_s, 1), LOWEST)
    b_high = tl.maximum(b_peak * by, LOWEST)
    b_new = tl.where(m_row, tl.maximum(b_top, b_high), b_top)
    b_less = tl.where(m_row, (b_high - b_new) * scale, float("-inf"))
    b_p = tl.exp2((b_s - b_peak[:, None]) * (scale * by) + b_less[:, None])
    b_decay = tl.exp2((b_top - b_new) * scale)
    return b_new, b_sum * b_decay + tl.sum(b_p, 1), b_p, b_decay


@triton.jit
def slot_weight(b_tops, b_totals, b_most, scale):
    """What a slot adds to the sum of its row's softmax, whose highest score is b_most (R16).

    A slot keeps its highest score, not scaled, and its sum of exp2((score - highest) * scale) as
    two numbers. In one float32 number, the LSE, the logarithm of the sum is lost beside a large
    score. The difference of two scores is as exact as the scores are.
    """
    return b_totals * tl.exp2((b_tops - b_most) * scale)


@triton.jit
def fast_log(x):
    """Natural logarithm with an absolute or relative error of at most 2^-22; 0 becomes -inf."""
    if FAST:
        return libdevice.fast_logf(x)  # one instruction, where tl.log takes about twenty
    else:
        return tl.log(x)
