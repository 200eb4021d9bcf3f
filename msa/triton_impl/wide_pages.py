"""Pages of 8 bits in 16 bits: once for a call, in place of once for each tile that reads them (R2).

    for each block b of a sequence with queries, each group r, if a query selected b:
        power, rest = split(factor[page of b, r])      # power * rest = factor
        wide[b, r]  = numbers[page of b, r] * power    # exact in 16 bits
        rest[b, r]  = rest

for keys and for values. The walks then read `wide` as pages of 16 bits with the factors `rest`.

A tile that reads a block of 8 bits has to convert every number of it, and many tiles read the same
block. So where queries are many (KEYS_PER_QUERY of `msa.kernel_choice`), it is faster to convert
each block once. This reads one byte and writes two for each number, at the speed of memory.

In bfloat16, `power` is the greatest power of two in the factor. Then `rest` is at least 1 and less
than 2, and it is 1 for the factors of a `PagePool`, which are powers of two. A number of e4m3 has
four significant bits, so its product with a power of two is exact in bfloat16, which has float32's
range. Powers are kept between 2^-117 and 2^126, so that no product is below the least normal number
of bfloat16, and `rest` lies outside of 1 to 2 for factors beyond these. float16 has a smaller range
than the factors. There `power` is 1, and `rest` is the whole factor.

What the fast form changes:
 1. The selection says which blocks are read. Where a block has few readers on average
    (MARKED_READERS of `msa.kernel_choice`), a first kernel marks the blocks that are selected, and
    the others are neither read nor written. Every mark is the same number, so it does not matter
    which query writes it last (R19).
 2. The blocks of a sequence become neighbours, so a table of the host replaces the page table.
    Sequences without queries have no blocks here.
 3. Each page and head is written to one run of memory, with zeros behind the last token of a
    sequence, so that no walk meets NaN there.

The memory is 2 * Hkv * (D + Dv) bytes for each key, at most WIDE_BYTES of `msa.kernel_choice`.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from msa.ir import Selection, Sequences
from msa.kernel_choice import marks
from msa.triton_impl.bits import power_of_two
from msa.triton_impl.launch import pad
from msa.triton_impl.paged_keys import Pages
from msa.triton_impl.places import device_table
from msa.triton_impl.step_sequences import StepSequences, to_device
from msa.triton_impl.tables import block_places, block_table, query_table
from msa.triton_impl.tile_verbs import along
from msa.triton_impl.tuning import EVERY_LAUNCH

EDGES = 1024  # of a program that marks
TOKENS = 64  # of a product, at most
VECTOR = 8  # neighbouring numbers of a thread: 16 bytes of 16 bits


@triton.jit
def mark_pages_kernel(ids, first_blocks, marks, n_edges, HKV: tl.constexpr, TOP_K: tl.constexpr,
                B: tl.constexpr):  # fmt: skip
    """Mark the blocks of B edges.

    Parameters:
        ids: [Tq, Hkv, k], int32; the selected blocks, -1 where there is none
        first_blocks: [Tq], int32; the number of the first block of each query's sequence
        marks: [blocks, Hkv], uint8; 1 is written for each block that is selected
        n_edges: int; Tq * Hkv * k
        HKV: groups
        TOP_K: k
        B: edges of one program
    """
    o_e = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    b_id = tl.load(ids + o_e, mask=o_e < n_edges, other=-1)
    m_e = b_id >= 0
    o_r = o_e // TOP_K % HKV
    b_first = tl.load(first_blocks + o_e // (TOP_K * HKV), mask=m_e, other=0)
    p_mark = marks + (b_first + b_id).to(tl.int64) * HKV + o_r
    tl.store(p_mark, tl.full([B], 1, tl.uint8), mask=m_e)


@triton.jit
def split_factor(factor, SPLIT: tl.constexpr):
    """A power of two and the rest of a factor; without SPLIT 1 and the factor.

    Both lie in float32's normal range, so their product is the factor exactly.
    """
    if SPLIT:
        exponent = factor.to(tl.int32, bitcast=True) >> 23
        exponent = tl.minimum(tl.maximum(exponent, 127 - 117), 127 + 126)
        return power_of_two(exponent), factor * power_of_two(254 - exponent)
    else:
        return 1.0, factor


@triton.jit
def widen_page(x, y, stride_t, tokens, power, DIM: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
               BN: tl.constexpr, VECTOR: tl.constexpr):  # fmt: skip
    """Write the tokens of a page and head [BK, DIM], times a power of two; zeros behind them."""
    o_n, o_d = tl.arange(0, BN), tl.max_contiguous(tl.arange(0, BD), VECTOR)
    m_d = (o_d < DIM)[None, :]
    for i_n in range(0, BK, BN):
        m_x = m_d & (i_n + o_n < tokens)[:, None]
        p_x = x + along(i_n + o_n, stride_t)[:, None] + o_d[None, :]
        b_y = tl.load(p_x, mask=m_x, other=0.0).to(tl.float32) * power
        p_y = y + (i_n + o_n)[:, None] * DIM + o_d[None, :]
        tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_d & (i_n + o_n < BK)[:, None])


@triton.jit
def widen_kernel(k, v, k_scales, v_scales, places, keys, table, marks, wide_k, wide_v, factors,
                 n_blocks, stride_kp, stride_kt, stride_kh, stride_vp, stride_vt, stride_vh,
                 stride_ksp, stride_ksh, stride_vsp, stride_vsh, stride_ts, stride_tb,
                 HKV: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BD: tl.constexpr,
                 BDV: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, VECTOR: tl.constexpr,
                 SPLIT: tl.constexpr, MARKED: tl.constexpr):  # fmt: skip
    """One block and group; the groups of a block follow one another, as in a page.

    Parameters:
        k: [pages, Bk, Hkv, D], e4m3
        v: [pages, Bk, Hkv, Dv], e4m3
        k_scales, v_scales: [pages, Hkv], float32; factors of the pages
        places: [2, blocks], int32; a `block_places`
        keys: [2, blocks], int32; a `block_table`
        table: [B, columns], int32 or int64; a sequence's pages in order
        marks: [blocks, Hkv], uint8; 1 for blocks to widen, read with MARKED only
        wide_k: [blocks, Hkv, Bk, D], 16-bit; written
        wide_v: [blocks, Hkv, Bk, Dv], as wide_k; written
        factors: [blocks, Hkv, 2], float32; the rest of the factors of keys, of values; written
        n_blocks: int; blocks of all sequences
        stride_kp, stride_kt, stride_kh: elements from one page, token, head of k to the next
        stride_vp, stride_vt, stride_vh: elements from one page, token, head of v to the next
        stride_ksp, stride_ksh: elements from one page, head of k_scales to the next
        stride_vsp, stride_vsh: elements from one page, head of v_scales to the next
        stride_ts, stride_tb: elements from one sequence, block of table to the next
        HKV: groups
        DIM, DIM_V: D, Dv
        BD, BDV: D, Dv rounded up to powers of two
        BK, BN: tokens of a block, tokens at a time
        VECTOR: neighbouring numbers of a thread, at most
        SPLIT: bool; multiply by a power of two
        MARKED: bool; only blocks with a mark
    """
    i_x = tl.program_id(0).to(tl.int64)
    i_b, i_r = i_x // HKV, i_x % HKV
    wanted = True
    if MARKED:
        wanted = tl.load(marks + i_x) != 0
    if wanted:
        i_s, i_n = tl.load(places + i_b), tl.load(places + n_blocks + i_b)
        page = tl.load(table + along(i_s, stride_ts) + along(i_n, stride_tb)).to(tl.int64)
        p_k, p_v = k_scales + along(page, stride_ksp), v_scales + along(page, stride_vsp)
        power_k, rest_k = split_factor(tl.load(p_k + along(i_r, stride_ksh)), SPLIT)
        power_v, rest_v = split_factor(tl.load(p_v + along(i_r, stride_vsh)), SPLIT)
        tokens = tl.load(keys + n_blocks + i_b) - tl.load(keys + i_b)
        tl.store(factors + 2 * i_x, rest_k)
        tl.store(factors + 2 * i_x + 1, rest_v)
        widen_page(k + along(page, stride_kp) + along(i_r, stride_kh), wide_k + i_x * BK * DIM,
                   stride_kt, tokens, power_k, DIM, BD, BK, BN, VECTOR)  # fmt: skip
        widen_page(v + along(page, stride_vp) + along(i_r, stride_vh), wide_v + i_x * BK * DIM_V,
                   stride_vt, tokens, power_v, DIM_V, BDV, BK, BN, VECTOR)  # fmt: skip


# -- host -----------------------------------------------------------------------------------------
def with_queries(sequences: Sequences) -> Sequences:
    """The same sequences; those without queries have no keys.

    >>> with_queries(Sequences((0, 2, 2, 3), (0, 5, 9, 16))).cu_seqlens_k
    (0, 5, 5, 12)
    """
    if isinstance(sequences, StepSequences):
        return sequences.table(step_with_queries)
    return Sequences(sequences.cu_seqlens_q, visible_borders(sequences))


def step_with_queries(sequences: StepSequences) -> StepSequences:
    """The same of a step, whose lengths the device knows."""
    borders = visible_borders(sequences)
    return StepSequences(sequences.cu_seqlens_q, borders, sequences.shortfall)


def visible_borders(sequences: Sequences) -> tuple[int, ...]:
    """Borders of the keys of sequences that have queries."""
    return kept_borders(sequences.cu_seqlens_q, sequences.cu_seqlens_k)


@lru_cache(maxsize=64)
def kept_borders(cu_q: tuple[int, ...], cu_k: tuple[int, ...]) -> tuple[int, ...]:
    """The same for borders that come again."""
    borders = [0]
    for first, stop, first_key, key_stop in zip(cu_q, cu_q[1:], cu_k, cu_k[1:]):
        borders.append(borders[-1] + (key_stop - first_key if stop > first else 0))
    return tuple(borders)


@device_table
def wide_table(
    sequences: Sequences, block_size: int, device: torch.device
) -> Int[Tensor, "B columns"]:
    """The number of each block of each sequence among all blocks: the page table of `widen_pages`.

    >>> wide_table(Sequences((0, 2, 3), (0, 5, 6)), 2, torch.device("cpu")).tolist()
    [[0, 1, 2], [3, 4, 5]]
    """
    first = np.array(sequences.cu_blocks(block_size)[:-1], np.int64)
    columns = np.arange(max(1, sequences.max_blocks(block_size)))
    return to_device(first[:, None] + columns, device)


def marked_blocks(
    selection: Selection, sequences: Sequences, blocks: int
) -> UInt8[Tensor, "blocks Hkv"]:
    """1 for each block of each group that a query selected; the blocks of `with_queries`."""
    ids = selection.indices
    marks = torch.zeros((blocks, ids.shape[1]), dtype=torch.uint8, device=ids.device)
    first_blocks = query_table(sequences, selection.block_size, ids.device)[2]
    mark_pages_kernel[triton.cdiv(ids.numel(), EDGES),](
        ids, first_blocks, marks, ids.numel(), HKV=ids.shape[1], TOP_K=ids.shape[2], B=EDGES,
        **EVERY_LAUNCH,
    )  # fmt: skip
    return marks


def widen_pages(
    k: Float[Tensor, "pages Bk Hkv D"], v: Float[Tensor, "pages Bk Hkv Dv"], pages: Pages,
    selection: Selection, dtype: torch.dtype,
) -> tuple[Float[Tensor, "blocks Bk Hkv D"], Float[Tensor, "blocks Bk Hkv Dv"], Pages]:  # fmt: skip
    """The selected blocks of pages of 8 bits, as pages of float16 or bfloat16.

    The scales of the new pages are a view of [blocks, Hkv, 2]. Blocks that no query selected are
    not written. `selection` is contiguous, and at least one query is there.
    """
    block_size, device = selection.block_size, k.device
    assert pages.k_scales is not None and pages.v_scales is not None
    visible, groups = with_queries(selection.sequences), k.shape[2]
    blocks = visible.cu_blocks(block_size)[-1]
    wide_k, wide_v = (
        torch.empty((blocks, groups, block_size, x.shape[-1]), dtype=dtype, device=device)
        for x in (k, v)
    )
    factors = torch.empty((blocks, groups, 2), dtype=torch.float32, device=device)
    marked = marks(selection)
    chosen = marked_blocks(selection, visible, blocks) if marked else factors  # else not read
    widen_kernel[blocks * groups,](
        k, v, pages.k_scales, pages.v_scales, block_places(visible, block_size, device),
        block_table(visible, block_size, device), pages.table, chosen, wide_k, wide_v, factors,
        blocks, *k.stride()[:3], *v.stride()[:3],
        *pages.k_scales.stride(), *pages.v_scales.stride(), *pages.table.stride(), HKV=groups,
        DIM=k.shape[-1], DIM_V=v.shape[-1], BD=pad(k.shape[-1]), BDV=pad(v.shape[-1]),
        BK=block_size, BN=min(TOKENS, pad(block_size)), VECTOR=VECTOR,
        SPLIT=dtype == torch.bfloat16, MARKED=marked, **EVERY_LAUNCH,
    )  # fmt: skip
    table = wide_table(visible, block_size, device)
    return (
        wide_k.transpose(1, 2), wide_v.transpose(1, 2),
        Pages(table, factors[..., 0], factors[..., 1], mild=dtype == torch.bfloat16),
    )  # fmt: skip
