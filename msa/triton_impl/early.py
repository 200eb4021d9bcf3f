"""Programmatic dependent launch: a kernel of a chain is set up while the one before it still runs.

Each kernel of the chain waits for the one before, then lets the next one be set up. The wait comes
first, so that what a kernel sees is complete all the way up the chain.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_others(EARLY: tl.constexpr):
    """Up to here a kernel may run beside the one before it, and must not read what that writes."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()


@lru_cache(maxsize=8)
def early_launch(device: torch.device) -> dict[str, Any]:
    """The launch arguments of a kernel of the chain; says so once where it has to do without."""
    if is_hopper(device):
        return {"EARLY": True, "launch_pdl": True}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        warnings.warn(
            "programmatic dependent launch needs compute capability 9.0, got "
            f"{major}.{minor}: the kernels of a decode step start one after the other",
            RuntimeWarning,
            stacklevel=2,
        )
    return {"EARLY": False}


@lru_cache(maxsize=8)
def is_hopper(device: torch.device) -> bool:
    """Compute capability 9.0 or later; the interpreter has none."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
