"""The share of a program of the scored blocks of all sequences, found on the device (R4, R6).

    blocks = scored blocks of each sequence, from its length
    most   = total blocks / programs, rounded up
    share  = blocks program * most ... program * most + most, all sequences one behind the other

Every program finds its own share, from all lengths. There is no table of work, so nothing has to be
made for a step, and a captured launch stays right while the sequences grow.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from msa.triton_impl.tile_verbs import along

LANES = gl.constexpr(32)
"""Page ids that are read by one load."""


@gluon.jit
def scored_blocks(length, BK: gl.constexpr, SINK: gl.constexpr, LOCAL: gl.constexpr):
    """Blocks of a sequence of that length that are not forced (R6); 0 for an empty slot."""
    return gl.maximum((length + BK - 1) // BK - LOCAL - SINK, 0)


@gluon.jit
def load_blocks(lengths, first, batch, stride_ls, BK: gl.constexpr, SINK: gl.constexpr,
                LOCAL: gl.constexpr, L: gl.constexpr, C: gl.constexpr):  # fmt: skip
    """Scored blocks of the sequences first ... first + C; 0 behind the last one [C]."""
    o_s = first + gl.arange(0, C, layout=L)
    length = gl.load(lengths + along(o_s, stride_ls), mask=o_s < batch, other=0)
    return scored_blocks(length.to(gl.int32), BK, SINK, LOCAL)


@gluon.jit
def add(a, b):
    """The sum, for a prefix sum."""
    return a + b


@gluon.jit
def find_share(lengths, batch, stride_ls, BK: gl.constexpr, SINK: gl.constexpr,
               LOCAL: gl.constexpr, L: gl.constexpr, C: gl.constexpr):  # fmt: skip
    """The share of this program: its first sequence, the first block there, how many blocks.

    The blocks of all sequences stand one behind the other. Every program takes as many of them.
    Returns also how many scored blocks the first sequence has.
    """
    blocks = load_blocks(lengths, 0, batch, stride_ls, BK, SINK, LOCAL, L, C)
    total = gl.sum(blocks, 0)
    for first in range(C, batch, C):
        total += gl.sum(load_blocks(lengths, first, batch, stride_ls, BK, SINK, LOCAL, L, C), 0)
    most = (total + gl.num_programs(0) - 1) // gl.num_programs(0)
    start = gl.program_id(0) * most
    n = gl.maximum(gl.minimum(total - start, most), 0)
    sequence, before, base, its_blocks = 0, 0, 0, 0  # `before`: blocks of the sequences before it
    for first in range(0, batch, C):
        stops = base + gl.associative_scan(blocks, 0, add)
        passed = stops <= start
        its = (stops > start) & (stops - blocks <= start)
        sequence += gl.sum(passed.to(gl.int32), 0)
        before += gl.sum(gl.where(passed, blocks, 0), 0)
        its_blocks += gl.sum(gl.where(its, blocks, 0), 0)
        base += gl.sum(blocks, 0)
        blocks = load_blocks(lengths, first + C, batch, stride_ls, BK, SINK, LOCAL, L, C)
    return sequence, start - before, n, its_blocks


@gluon.jit
def next_blocks(lengths, i_s, there, stride_ls, BK: gl.constexpr, SINK: gl.constexpr,
                LOCAL: gl.constexpr):  # fmt: skip
    """Scored blocks of one sequence, if it is `there`."""
    length = gl.load(lengths + along(i_s, stride_ls), mask=there, other=0).to(gl.int32)
    return scored_blocks(length, BK, SINK, LOCAL)
