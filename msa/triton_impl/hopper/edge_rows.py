"""What the copying warps of `key_gradients.py` do, and how all of its warps walk along the edges.

A program has a run of edges (`edge_shares.py`). Each group of warps walks along it by itself, from
row to row of the reverse index, and within a row in tiles of POS queries. So all of them take the
same steps, and the rings between them need no other messages.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from msa.triton_impl.hopper.ring import copy_tile, in_parts, wait_empty


@gluon.jit
def load_share(tables):
    """This program's first edge, its stop, and the row of the first edge."""
    _ids, _offsets, cuts, first_rows, _firsts, _shifts = tables
    p = gl.program_id(0)
    return gl.load(cuts + p), gl.load(cuts + p + 1), gl.load(first_rows + p).to(gl.int32)


@gluon.jit
def load_row(tables, row, edge, last, n_blocks, POS: gl.constexpr):
    """Of a row: its stop among this program's edges, the tiles up to there, its group, its block.

    A row without edges has no tile, and stops at `edge`.
    """
    _ids, offsets, _cuts, _first_rows, _firsts, _shifts = tables
    stop = gl.minimum(gl.load(offsets + row + 1), last)
    n = ((stop - edge + (POS - 1)) // POS).to(gl.int32)
    return stop, n, row // n_blocks, row % n_blocks


@gluon.jit
def copy_keys(k_desc, v_desc, keys, tables, n_blocks, POS: gl.constexpr):
    """Copy the keys and values of each item's block."""
    k_tile, v_tile, key_full, key_empty = keys
    _ids, _offsets, _cuts, _first_rows, firsts, _shifts = tables
    HALF: gl.constexpr = k_tile.shape[1]
    DIM: gl.constexpr = k_tile.shape[2]
    edge, last, row = load_share(tables)
    item = 0
    while edge < last:
        stop, n, group, i_b = load_row(tables, row, edge, last, n_blocks, POS)
        if n > 0:
            first = gl.load(firsts + i_b)
            wait_empty(key_empty, item, 1)
            mbarrier.expect(key_full.index(0), 4 * k_desc.block_type.nbytes)
            for w in gl.static_range(2):
                place = [first + w * HALF, group * DIM]
                copy_tile(k_desc, place, key_full.index(0), k_tile.index(w))
                copy_tile(v_desc, place, key_full.index(0), v_tile.index(w))
            item += 1
        edge = stop
        row += 1


@gluon.jit
def copy_rows(q_desc, do_desc, rows, empty, tables, n_blocks, n_q, POS: gl.constexpr,
              STAGES: gl.constexpr):  # fmt: skip
    """Gather the rows of q and dO, one query after another, half of their columns at a time."""
    q_tiles, do_tiles, full = rows
    ids, _offsets, _cuts, _first_rows, _firsts, _shifts = tables
    HEADS: gl.constexpr = q_desc.block_type.shape[1]
    WIDTH: gl.constexpr = q_desc.block_type.shape[2]
    PARTS: gl.constexpr = [STAGES * 2 * POS, 1, HEADS, WIDTH]
    LAYOUT: gl.constexpr = q_desc.layout
    q_parts = in_parts(q_tiles, PARTS, LAYOUT)
    do_parts = in_parts(do_tiles, PARTS, LAYOUT)
    edge, last, row = load_share(tables)
    step = 0
    while edge < last:
        stop, n, group, _i_b = load_row(tables, row, edge, last, n_blocks, POS)
        for i in range(n):
            s = step % STAGES
            bar = full.index(s)
            queries = ()  # all are loaded before the wait
            for j in gl.static_range(POS):
                x = edge + i * POS + j
                t = gl.load(ids + gl.minimum(x, stop - 1))
                queries = queries + (gl.where(x < stop, t, n_q),)  # noqa: RUF005 no lists in Gluon
            wait_empty(empty, step, STAGES)
            mbarrier.expect(bar, 4 * POS * q_desc.block_type.nbytes)
            for j in gl.static_range(POS):
                for c in gl.static_range(2):
                    place = [queries[j], group * HEADS, c * WIDTH]
                    copy_tile(q_desc, place, bar, q_parts.index((s * 2 + c) * POS + j))
                    copy_tile(do_desc, place, bar, do_parts.index((s * 2 + c) * POS + j))
            step += 1
        edge = stop
        row += 1


@gluon.jit
def copy_numbers(lse, delta, numbers, empty, tables, factor, n_blocks, G: gl.constexpr,
                 HKV: gl.constexpr, POS: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Write -lse / softmax_scale, -delta and the query of each row of a tile."""
    lse_tiles, delta_tiles, t_tiles, full = numbers
    ids, _offsets, _cuts, _first_rows, _firsts, _shifts = tables
    step = 0
    edge, last, row = load_share(tables)
    ROWS: gl.constexpr = lse_tiles.shape[1]
    HEADS: gl.constexpr = ROWS // POS
    L: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    o_m = gl.arange(0, ROWS, layout=L)
    while edge < last:
        stop, n, group, _i_b = load_row(tables, row, edge, last, n_blocks, POS)
        for i in range(n):
            s = step % STAGES
            x = edge + i * POS + o_m // HEADS
            t = gl.load(ids + gl.minimum(x, stop - 1))
            place = t.to(gl.int64) * (HKV * G) + group * G + o_m % HEADS
            b_lse = gl.load(lse + place, mask=x < stop, other=float("inf"))
            b_delta = gl.load(delta + place, mask=x < stop, other=0.0)
            wait_empty(empty, step, STAGES)
            lse_tiles.index(s).store(b_lse * factor)
            delta_tiles.index(s).store(-b_delta)
            t_tiles.index(s).store(t)
            mbarrier.arrive(full.index(s), count=1)
            step += 1
        edge = stop
        row += 1
