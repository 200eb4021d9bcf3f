"""Programmatic dependent launch: a kernel of a chain is set up while the one before it still runs.

Each kernel of the chain waits for the kernel before it, then lets the next one be set up. The wait
comes first, so a kernel sees all that the kernels before it wrote.
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
def wait_for_previous(PDL: tl.constexpr):
    """Wait until the kernel before has ended. Above this call, do not read what it writes."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@lru_cache(maxsize=8)
def dependent_launch(device: torch.device) -> dict[str, Any]:
    """The launch arguments of a kernel of the chain; warns once on devices without this feature."""
    if is_hopper(device):
        return {"PDL": True, "launch_pdl": True}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        warnings.warn(
            "programmatic dependent launch needs compute capability 9.0, got "
            f"{major}.{minor}: the kernels of a decode step start one after the other",
            RuntimeWarning,
            stacklevel=2,
        )
    return {"PDL": False}


@lru_cache(maxsize=8)
def is_hopper(device: torch.device) -> bool:
    """Whether the device is a GPU of compute capability 9.0 or later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
