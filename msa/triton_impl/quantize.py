"""Index tensors in 8 bits: an option of the selection, faster and no longer the same function.

    stretch = 448 / max |x|
    y       = x * stretch, rounded to e4m3

The stretch is one positive factor for the whole tensor, so it leaves every order of scores as it is
and need not be undone. What the rounding costs is measured in docs/ladder.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor


@triton.jit
def stretch_kernel(x, y, largest, n, B: tl.constexpr):
    """B elements, contiguous on both sides."""
    o_x = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    stretch = 448.0 / tl.maximum(tl.load(largest).to(tl.float32), 1e-30)
    b_x = tl.load(x + o_x, mask=o_x < n, other=0.0).to(tl.float32) * stretch
    b_x = tl.minimum(tl.maximum(b_x, -448.0), 448.0)
    tl.store(y + o_x, b_x.to(y.dtype.element_ty), mask=o_x < n)


def to_fp8(x: Float[Tensor, "*shape"], index_dtype: str) -> Float[Tensor, "*shape"]:
    """The tensor in 8 bits, stretched to fill their range; it must be finite, on a GPU.

    Raises:
        ValueError: another index_dtype, or a tensor that is not on a GPU.
    """
    if index_dtype != "fp8_e4m3":
        raise ValueError(f"index_dtype must be None or 'fp8_e4m3', got {index_dtype!r}")
    if not x.is_cuda:
        raise ValueError(f"index_dtype='fp8_e4m3' wants tensors on a CUDA device, got {x.device}")
    x = x.contiguous()
    y = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    if x.numel():
        largest = torch.linalg.vector_norm(x, torch.inf)
        stretch_kernel[triton.cdiv(x.numel(), 4096),](x, y, largest, x.numel(), B=4096)
    return y
