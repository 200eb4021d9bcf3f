"""The index queries of a sequence as the few columns of a product, in three parts of 8 bits (R4).

    x = a row of queries times a power of two
    high = e4m3(x), middle = e4m3(x - high), low = e4m3(x - high - middle)

The portable kernel forms the same parts (`three_parts`). Here they lie below one another in one
tile of shared memory, for a single product with the keys.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from msa.triton_impl.bits import e4m3_stretch, finite_size, power_of_two
from msa.triton_impl.tile_verbs import along


@gluon.jit
def load_queries(q, i_s, q_tile, strides, N: gl.constexpr, HKV: gl.constexpr, PARTS: gl.constexpr,
                 L: gl.constexpr):  # fmt: skip
    """Put the queries of a sequence into q_tile; return what undoes their stretch [rows].

    With PARTS, q_tile has the high, the middle and the low part of every row, then zeros. The zeros
    are written as bits. Else the compiler converts a constant to e4m3 and uses it twice, of which
    ptxas of CUDA 12.8 and 12.9 makes a wrong program: one use reads a register that nothing wrote.
    """
    ROWS: gl.constexpr = q_tile.shape[0]
    DIM: gl.constexpr = q_tile.shape[1]
    EACH: gl.constexpr = ROWS // PARTS
    o_x = gl.arange(0, ROWS, layout=gl.SliceLayout(1, L))
    o_m = o_x % EACH
    o_d = gl.arange(0, DIM, layout=gl.SliceLayout(0, L))
    stride_qb, stride_qn, stride_qr = strides
    p_q = q + along(i_s, stride_qb) + along(o_m // HKV, stride_qn) + along(o_m % HKV, stride_qr)
    m_q = (o_m < N * HKV)[:, None]
    b_q = gl.load(p_q[:, None] + o_d[None, :], mask=m_q, other=0.0)
    if PARTS > 1:
        b_x = b_q.to(gl.float32)
        largest = gl.max(finite_size(b_x), 1)
        stretch = e4m3_stretch(largest.to(gl.int32, bitcast=True))
        b_x = b_x * power_of_two(stretch)[:, None]
        high = b_x.to(gl.float8e4nv).to(gl.float32)
        b_x = b_x - high
        middle = b_x.to(gl.float8e4nv).to(gl.float32)
        part = (o_x // EACH)[:, None]
        b_x = gl.where(part == 0, high, gl.where(part == 1, middle, b_x - middle))
        b_bits = b_x.to(gl.float8e4nv).to(gl.int8, bitcast=True)
        b_bits = gl.where(part == 3, 0, b_bits)  # not as float32, see above
        q_tile.store(b_bits.to(gl.float8e4nv, bitcast=True))
        shrink = power_of_two(254 - stretch)
    else:
        q_tile.store(b_q)
        shrink = gl.full([ROWS], 1.0, gl.float32, layout=gl.SliceLayout(1, L))
    fence_async_shared()
    return shrink
