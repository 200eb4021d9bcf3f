"""Arithmetic on the bits of numbers: counts of set bits, powers of two that fit numbers to e4m3.

The greatest e4m3 number is 448 = 1.75 * 2^8. For a positive float32 x, let 2^e be the least power
of two with x / 2^e <= 448. Then e is the exponent of x less 8, and one more if the fraction of x is
above 0.75, whose 23 bits are 0x600000.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def count_bits(b_mask):
    """Number of set bits of each uint32."""
    b_mask = b_mask - ((b_mask >> 1) & 0x55555555)
    b_mask = (b_mask & 0x33333333) + ((b_mask >> 2) & 0x33333333)
    b_mask = (b_mask + (b_mask >> 4)) & 0x0F0F0F0F
    return ((b_mask * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def finite_size(b_x):
    """Magnitudes of float32 numbers; 0 for infinities and NaN."""
    b_size = tl.abs(b_x)
    return tl.where(b_size < float("inf"), b_size, 0.0)  # NaN is not less than anything


@triton.jit
def e4m3_exponent(b_bits):
    """The least e with x / 2^e <= 448, plus 127, from the int32 bits of float32 numbers x >= 0."""
    return (b_bits >> 23) + ((b_bits & 0x7FFFFF) > 0x600000).to(tl.int32) - 8


@triton.jit
def power_of_two(b_exponent):
    """2^(b_exponent - 127) in float32, for exponents from 1 to 254."""
    return (b_exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def e4m3_stretch(b_bits):
    """The exponent, plus 127, of the greatest power of two s, at most 2^126, with x * s <= 448."""
    return tl.minimum(254 - e4m3_exponent(b_bits), 126 + 127)


@triton.jit
def clamp_e4m3(b_x):
    """Numbers cut to the range of e4m3, -448 to 448; NaN stays NaN."""
    return tl.where(b_x > 448.0, 448.0, tl.where(b_x < -448.0, -448.0, b_x))  # NaN is neither
