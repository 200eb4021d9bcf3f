"""Bad borders of sequences: cu_seqlens_q, cu_seqlens_k and msa.Sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import msa
from msa.conformance.bad_input import BadInput, attention
from msa.conformance.bad_input.kit import SHAPES, Arguments, Kit


def borders(q: Any, k: Any) -> Callable[[Kit], Arguments]:
    """Both cu_seqlens, as arguments to be replaced."""
    return lambda kit: {"cu_seqlens_q": q, "cu_seqlens_k": k}


BORDER_CASES = [
    attention("decreasing cu_seqlens", ValueError, ("cu_seqlens_q", "not decrease", "4 then 2"),
              borders([0, 4, 2, 6], [0, 4, 6, 8])),
    attention("cu_seqlens_k ends early", ValueError, ("cu_seqlens_k", "end with Tk = 8", "got 7"),
              borders([0, 6], [0, 7])),
    attention("cu_seqlens_q ends late", ValueError, ("cu_seqlens_q", "end with Tq = 6", "got 7"),
              borders([0, 7], [0, 8])),
    attention("cu_seqlens not from 0", ValueError, ("cu_seqlens_q", "start with 0", "(1, 6)"),
              borders([1, 6], [0, 8])),
    attention("empty cu_seqlens", ValueError, ("cu_seqlens_k", "0", "()"),
              borders([0, 6], np.zeros(0, np.int32))),
    attention("one sequence longer in q", ValueError, ("cu_seqlens_q", "at most", "5 queries",
              "4 keys"), borders([0, 5, 6], [0, 4, 8])),
    attention("batches of different size", ValueError, ("cu_seqlens_k", "as many", "2", "got 3"),
              borders([0, 6], [0, 4, 8])),
    attention("only one of the cu_seqlens", ValueError, ("cu_seqlens_k", "None"),
              borders([0, 6], None)),
    attention("fractional cu_seqlens", TypeError, ("cu_seqlens_q", "integer", "float"),
              borders([0.0, 6.0], [0, 8])),
    attention("cu_seqlens of rank 2", ValueError, ("cu_seqlens_q", "[batch + 1]", "list inside"),
              borders([[0, 6]], [0, 8])),
    attention("an array of cu_seqlens of rank 2", ValueError,
              ("cu_seqlens_k", "[batch + 1]", "[1, 2]"), borders([0, 6], np.array([[0, 8]]))),
    attention("ragged cu_seqlens", ValueError, ("cu_seqlens_k", "[batch + 1]", "list inside"),
              borders([0, 6], [[0], [0, 8]])),
    attention("boolean cu_seqlens", TypeError, ("cu_seqlens_q", "integers", "bool"),
              lambda kit: {"cu_seqlens_q": kit.integers([0, 1], "bool"), "cu_seqlens_k": [0, 8]}),
    attention("a boolean among cu_seqlens", TypeError, ("cu_seqlens_q[1]", "integer", "True"),
              borders([0, True], [0, 8])),
    attention("cu_seqlens in words", TypeError, ("cu_seqlens_q", "array", "str"),
              borders("06", [0, 8])),
    attention("cu_seqlens of bytes", TypeError, ("cu_seqlens_k", "integers", "got bytes"),
              borders([0, 6], bytes([0, 8]))),
    attention("one number for cu_seqlens", TypeError, ("cu_seqlens_q", "tuple", "got int"),
              borders(6, [0, 8])),
    attention("cu_seqlens beyond int64", ValueError,
              ("cu_seqlens_k[1]", "LARGEST_BORDER", "got 18446744073709551615"),
              borders([0, 6], np.array([0, 2**64 - 1], np.uint64))),
    BadInput("sequences of a list", TypeError, ("cu_seqlens_q", "tuple of integers", "list"),
             lambda kit: msa.Sequences([0, 6], (0, 8))),  # type: ignore[arg-type]
    BadInput("fractional borders of sequences", TypeError, ("cu_seqlens_k[1]", "integer", "8.0"),
             lambda kit: msa.Sequences((0, 6), (0, 8.0))),  # type: ignore[arg-type]
    attention("cu_seqlens with batched tensors", ValueError, ("cu_seqlens_q", "None", "batched"),
              lambda kit: {**{n: kit.array(1, *s) for n, s in SHAPES.items()},
                           "cu_seqlens_q": [0, 6], "cu_seqlens_k": [0, 8]}),
]  # fmt: skip
