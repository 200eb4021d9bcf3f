"""How a tile of neighbouring queries walks the blocks of its union: shared by forward and backward.

A tile is BM = query positions x HEADS rows. Row i is position i // HEADS and head i % HEADS of the
heads that the program has; bit p of a block's mask says whether position p selected the block.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile_record(tiles, i_t):
    """A row of `tile_table`: first query, their end, own key of the first, first key, keys' end."""
    p_tile = tiles + i_t.to(tl.int64) * 5
    return (tl.load(p_tile), tl.load(p_tile + 1), tl.load(p_tile + 2), tl.load(p_tile + 3),
            tl.load(p_tile + 4))  # fmt: skip


@triton.jit
def tile_rows(start, stop, i_r, i_c, G: tl.constexpr, HEADS: tl.constexpr, BM: tl.constexpr):
    """Of each row [BM]: position in the tile, query (64 bits), head, and whether it is real.

    i_r is the group, i_c says which HEADS heads of it the program has.
    """
    o_m = tl.arange(0, BM)
    o_i = o_m // HEADS
    o_g = i_c * HEADS + o_m % HEADS
    return o_i, (start + o_i).to(tl.int64), i_r * G + o_g, (start + o_i < stop) & (o_g < G)


@triton.jit
def load_union(ids, masks, counts, i_tr, U):
    """The union of one tile and group: where its ids and its masks lie, and how many it has."""
    return ids + i_tr * U, masks + i_tr * U, tl.load(counts + i_tr)


@triton.jit
def inner_blocks(p_id, count, first_key, own, BK: tl.constexpr):
    """How many of a union's `count` blocks end before the tile's first own key.

    Only the other blocks need a token mask. They are the last of the union and at most three, for
    BK >= 16 and tiles of up to 31 queries.
    """
    o_l = count - 1 - tl.arange(0, 4)
    b_last = tl.load(p_id + o_l, mask=o_l >= 0, other=-1)
    return count - tl.sum((first_key + (b_last + 1) * BK - 1 > own).to(tl.int32))


@triton.jit
def load_block(p_id, p_mask, i_u):
    """Entry i_u of a union: the block's id and the bits of the positions that selected it."""
    return tl.load(p_id + i_u), tl.load(p_mask + i_u)


@triton.jit
def selects(b_bits, o_i):
    """Whether the positions o_i selected a block with these bits."""
    return ((b_bits >> o_i) & 1) != 0
