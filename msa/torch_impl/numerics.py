"""The precision in which products are computed, and checks of what float32 can hold."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FINE = 2.0**-18
"""The largest rounding error of an LSE from which probabilities are computed: float32's at 32."""


def working_dtype(left: Tensor, right: Tensor, scale: float = 1.0) -> torch.dtype:
    """The precision for products of rows of `left` with rows of `right`, times the scale.

    float32 for every input type up to float32, so that products of small integers stay exact (R4).
    float64 for float64 inputs, and for rows so large that a float32 sum, or a sum times the scale,
    could overflow: inf - inf would put a NaN where the definition has none.

    >>> working_dtype(torch.ones(2, 4, dtype=torch.bfloat16), torch.ones(3, 4))
    torch.float32
    >>> working_dtype(torch.full((2, 4), 1e20), torch.full((3, 4), 1e20))
    torch.float64
    """
    if torch.float64 in (left.dtype, right.dtype):
        return torch.float64
    if not (left.numel() and right.numel()):
        return torch.float32
    bound = left.shape[-1] * max(1.0, scale)
    for x in (left, right):
        bound *= torch.finfo(x.dtype).max if x.dtype == torch.float16 else largest(x)
    return torch.float64 if bound > torch.finfo(torch.float32).max else torch.float32


def largest(x: Tensor) -> float:
    """The highest finite magnitude in x.

    >>> largest(torch.tensor([1.0, torch.nan, -3.0, torch.inf]))
    3.0
    """
    highest = _highest(x)
    if math.isfinite(highest):
        return highest
    return _highest(x.nan_to_num(0.0, 0.0, 0.0))  # rare: values that are not finite are left out


def _highest(x: Tensor) -> float:
    """The highest magnitude, or NaN if x holds NaN; aminmax makes no copy, unlike abs."""
    low, high = torch.aminmax(x.detach())
    return float(torch.maximum(-low, high))


def rounds_coarsely(lse: Tensor) -> bool:
    """Whether exp(logits - lse) would be off by more than FINE because lse itself was rounded.

    False where lse holds NaN or infinities, so that these appear in the result.

    >>> [rounds_coarsely(torch.tensor([x, 1.0])) for x in (30.0, -1e3, torch.inf)]
    [False, True, False]
    """
    return bool(lse.numel()) and FINE < _highest(lse) * torch.finfo(lse.dtype).eps < torch.inf
