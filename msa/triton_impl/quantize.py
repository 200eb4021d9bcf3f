"""Index tensors in 8 bits: an option of the selection, which is faster and rounds its inputs.

    for x = q_idx and x = k_idx:
        largest = max |x| over the finite x
        stretch = the greatest power of two, at most 2^126, with largest * stretch <= 448
        y       = x * stretch, rounded to the nearest e4m3, ties to even; infinities to -448 and 448

What the fast form changes: one launch finds both maxima and one launch stretches both tensors, each
program working on one of the two. A short prompt is rounded in a few microseconds, most of which
are the starts of kernels.

The stretch is one positive factor for a whole tensor. It does not change which of two scores is
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
from msa.triton_impl.tuning import EVERY_LAUNCH

BLOCK = 4096  # elements of one program


@triton.jit
def largest_kernel(q, k, largest, n_q, n_k, programs_q, B: tl.constexpr):
    """Raise `largest` to the greatest finite magnitude of B elements of one tensor.

    As integers, the bits of positive floats are in the order of the floats. The maximum of integers
    is the same in whatever order it is taken (R19).

    Parameters:
        q: [n_q], 16-bit or float32
        k: [n_k], 16-bit or float32
        largest: [2], int32; the bits of a float32 for q and for k, raised
        n_q, n_k: int; elements
        programs_q: int; programs that work on q
        B: elements of one program
    """
    program = tl.program_id(0).to(tl.int64)
    if program < programs_q:
        o_x = program * B + tl.arange(0, B)
        b_x = tl.load(q + o_x, mask=o_x < n_q, other=0.0).to(tl.float32)
    else:
        o_x = (program - programs_q) * B + tl.arange(0, B)
        b_x = tl.load(k + o_x, mask=o_x < n_k, other=0.0).to(tl.float32)
    p_x = largest + (program >= programs_q).to(tl.int32)
    tl.atomic_max(p_x, tl.max(finite_size(b_x)).to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def stretch_block(x, y, n, program, b_bits, B: tl.constexpr):
    """Stretch and round B elements of one tensor, whose largest magnitude has these bits."""
    o_x = program * B + tl.arange(0, B)
    b_x = tl.load(x + o_x, mask=o_x < n, other=0.0).to(tl.float32)
    b_y = clamp_e4m3(b_x * power_of_two(e4m3_stretch(b_bits)))
    tl.store(y + o_x, b_y.to(y.dtype.element_ty), mask=o_x < n)


@triton.jit
def stretch_kernel(q, k, y_q, y_k, largest, n_q, n_k, programs_q, B: tl.constexpr):
    """Stretch and round B elements of one tensor.

    Parameters:
        q: [n_q], 16-bit or float32
        k: [n_k], 16-bit or float32
        y_q: [n_q], e4m3; written
        y_k: [n_k], e4m3; written
        largest: [2], int32; the bits of the greatest finite magnitudes of q and k, float32
        n_q, n_k: int; elements
        programs_q: int; programs that work on q
        B: elements of one program
    """
    program = tl.program_id(0).to(tl.int64)
    if program < programs_q:
        stretch_block(q, y_q, n_q, program, tl.load(largest), B)
    else:
        stretch_block(k, y_k, n_k, program - programs_q, tl.load(largest + 1), B)


def to_fp8(
    q: Float[Tensor, "*shape_q"], k: Float[Tensor, "*shape_k"]
) -> tuple[Float[Tensor, "*shape_q"], Float[Tensor, "*shape_k"]]:
    """Both tensors in e4m3, each stretched to fill its range (see above); on a GPU."""
    q, k = q.contiguous(), k.contiguous()
    y_q, y_k = (torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device) for x in (q, k))
    programs_q = triton.cdiv(q.numel(), BLOCK)
    grid = (programs_q + triton.cdiv(k.numel(), BLOCK),)
    if grid[0]:
        largest = torch.zeros(2, dtype=torch.int32, device=q.device)
        shape = q.numel(), k.numel(), programs_q
        largest_kernel[grid](q, k, largest, *shape, B=BLOCK, **EVERY_LAUNCH)
        stretch_kernel[grid](q, k, y_q, y_k, largest, *shape, B=BLOCK, **EVERY_LAUNCH)
    return y_q, y_k
