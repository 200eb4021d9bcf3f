"""Good arguments as torch tensors. A case of bad input replaces some of them."""

from __future__ import annotations

from typing import Any

import msa
from msa.conformance.bad_input.kit import SHAPES, Arguments


def torch_array(*shape: int, device: str = "cpu", **options: Any) -> Any:
    """A tensor of ones."""
    import torch

    return torch.ones(shape, device=device, **options)


def torch_arrays(**changes: Any) -> Arguments:
    """The tensors of msa.attention, some of them replaced."""
    return {**{name: torch_array(*shape) for name, shape in SHAPES.items()}, **changes}


def torch_pool(**changes: Any) -> msa.PagePool:
    """A pool of 3 pages for 2 sequences, some of its pages replaced."""
    shapes = {f"{name}_pages": (3, 4, *SHAPES[name][1:]) for name in ("k", "v", "k_idx")}
    pages: Arguments = {name: torch_array(*shape) for name, shape in shapes.items()}
    return msa.PagePool(**(pages | changes), batch=2)
