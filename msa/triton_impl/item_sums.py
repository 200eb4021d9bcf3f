"""Sums over the parts that work items and slots wrote, each in one fixed order (R19).

    items   out[token, head] += sum over the items of the token's block of parts[item, token]
    slots   out[query, group] = sum over the query's slots s of parts[query, group, s]

What the fast form changes: the time is that of reading memory, so every part is read once, and each
program sums up one tile of a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from msa.ir import Schedule, Sequences
from msa.triton_impl.launch import pad
from msa.triton_impl.tables import block_table
from msa.triton_impl.tile_verbs import along


@triton.jit
def sum_items_kernel(parts, item_starts, item_stops, first_keys, key_stops, out, scale, n_blocks,
                     stride_t, stride_h, SUM: tl.constexpr, ADD: tl.constexpr, DIM: tl.constexpr,
                     BD: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    """BN tokens of one block and one head of out; each head is the sum of SUM groups.

    Parameters:
        parts: [items, Bk, D], float32
        item_starts, item_stops: [rows], int64; the items of a row of the reverse index
        first_keys, key_stops: [blocks], int32; a `block_table`
        out: [Tk, H, D], 16-bit or float32; written, or added to with ADD
        scale: float; factor of the sums
        n_blocks: int; blocks of all sequences
        stride_t, stride_h: elements from one token of out to the next, from one head
        SUM: groups of the schedule that one head of out sums up
        ADD: bool; add to out instead of writing it
        DIM, BD: D, and rounded up to a power of two
        BK, BN: keys of a block, keys of one program
    """
    i_b, i_h, i_n = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BN
    o_d, o_n = tl.arange(0, BD), i_n + tl.arange(0, BN)
    m_d = (o_d < DIM)[None, :]
    b_sum = tl.zeros([BN, BD], tl.float32)
    for i_g in range(0, SUM):
        row = (i_h * SUM + i_g) * n_blocks + i_b
        for i_item in range(tl.load(item_starts + row), tl.load(item_stops + row)):
            p_x = parts + (i_item * BK + o_n)[:, None] * DIM + o_d[None, :]
            b_sum += tl.load(p_x, mask=m_d, other=0.0)
    o_t = tl.load(first_keys + i_b) + o_n
    m_x = (o_t < tl.load(key_stops + i_b))[:, None] & m_d
    p_out = out + along(o_t, stride_t)[:, None] + along(i_h, stride_h) + o_d[None, :]
    b_sum = b_sum * scale
    if ADD:
        b_sum += tl.load(p_out, mask=m_x, other=0.0)
    tl.store(p_out, b_sum.to(out.dtype.element_ty), mask=m_x)


def sum_items(
    parts: Float[Tensor, "items Bk D"], schedule: Schedule, out: Float[Tensor, "Tk H D"],
    scale: float = 1.0, add: bool = False,
) -> None:  # fmt: skip
    """Write, or add, scale * the sum of each block's items to its tokens; H divides the groups."""
    index = schedule.reverse_index
    lengths = index.row_offsets.diff()
    items = (lengths + (schedule.chunk_size - 1)) // schedule.chunk_size
    stops = torch.cumsum(items, 0)
    sum_parts(parts, stops - items, stops, index.sequences, index.block_size, out, scale, add)


def sum_parts(
    parts: Float[Tensor, "items Bk D"], item_starts: Int[Tensor, " rows"],
    item_stops: Int[Tensor, " rows"], sequences: Sequences, block_size: int,
    out: Float[Tensor, "Tk H D"], scale: float = 1.0, add: bool = False,
) -> None:  # fmt: skip
    """The same, for rows of a reverse index with the items item_starts ... item_stops."""
    blocks = sequences.cu_blocks(block_size)[-1]
    heads, dim = out.shape[1:]
    if not blocks:
        return
    some = min(block_size, max(1, 4096 // pad(dim)))
    sum_items_kernel[blocks, heads, block_size // some](
        parts, item_starts, item_stops, *block_table(sequences, block_size, out.device), out,
        scale, blocks, *out.stride()[:2], SUM=len(item_starts) // (blocks * heads), ADD=add,
        DIM=dim, BD=pad(dim), BK=block_size, BN=some,
    )  # fmt: skip


@triton.jit
def sum_slots_kernel(parts, counts, out, scale, PIECES: tl.constexpr, TOP_K: tl.constexpr,
                     DIM: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """The slots of one (query, group) pair, PIECES parts in each.

    Parameters:
        parts: [Tq, Hkv, k, PIECES, D], float32
        counts: [Tq, Hkv], int32; slots in use
        out: [Tq, Hkv, D], float32; written
        scale: float; factor of the sums
        PIECES: parts of a slot
        TOP_K: k
        DIM, BD: D, and rounded up to a power of two
    """
    i_x = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD)
    b_sum = tl.zeros([BD], tl.float32)
    for i_s in range(0, tl.load(counts + i_x) * PIECES):
        p_x = parts + (i_x * TOP_K * PIECES + i_s) * DIM + o_d
        b_sum += tl.load(p_x, mask=o_d < DIM, other=0.0)
    tl.store(out + i_x * DIM + o_d, b_sum * scale, mask=o_d < DIM)


def sum_slots(
    parts: Float[Tensor, "Tq Hkv k pieces D"], counts: Int[Tensor, "Tq Hkv"],
    out: Float[Tensor, "Tq Hkv D"], scale: float = 1.0,
) -> None:  # fmt: skip
    """Write scale * the sum of the first `counts` slots; out is contiguous."""
    *_, top_k, pieces, dim = parts.shape
    if counts.numel():
        sum_slots_kernel[counts.numel(),](
            parts, counts, out, scale, PIECES=pieces, TOP_K=top_k, DIM=dim, BD=pad(dim), num_warps=1
        )
