"""Index tensors in 8 bits: an option of the selection, faster and no longer the same function.

    largest = max |x| over the finite x
    stretch = the greatest power of two, at most 2^126, with largest * stretch <= 448
    y       = x * stretch, rounded to the nearest e4m3, ties to even; infinities to -448 and 448

The stretch is one positive factor for the whole tensor, so it leaves every order of scores as it is
and need not be undone. As a power of two it rounds nothing by itself: e4m3 has four significant
bits at any magnitude, so a smaller maximum costs no precision above the least normal number, and
integers up to 16 stay exact. What the rounding costs is measured in docs/ladder.md.

Nothing here waits for the device, so no tensor is refused for what it holds (R20 asks that of
shapes and kinds); instead every value has a meaning, and one that is not finite harms its own token
only. NaN stays NaN, and its score counts as -inf (R4). An infinity, which e4m3 does not have,
becomes its greatest number. Neither has a say in the stretch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

BLOCK = 4096  # elements of one program


@triton.jit
def largest_kernel(x, largest, n, B: tl.constexpr):
    """Raise `largest`, the bits of a float32, to the greatest finite magnitude.

    Bits of positive floats are in the order of their values, and the maximum of integers is the
    same in any order (R19).
    """
    o_x = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    b_x = tl.abs(tl.load(x + o_x, mask=o_x < n, other=0.0).to(tl.float32))
    b_x = tl.where(b_x < float("inf"), b_x, 0.0)  # NaN is not less than anything
    tl.atomic_max(largest, tl.max(b_x).to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def stretch_kernel(x, y, largest, n, B: tl.constexpr):
    """B elements, contiguous on both sides."""
    o_x = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    b_bits = tl.load(largest)  # 448 = 1.75 * 2^8, and 1.75 has these bits behind the exponent:
    power = 8 + 127 - (b_bits >> 23) - ((b_bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    stretch = ((tl.minimum(power, 126) + 127) << 23).to(tl.float32, bitcast=True)
    b_x = tl.load(x + o_x, mask=o_x < n, other=0.0).to(tl.float32) * stretch
    b_x = tl.where(b_x > 448.0, 448.0, tl.where(b_x < -448.0, -448.0, b_x))  # NaN is neither
    tl.store(y + o_x, b_x.to(y.dtype.element_ty), mask=o_x < n)


def to_fp8(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The tensor in e4m3, stretched to fill its range (see above); on a GPU."""
    x = x.contiguous()
    y = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    if x.numel():
        largest = torch.zeros(1, dtype=torch.int32, device=x.device)
        grid = (triton.cdiv(x.numel(), BLOCK),)
        largest_kernel[grid](x, largest, x.numel(), B=BLOCK)
        stretch_kernel[grid](x, y, largest, x.numel(), B=BLOCK)
    return y
