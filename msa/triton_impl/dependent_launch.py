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

from msa import chips


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Wait until the kernel before has ended. Above this call, do not read what it writes."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@lru_cache(maxsize=8)
def dependent_launch(device: torch.device) -> dict[str, Any]:
    """The launch arguments of a kernel of the chain; warns once on devices without this feature."""
    if device.type != "cuda":
        return {"PDL": False}
    if can_overlap(device):
        return {"PDL": True, "launch_pdl": True}
    chip = chips.chip_of(device.index)
    warnings.warn(
        f"programmatic dependent launch needs {chips.NEEDS['dependent_launch']}, got {chip.model} "
        f"of {chip.family.name}: the kernels of a decode step start one after the other",
        RuntimeWarning,
        stacklevel=2,
    )
    return {"PDL": False}


def can_overlap(device: torch.device) -> bool:
    """Whether the device is a GPU with this feature, which all with fast products of e4m3 have."""
    return device.type == "cuda" and chips.chip_of(device.index).family.dependent_launch
