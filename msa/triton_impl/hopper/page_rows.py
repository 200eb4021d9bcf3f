"""Blocks of a paged cache for the copy engine: rows and columns of a `page_matrix` (R2).

The functions of `paged_keys.py` for producers in Gluon, which copy whole blocks. A page is loaded
one block ahead, and the block's id two blocks ahead, so that no copy waits for the table.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def load_page(p_table, i_b, stride_tb):
    """The page of block i_b, from the row of its sequence; 0 for block -1."""
    return gl.load(p_table + i_b.to(gl.int64) * stride_tb, mask=i_b >= 0, other=0).to(gl.int64)


@gluon.jit
def head_place(i_r, stride_h, stride_t):
    """Row and column at which head i_r of the first page begins."""
    offset = i_r.to(gl.int64) * stride_h
    return (offset // stride_t).to(gl.int32), (offset % stride_t).to(gl.int32)


@gluon.jit
def page_row(page, stride_p, stride_t):
    """The row at which a page begins."""
    return (page * (stride_p // stride_t)).to(gl.int32)
