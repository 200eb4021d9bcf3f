"""What the integrations refuse: argument, what was wanted, what came."""

from __future__ import annotations

from typing import Any

import numpy as np

from msa import checks
from msa.ir import Array, PagedKV, Sequences


# -- layouts --------------------------------------------------------------------------------------
def check_rank(name: str, array: Any, dims: str) -> None:
    """As many dims as named."""
    if not hasattr(array, "shape") or len(array.shape) != len(dims.split()):
        got = list(array.shape) if hasattr(array, "shape") else checks.kind(array)
        raise ValueError(f"{name} must have shape [{', '.join(dims.split())}], got {got}")


def check_uniform(sequences: Sequences) -> None:
    """One length for all sequences of a batch."""
    lengths = {(q.stop - q.start, k.stop - k.start) for q, k in sequences.spans()}
    if len(lengths) > 1:
        raise ValueError(
            "selection.sequences must have one length for [B, T, ...], "
            f"got (queries, keys) {sorted(lengths)}"
        )


def check_width(got: int, wanted: int) -> None:
    """Room for all ids."""
    if wanted < got:
        raise ValueError(f"top_k must be at least the {got} ids of each query, got {wanted}")


def check_no_gaps(name: str, ids: Array, visible: Array) -> None:
    """An id in each of the first places, of which there are as many as visible blocks."""
    gaps = visible & (ids < 0)
    if bool(gaps.any()):
        query, group, place = np.argwhere(checks.to_numpy(gaps))[0].tolist()
        raise ValueError(
            f"{name} must hold an id in each of the first min(k, visible blocks) places, "
            f"got {int(ids[query, group, place])} at query {query}, group {group}, place {place}"
        )


def check_no_scales(cache: PagedKV) -> None:
    """Pages of the usual dtypes."""
    for name in ("k_scales", "v_scales", "k_idx_scales"):
        if getattr(cache, name) is not None:
            raise ValueError(
                f"cache.{name} must be None: each neighbour has scales of its own shape, "
                f"got {checks.kind(getattr(cache, name))}"
            )


def check_head_dims(dim: int, dim_v: int) -> None:
    """Keys and values that share an array have one size."""
    if dim != dim_v:
        raise ValueError(f"cache.v_pages must have Dv = D = {dim} here, got {dim_v}")


def check_divides(name: str, size: int, whole: int) -> None:
    """Whole pages make up a block."""
    if size < 1 or whole % size:
        raise ValueError(f"{name} must divide the block size {whole}, got {size}")


def check_order(order: str) -> None:
    """How heads and tokens of a page lie."""
    if order not in ("NHD", "HND"):
        raise ValueError(f"order must be 'NHD' or 'HND', got {order!r}")


def check_whole_pages(name: str, bad: Array) -> None:
    """Token slots that form whole pages, each in order."""
    if bool(bad.any()):
        row, token = np.argwhere(checks.to_numpy(bad))[0].tolist()
        raise ValueError(
            f"{name} must give each block of a sequence one page of slots, aligned and in order, "
            f"got another slot at row {row}, token {token}"
        )
