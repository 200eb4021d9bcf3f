"""Index tensors in 8 bits: an option of the selection, which is faster and rounds its inputs.

    largest = max |x| over the finite x
    stretch = the greatest power of two, at most 2^126, with largest * stretch <= 448
    y       = x * stretch, rounded to the nearest e4m3, ties to even; infinities to -448 and 448

The stretch is one positive factor for the whole tensor. It does not change which of two scores is
higher, so it need not be undone. As a power of two it rounds nothing by itself: e4m3 has four
significant bits at any magnitude, so a smaller maximum costs no precision above the least normal
number, and integers up to 16 stay exact. docs/ladder.md has the measured cost of the rounding.

Nothing here waits for the device, so no tensor is refused for its values (R20 asks for checks of
shapes and dtypes). Every value is defined instead, and a value that is not finite affects its own
token only: NaN stays NaN, and its score counts as -inf (R4). An infinity, which e4m3 does not have,
becomes the greatest e4m3 number. Neither changes the stretch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from msa.triton_impl.bits import clamp_e4m3, e4m3_stretch, finite_size, power_of_two

BLOCK = 4096  # elements of one program


@triton.jit
def largest_kernel(x, largest, n, B: tl.constexpr):
    """Raise `largest` to the greatest finite magnitude of B elements.

    As integers, the bits of positive floats are in the order of the floats. The maximum of integers
    is the same in whatever order it is taken (R19).

    Parameters:
        x: [n], 16-bit or float32
        largest: [1], int32; the bits of a float32, raised
        n: int; elements
        B: elements of one program
    """
    o_x = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    b_x = finite_size(tl.load(x + o_x, mask=o_x < n, other=0.0).to(tl.float32))
    tl.atomic_max(largest, tl.max(b_x).to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def stretch_kernel(x, y, largest, n, B: tl.constexpr):
    """Stretch and round B elements.

    Parameters:
        x: [n], 16-bit or float32
        y: [n], e4m3; written
        largest: [1], int32; the bits of the greatest finite magnitude, a float32
        n: int; elements
        B: elements of one program
    """
    o_x = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    stretch = power_of_two(e4m3_stretch(tl.load(largest)))
    b_x = tl.load(x + o_x, mask=o_x < n, other=0.0).to(tl.float32) * stretch
    tl.store(y + o_x, clamp_e4m3(b_x).to(y.dtype.element_ty), mask=o_x < n)


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
