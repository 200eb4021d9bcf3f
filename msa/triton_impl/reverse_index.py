"""Lowering, first arrow: from the blocks of each query to the queries of each block (R13).

    for each query t, ascending, group r and slot s:
        append (t, s) to row (r, indices[t, r, s])

What the fast form changes:
 1. A stable counting sort in place of appending. The place of an edge = the start of its row + the
    number of queries of earlier tiles that read the row + that of earlier queries of its own tile.
 2. A tile is 32 queries, so one word says which of them read a row: bit i for query 32 * tile + i.
    The words are filled by integer atomic OR, which gives the same word in any order (R19).
 3. The last two summands are then bit counts: of the words of earlier tiles, summed up once along
    each column, and of the bits below the edge's own bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor

from msa.ir import ReverseIndex, Selection, Sequences
from msa.triton_impl.bits import count_bits
from msa.triton_impl.launch import contiguous, pad, require_top_k
from msa.triton_impl.places import on_its_device
from msa.triton_impl.tables import query_table
from msa.triton_impl.tuning import EVERY_LAUNCH

TILE = 32  # queries per word


def mark_bytes(sequences: Sequences, block_size: int, groups: int) -> int:
    """Bytes of marks for one more query: for each row a bit, and a 32nd of an int32 prefix sum.

    >>> mark_bytes(Sequences.one(2048, 2048), 128, 4)
    16
    """
    return groups * sequences.cu_blocks(block_size)[-1] * 2 * 4 // TILE


@triton.jit
def mark_kernel(indices, first_block, words, n_q, n_blocks, n_rows, HKV: tl.constexpr,
                TOP_K: tl.constexpr, P: tl.constexpr, R: tl.constexpr):  # fmt: skip
    """Set the bit of each edge; R (query, group) pairs.

    Parameters:
        indices: [Tq, Hkv, k], int32; the selection
        first_block: [Tq], int32; number of the first block of each query's sequence
        words: [tiles, rows], int32; bit i: query i of the tile reads the row, set
        n_q, n_blocks: int; Tq, blocks of all sequences
        n_rows: int; rows of the reverse index: Hkv * n_blocks
        HKV: groups
        TOP_K, P: k, and rounded up to a power of two
        R: (query, group) pairs of one program
    """
    o_r = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]  # [R, 1]
    o_t, o_s = o_r // HKV, tl.arange(0, P)[None, :]
    m_x = (o_t < n_q) & (o_s < TOP_K)
    b_id = tl.load(indices + o_r * TOP_K + o_s, mask=m_x, other=-1)
    b_base = tl.load(first_block + o_t, mask=o_t < n_q, other=0)
    o_row = (o_r % HKV) * n_blocks + b_base + b_id
    p_word = words + (o_t // 32) * n_rows + o_row
    b_bit = tl.full([R, P], 1, tl.uint32) << (o_t % 32).to(tl.uint32)
    tl.atomic_or(p_word, b_bit, mask=b_id >= 0, sem="relaxed")


@triton.jit
def prefix_kernel(words, before, lengths, n_tiles, n_rows, BT: tl.constexpr, BR: tl.constexpr):
    """Along each column of words: the number of set bits in the tiles before, and in all.

    Parameters:
        words: [tiles, rows], int32; bit i: query i of the tile reads the row
        before: [tiles, rows], int32; set bits of the tiles before, written
        lengths: [rows], int32; set bits of all tiles, written
        n_tiles, n_rows: int; tiles of queries, rows of the reverse index
        BT, BR: tiles of one step, rows of one program
    """
    o_row = tl.program_id(0) * BR + tl.arange(0, BR)
    m_row = o_row < n_rows
    b_sum = tl.zeros([BR], tl.int32)
    for first in range(0, n_tiles, BT):
        o_t = first + tl.arange(0, BT)[:, None]
        p_x = o_t.to(tl.int64) * n_rows + o_row[None, :]
        m_x = (o_t < n_tiles) & m_row[None, :]
        b_n = count_bits(tl.load(words + p_x, mask=m_x, other=0).to(tl.uint32))  # [BT, BR]
        tl.store(before + p_x, b_sum[None, :] + tl.cumsum(b_n, 0) - b_n, mask=m_x)
        b_sum += tl.sum(b_n, 0)
    tl.store(lengths + o_row, b_sum, mask=m_row)


@triton.jit
def fill_kernel(indices, first_block, words, before, offsets, query_ids, slots, counts, n_q,
                n_blocks, n_rows, HKV: tl.constexpr, TOP_K: tl.constexpr, P: tl.constexpr,
                R: tl.constexpr):  # fmt: skip
    """Write each edge to its place; R (query, group) pairs.

    Parameters:
        indices: [Tq, Hkv, k], int32; the selection
        first_block: [Tq], int32; number of the first block of each query's sequence
        words: [tiles, rows], int32; bit i: query i of the tile reads the row
        before: [tiles, rows], int32; set bits of the tiles before
        offsets: [rows + 1], int64; where the edges of a row start
        query_ids: [edges], int32; the query of each edge, written
        slots: [edges], int32; the place of the block in that query's selection, written
        counts: [Tq, Hkv], int32; blocks of each selection, written
        n_q, n_blocks: int; Tq, blocks of all sequences
        n_rows: int; rows of the reverse index: Hkv * n_blocks
        HKV: groups
        TOP_K, P: k, and rounded up to a power of two
        R: (query, group) pairs of one program
    """
    o_r = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)[:, None]
    o_t, o_s = o_r // HKV, tl.arange(0, P)[None, :]
    m_r = o_t < n_q
    b_id = tl.load(indices + o_r * TOP_K + o_s, mask=m_r & (o_s < TOP_K), other=-1)
    m_x = b_id >= 0
    b_base = tl.load(first_block + o_t, mask=o_t < n_q, other=0)
    o_row = (o_r % HKV) * n_blocks + b_base + b_id
    p_word = (o_t // 32) * n_rows + o_row
    b_below = (tl.full([R, P], 1, tl.uint32) << (o_t % 32).to(tl.uint32)) - 1
    b_word = tl.load(words + p_word, mask=m_x, other=0).to(tl.uint32)
    b_rank = tl.load(before + p_word, mask=m_x, other=0) + count_bits(b_word & b_below)
    p_edge = tl.load(offsets + o_row, mask=m_x, other=0) + b_rank
    tl.store(query_ids + p_edge, o_t.to(tl.int32) + tl.zeros_like(b_id), mask=m_x)
    tl.store(slots + p_edge, o_s + tl.zeros_like(b_id), mask=m_x)
    tl.store(counts + o_r, tl.sum(m_x.to(tl.int32), 1)[:, None], mask=m_r)


def reverse_edges(selection: Selection) -> ReverseIndex:
    """`reverse_selection` without waiting for the device.

    The arrays of edges are Tq * Hkv * k long, and hold edges up to row_offsets[-1] only.
    """
    indices = selection.indices
    n_q, groups, top_k = indices.shape
    sequences, device = selection.sequences, indices.device
    n_blocks = sequences.cu_blocks(selection.block_size)[-1]
    n_rows, n_tiles = groups * n_blocks, -(-n_q // TILE)
    edges = n_q * groups * top_k
    words = torch.zeros((n_tiles, n_rows), dtype=torch.int32, device=device)
    before = torch.empty_like(words)
    offsets = torch.zeros(n_rows + 1, dtype=torch.int64, device=device)
    query_ids = torch.empty(edges, dtype=torch.int32, device=device)
    slots = torch.empty(edges, dtype=torch.int32, device=device)
    counts = torch.zeros((n_q, groups), dtype=torch.int32, device=device)
    if n_q:
        first_block = query_table(sequences, selection.block_size, device)[2]
        width = pad(top_k, 2)
        some = max(1, 512 // width)
        grid = (triton.cdiv(n_q * groups, some),)
        shape = {"HKV": groups, "TOP_K": top_k, "P": width, "R": some} | EVERY_LAUNCH
        mark_kernel[grid](indices, first_block, words, n_q, n_blocks, n_rows, **shape)
        lengths = torch.empty(n_rows, dtype=torch.int32, device=device)
        prefix_kernel[triton.cdiv(n_rows, 32),](
            words, before, lengths, n_tiles, n_rows, BT=pad(min(n_tiles, 64), 2), BR=32,
            **EVERY_LAUNCH,
        )  # fmt: skip
        torch.cumsum(lengths, 0, out=offsets[1:])
        fill_kernel[grid](
            indices, first_block, words, before, offsets, query_ids, slots, counts, n_q, n_blocks,
            n_rows, **shape,
        )  # fmt: skip
    return ReverseIndex(offsets, query_ids, slots, counts, sequences, selection.block_size, top_k)


@on_its_device
def reverse_selection(selection: Selection) -> ReverseIndex:
    """The same edges sorted by group and block, queries ascending within each (R13).

    Beside its result it needs `mark_bytes` of memory for each query, which grow with the number of
    blocks: for long sequences take queries in super-tiles, as attention does.
    """
    require_top_k(selection.top_k)
    index = reverse_edges(contiguous(selection))
    edges: Int[Tensor, ""] = index.row_offsets[-1]
    n = int(edges)
    return ReverseIndex(
        index.row_offsets, index.query_ids[:n], index.slots[:n], index.counts, index.sequences,
        index.block_size, index.top_k,
    )  # fmt: skip
