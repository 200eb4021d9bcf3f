"""Index queries and keys in 8 bits with three launches; the numbers of `triton_impl.quantize`.

    largest[x] = max |x| over the finite x              # one launch for both tensors
    y          = x * stretch(largest[x]), rounded to e4m3   # one launch for both tensors

What the fast form changes: a short prompt is quantised in a few microseconds, most of which are the
starts of kernels. Here the programs of one launch work on either tensor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

BLOCK = 4096
"""Elements of one program."""


@triton.jit
def largest_kernel(q, k, largest, n_q, n_k, programs_q, B: tl.constexpr):
    """Raise largest[0] and largest[1], the bits of float32, to the greatest finite magnitudes."""
    program = tl.program_id(0).to(tl.int64)
    if program < programs_q:
        o_x = program * B + tl.arange(0, B)
        b_x = tl.load(q + o_x, mask=o_x < n_q, other=0.0).to(tl.float32)
    else:
        o_x = (program - programs_q) * B + tl.arange(0, B)
        b_x = tl.load(k + o_x, mask=o_x < n_k, other=0.0).to(tl.float32)
    b_x = tl.abs(b_x)
    b_x = tl.where(b_x < float("inf"), b_x, 0.0)  # NaN is not less than anything
    p_x = largest + (program >= programs_q).to(tl.int32)
    tl.atomic_max(p_x, tl.max(b_x).to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def stretch_block(x, y, n, program, b_bits, B: tl.constexpr):
    """B elements of one tensor, contiguous on both sides."""
    o_x = program * B + tl.arange(0, B)  # 448 = 1.75 * 2^8, and 1.75 has these bits behind:
    power = 8 + 127 - (b_bits >> 23) - ((b_bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    stretch = ((tl.minimum(power, 126) + 127) << 23).to(tl.float32, bitcast=True)
    b_x = tl.load(x + o_x, mask=o_x < n, other=0.0).to(tl.float32) * stretch
    b_x = tl.where(b_x > 448.0, 448.0, tl.where(b_x < -448.0, -448.0, b_x))  # NaN is neither
    tl.store(y + o_x, b_x.to(y.dtype.element_ty), mask=o_x < n)


@triton.jit
def stretch_kernel(q, k, y_q, y_k, largest, n_q, n_k, programs_q, B: tl.constexpr):
    """One block of either tensor."""
    program = tl.program_id(0).to(tl.int64)
    if program < programs_q:
        stretch_block(q, y_q, n_q, program, tl.load(largest), B)
    else:
        stretch_block(k, y_k, n_k, program - programs_q, tl.load(largest + 1), B)


def to_fp8_pair(
    q: Float[Tensor, "*shape_q"], k: Float[Tensor, "*shape_k"]
) -> tuple[Float[Tensor, "*shape_q"], Float[Tensor, "*shape_k"]]:
    """Both tensors in e4m3, each stretched to fill the range; on a GPU."""
    q, k = q.contiguous(), k.contiguous()
    y_q, y_k = (torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device) for x in (q, k))
    programs_q = triton.cdiv(q.numel(), BLOCK)
    grid = (programs_q + triton.cdiv(k.numel(), BLOCK),)
    if grid[0]:
        largest = torch.zeros(2, dtype=torch.int32, device=q.device)
        largest_kernel[grid](q, k, largest, q.numel(), k.numel(), programs_q, B=BLOCK)
        stretch_kernel[grid](q, k, y_q, y_k, largest, q.numel(), k.numel(), programs_q, B=BLOCK)
    return y_q, y_k
