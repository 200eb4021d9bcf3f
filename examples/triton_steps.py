"""From a dense kernel to the walk along unions, by adding one thing at a time (chapter 8).

All kernels here compute one group: q and out [T, H, D], k and v [T, D], contiguous. They are
written to be read. The kernels that are fast are in `msa/triton_impl/union_walk.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def dense_kernel(q, k, v, out, tokens, scale, H: tl.constexpr, D: tl.constexpr,
                 ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Each row reads all keys up to its own."""
    i_tile = tl.program_id(0)
    o_r = i_tile * ROWS + tl.arange(0, ROWS)
    o_d, o_n = tl.arange(0, D), tl.arange(0, BLOCK)
    query = o_r // H
    p_row = o_r[:, None] * D + o_d[None, :]
    m_row = (query < tokens)[:, None]
    b_q = tl.load(q + p_row, mask=m_row, other=0.0)
    top = tl.full([ROWS], -1e30, tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    b_o = tl.zeros([ROWS, D], tl.float32)
    stop = tl.minimum(tokens, (i_tile + 1) * ROWS // H)
    for first in range(0, stop, BLOCK):
        token = first + o_n
        p_token = token[:, None] * D + o_d[None, :]
        m_token = (token < tokens)[:, None]
        b_k = tl.load(k + p_token, mask=m_token, other=0.0)
        b_v = tl.load(v + p_token, mask=m_token, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
        b_s = tl.where(token[None, :] <= query[:, None], b_s, -float("inf"))
        new_top = tl.maximum(top, tl.max(b_s, 1))
        b_p = tl.exp(b_s - new_top[:, None])
        decay = tl.exp(top - new_top)
        total = total * decay + tl.sum(b_p, 1)
        b_o = b_o * decay[:, None] + tl.dot(b_p, b_v, input_precision="ieee")
        top = new_top
    tl.store(out + p_row, b_o / total[:, None], mask=m_row)


@triton.jit
def listed_kernel(q, k, v, out, ids, counts, tokens, scale, U: tl.constexpr, H: tl.constexpr,
                  D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The rows of a tile read the blocks of one list."""
    i_tile = tl.program_id(0)
    o_r = i_tile * ROWS + tl.arange(0, ROWS)
    o_d, o_n = tl.arange(0, D), tl.arange(0, BLOCK)
    query = o_r // H
    p_row = o_r[:, None] * D + o_d[None, :]
    m_row = (query < tokens)[:, None]
    b_q = tl.load(q + p_row, mask=m_row, other=0.0)
    top = tl.full([ROWS], -1e30, tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    b_o = tl.zeros([ROWS, D], tl.float32)
    for j in range(tl.load(counts + i_tile)):
        token = tl.load(ids + i_tile * U + j) * BLOCK + o_n
        p_token = token[:, None] * D + o_d[None, :]
        m_token = (token < tokens)[:, None]
        b_k = tl.load(k + p_token, mask=m_token, other=0.0)
        b_v = tl.load(v + p_token, mask=m_token, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
        b_s = tl.where(token[None, :] <= query[:, None], b_s, -float("inf"))
        new_top = tl.maximum(top, tl.max(b_s, 1))
        b_p = tl.exp(b_s - new_top[:, None])
        decay = tl.exp(top - new_top)
        total = total * decay + tl.sum(b_p, 1)
        b_o = b_o * decay[:, None] + tl.dot(b_p, b_v, input_precision="ieee")
        top = new_top
    tl.store(out + p_row, b_o / total[:, None], mask=m_row)


@triton.jit
def union_kernel(q, k, v, out, ids, masks, counts, tokens, scale, U: tl.constexpr, H: tl.constexpr,
                 D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The list is the union of the queries' blocks; a bit for each query says who selected it."""
    i_tile = tl.program_id(0)
    o_r = i_tile * ROWS + tl.arange(0, ROWS)
    o_d, o_n = tl.arange(0, D), tl.arange(0, BLOCK)
    query = o_r // H
    p_row = o_r[:, None] * D + o_d[None, :]
    m_row = (query < tokens)[:, None]
    b_q = tl.load(q + p_row, mask=m_row, other=0.0)
    top = tl.full([ROWS], -1e30, tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    b_o = tl.zeros([ROWS, D], tl.float32)
    for j in range(tl.load(counts + i_tile)):
        bits = tl.load(masks + i_tile * U + j)
        chosen = (bits >> (query - i_tile * (ROWS // H))) & 1 == 1
        token = tl.load(ids + i_tile * U + j) * BLOCK + o_n
        p_token = token[:, None] * D + o_d[None, :]
        m_token = (token < tokens)[:, None]
        b_k = tl.load(k + p_token, mask=m_token, other=0.0)
        b_v = tl.load(v + p_token, mask=m_token, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
        b_s = tl.where((token[None, :] <= query[:, None]) & chosen[:, None], b_s, -float("inf"))
        new_top = tl.maximum(top, tl.max(b_s, 1))
        b_p = tl.exp(b_s - new_top[:, None])
        decay = tl.exp(top - new_top)
        total = total * decay + tl.sum(b_p, 1)
        b_o = b_o * decay[:, None] + tl.dot(b_p, b_v, input_precision="ieee")
        top = new_top
    tl.store(out + p_row, b_o / total[:, None], mask=m_row)


@triton.jit
def row_kernel(q, k, v, out, ids, masks, counts, tokens, scale, U: tl.constexpr, H: tl.constexpr,
               D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """A row is masked once, by its maximum, and not score by score."""
    i_tile = tl.program_id(0)
    o_r = i_tile * ROWS + tl.arange(0, ROWS)
    o_d, o_n = tl.arange(0, D), tl.arange(0, BLOCK)
    query = o_r // H
    p_row = o_r[:, None] * D + o_d[None, :]
    m_row = (query < tokens)[:, None]
    b_q = tl.load(q + p_row, mask=m_row, other=0.0)
    top = tl.full([ROWS], -1e30, tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    b_o = tl.zeros([ROWS, D], tl.float32)
    for j in range(tl.load(counts + i_tile)):
        bits = tl.load(masks + i_tile * U + j)
        chosen = (bits >> (query - i_tile * (ROWS // H))) & 1 == 1
        token = tl.load(ids + i_tile * U + j) * BLOCK + o_n
        p_token = token[:, None] * D + o_d[None, :]
        m_token = (token < tokens)[:, None]
        b_k = tl.load(k + p_token, mask=m_token, other=0.0)
        b_v = tl.load(v + p_token, mask=m_token, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
        b_s = tl.where(token[None, :] <= query[:, None], b_s, -float("inf"))
        new_top = tl.where(chosen, tl.maximum(top, tl.max(b_s, 1)), top)
        b_p = tl.exp(b_s - tl.where(chosen, new_top, float("inf"))[:, None])
        decay = tl.exp(top - new_top)
        total = total * decay + tl.sum(b_p, 1)
        b_o = b_o * decay[:, None] + tl.dot(b_p, b_v, input_precision="ieee")
        top = new_top
    tl.store(out + p_row, b_o / total[:, None], mask=m_row)


STEPS = (dense_kernel, listed_kernel, union_kernel, row_kernel)
"""The kernels in the order of the chapter."""


def launch(kernel: Any, q: Tensor, k: Tensor, v: Tensor, *lists: Tensor, block: int = 16,
           queries: int = 4) -> Tensor:  # fmt: skip
    """Run one of the kernels; `lists` are ids, masks and counts, as far as the kernel takes them.

    Args:
        kernel: one of STEPS.
        q: [T, H, D]; ROWS = queries * H must be at least 16, for tl.dot.
        k: [T, D].
        v: [T, D].
        lists: ids [tiles, U], masks [tiles, U], counts [tiles]; contiguous.
        block: tokens of a block.
        queries: queries of a tile.
    """
    tokens, heads, dim = q.shape
    out = torch.full_like(q, torch.nan)
    sizes = {"U": lists[0].shape[1]} if lists else {}
    kernel[(triton.cdiv(tokens, queries),)](
        q, k, v, out, *lists, tokens, dim**-0.5, **sizes, H=heads, D=dim, ROWS=queries * heads,
        BLOCK=block,
    )  # fmt: skip
    return out
