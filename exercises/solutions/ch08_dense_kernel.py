"""Chapter 8: dense causal attention as one kernel.

A program computes one tile: the heads of a few neighbouring queries. q and out are [T, H, D] and
contiguous, so row r of a tile is query r // H and head r % H. k and v are [T, D]: one group.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def dense_kernel(q, k, v, out, tokens, scale, H: tl.constexpr, D: tl.constexpr,
                 ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Rows [ROWS] of one tile against all keys, BLOCK at a time."""
    i_tile = tl.program_id(0)
    o_r = i_tile * ROWS + tl.arange(0, ROWS)  # numbers of the rows
    o_d, o_n = tl.arange(0, D), tl.arange(0, BLOCK)
    query = o_r // H
    p_row = o_r[:, None] * D + o_d[None, :]  # [ROWS, D] places in q and out
    m_row = (query < tokens)[:, None]
    b_q = tl.load(q + p_row, mask=m_row, other=0.0)  # [ROWS, D]
    top = tl.full([ROWS], -1e30, tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    b_o = tl.zeros([ROWS, D], tl.float32)
    stop = tl.minimum(tokens, (i_tile + 1) * ROWS // H)  # behind the last query of the tile
    for first in range(0, stop, BLOCK):
        token = first + o_n
        p_token = token[:, None] * D + o_d[None, :]  # [BLOCK, D] places in k and v
        m_token = (token < tokens)[:, None]
        b_k = tl.load(k + p_token, mask=m_token, other=0.0)
        b_v = tl.load(v + p_token, mask=m_token, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale  # [ROWS, BLOCK]
        b_s = tl.where(token[None, :] <= query[:, None], b_s, -float("inf"))
        new_top = tl.maximum(top, tl.max(b_s, 1))
        b_p = tl.exp(b_s - new_top[:, None])
        decay = tl.exp(top - new_top)
        total = total * decay + tl.sum(b_p, 1)
        b_o = b_o * decay[:, None] + tl.dot(b_p, b_v, input_precision="ieee")
        top = new_top
    tl.store(out + p_row, b_o / total[:, None], mask=m_row)


def attend(q, k, v, rows=16, block=16):
    """Launch one program for each tile of `rows` rows."""
    tokens, heads, dim = q.shape
    out = torch.full_like(q, torch.nan)
    grid = (triton.cdiv(tokens * heads, rows),)
    dense_kernel[grid](q, k, v, out, tokens, dim**-0.5, H=heads, D=dim, ROWS=rows, BLOCK=block)
    return out
