"""Checks of the layout of a call: shapes, and which borders are given (R1, R20).

They read shapes only, so that torch.compile can trace them.
"""

from __future__ import annotations

from typing import Any

from msa.checks.arrays import Array, check_layout, check_shape
from msa.checks.values import kind

DIMS = {
    "q": "Tq Hq D",
    "k": "Tk Hkv D",
    "v": "Tk Hkv Dv",
    "q_idx": "Tq Hkv Di",
    "k_idx": "Tk Di",
    "lse": "Tq Hq",
}
"""The dims of each packed argument."""


def check_shapes(
    arrays: dict[str, Array], batched: bool | None = None
) -> tuple[dict[str, int], bool]:
    """Check that the arrays have one layout and agree in their sizes.

    Args:
        arrays: some of the arguments of DIMS.
        batched: False if arrays must be packed, True if they must be batched, None for both.

    Returns:
        the size of each letter of DIMS, and whether the arrays are batched.
    """
    sizes: dict[str, int] = {}
    for name, array in arrays.items():
        batched = check_layout(name, array, DIMS[name], batched)
        check_shape(name, array, f"B {DIMS[name]}" if batched else DIMS[name], sizes)
    return sizes, bool(batched)


def check_given(batched: bool, cu_seqlens_q: Any, cu_seqlens_k: Any) -> None:
    """Batched tensors have no borders; packed tensors have them for q and for k, or not at all."""
    if batched:
        check_absent("cu_seqlens_q", cu_seqlens_q, "tensors are batched")
        check_absent("cu_seqlens_k", cu_seqlens_k, "tensors are batched")
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        names = ["cu_seqlens_q", "cu_seqlens_k"]
        missing, given = names if cu_seqlens_q is None else names[::-1]
        raise ValueError(f"{missing} must be given along with {given}, got None")


def check_absent(name: str, borders: Any, reason: str) -> None:
    """cu_seqlens must be None if another argument holds the borders."""
    if borders is not None:
        raise ValueError(f"{name} must be None where {reason}, got {kind(borders)}")
