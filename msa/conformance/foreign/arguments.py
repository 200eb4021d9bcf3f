"""What the adapters of several conventions share: borders, lengths, and checks of results."""

from __future__ import annotations

from typing import Any

import numpy as np

from msa.config import MSAConfig
from msa.conformance.foreign.bad_target import check_result
from msa.integrations import arrays, layouts
from msa.ir import Array, Output, Sequences


def integers(like: Array, values: Any) -> Array:
    """An int32 array of the kind and device of `like`."""
    return arrays.as_int32(arrays.like(like, values))


def borders(like: Array, sequences: Sequences) -> tuple[Array, Array]:
    """cu_seqlens_q and cu_seqlens_k, int32 [batch + 1]."""
    return integers(like, sequences.cu_seqlens_q), integers(like, sequences.cu_seqlens_k)


def lengths(like: Array, sequences: Sequences) -> tuple[Array, Array]:
    """The tokens of each sequence, and those before its first query: each int32 [batch]."""
    n_k = np.diff(sequences.cu_seqlens_k)
    return integers(like, n_k), integers(like, n_k - np.diff(sequences.cu_seqlens_q))


def head_first(name: str, found: Any, q_idx: Array, config: MSAConfig) -> Array:
    """Check ids [Hkv, Tq, k] and return them as [Tq, Hkv, k]."""
    shape = (q_idx.shape[1], q_idx.shape[0], config.top_k)
    check_result(name, found, "Hkv Tq k", shape, "integer")
    return arrays.as_int32(found.swapaxes(0, 1))


def check_out(name: str, out: Any, q: Array, v: Array) -> Array:
    """Check that out has the shape [Tq, Hq, Dv], and return it."""
    check_result(name, out, "Tq Hq Dv", (*q.shape[:2], v.shape[-1]), "floating")
    return out


def first_of(found: Any) -> tuple[Any, Any]:
    """The result itself and None; of a tuple the first two entries."""
    if isinstance(found, (tuple, list)):
        return found[0], found[1] if len(found) > 1 else None
    return found, None


def in_order(ids: Array) -> Array:
    """Ids in canonical order (R8): ascending, then -1. Every negative id becomes -1."""
    return layouts.ascending(arrays.where(ids < 0, -1, ids))


def output_parts(found: Any, q: Array, v: Array) -> tuple[Array, Array | None, Array | None]:
    """The parts out, lse or None, ids or None of an Output, of out alone, or of (out, lse)."""
    if isinstance(found, Output):
        selection = found.selection
        out, lse, ids = found.out, found.lse, None if selection is None else selection.indices
    else:
        (out, lse), ids = first_of(found), None
    if lse is not None:
        check_result("lse", lse, "Tq Hq", tuple(q.shape[:2]), "floating")
    return check_out("out", out, q, v), lse, ids
