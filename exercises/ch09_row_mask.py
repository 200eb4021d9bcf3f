"""Chapter 9: a walk along the union with a planted bug. Mend it.

The tile has several queries, and each selected its own blocks of the union. Random numbers do not
show the bug. It shows when a block that a query did not select has a much larger score than its
own blocks. The kernel is that of examples/triton_steps.py.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def walk_kernel(q, k, v, out, ids, masks, counts, tokens, scale,
                U: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
                ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
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
        new_top = tl.maximum(top, tl.max(b_s, 1))  # TODO: of which rows?
        b_p = tl.where(chosen[:, None], tl.exp(b_s - new_top[:, None]), 0.0)
        decay = tl.exp(top - new_top)
        total = total * decay + tl.sum(b_p, 1)
        b_o = b_o * decay[:, None] + tl.dot(b_p, b_v, input_precision="ieee")
        top = new_top
    tl.store(out + p_row, b_o / total[:, None], mask=m_row)


def attend(q, k, v, ids, masks, counts, block, queries):
    """Launch one program for each tile of `queries` queries; arguments as in `launch` there."""
    tokens, heads, dim = q.shape
    out = torch.full_like(q, torch.nan)
    walk_kernel[(triton.cdiv(tokens, queries),)](
        q, k, v, out, ids, masks, counts, tokens, dim**-0.5, U=ids.shape[1], H=heads, D=dim,
        ROWS=queries * heads, BLOCK=block,
    )  # fmt: skip
    return out
