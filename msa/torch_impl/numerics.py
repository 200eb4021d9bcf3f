"""In which precision to compute."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def working_dtype(left: Tensor, right: Tensor) -> torch.dtype:
    """The precision for products of rows of `left` with rows of `right`.

    float32 for every input type up to float32, so that products of small integers stay exact (R4).
    float64 for float64 inputs, and for rows so large that a float32 sum could overflow: inf - inf
    would put a NaN where the definition has none.

    >>> working_dtype(torch.ones(2, 4, dtype=torch.bfloat16), torch.ones(3, 4))
    torch.float32
    >>> working_dtype(torch.full((2, 4), 1e20), torch.full((3, 4), 1e20))
    torch.float64
    """
    if torch.float64 in (left.dtype, right.dtype):
        return torch.float64
    if left.dtype == right.dtype == torch.float16 or not (left.numel() and right.numel()):
        return torch.float32
    bound = largest(left) * largest(right) * left.shape[-1]
    return torch.float64 if bound > torch.finfo(torch.float32).max else torch.float32


def largest(x: Tensor) -> float:
    """The highest finite magnitude in x; aminmax makes no copy as abs would.

    >>> largest(torch.tensor([1.0, torch.nan, -3.0, torch.inf]))
    3.0
    """
    low, high = (float(end) for end in torch.aminmax(x.detach()))
    if not (math.isfinite(low) and math.isfinite(high)):  # rare: it must not decide for the others
        low, high = (float(end) for end in torch.aminmax(x.detach().nan_to_num(0.0, 0.0, 0.0)))
    return max(-low, high)
