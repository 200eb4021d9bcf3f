"""Bad tensors: ranks, sizes, dtypes and strides that do not fit the other arguments."""

from __future__ import annotations

import numpy as np

from msa.conformance.bad_input import BadInput, attention

SHAPE_CASES = [
    attention("q of rank 2", ValueError, ("q", "[Tq, Hq, D]", "[6, 4]"),
              lambda kit: {"q": kit.array(6, 4)}),
    attention("k of rank 2", ValueError, ("k", "[Tk, Hkv, D]", "[8, 4]"),
              lambda kit: {"k": kit.array(8, 4)}),
    attention("batched k beside packed q", ValueError, ("k", "[Tk, Hkv, D]", "[1, 8, 2, 4]"),
              lambda kit: {"k": kit.array(1, 8, 2, 4)}),
    attention("k_idx with heads", ValueError, ("k_idx", "[Tk, Di]", "[8, 2, 2]"),
              lambda kit: {"k_idx": kit.array(8, 2, 2)}),
    attention("other head dim of k", ValueError, ("k", "[Tk, Hkv, D] = [any, any, 4]", "[8, 2, 5]"),
              lambda kit: {"k": kit.array(8, 2, 5)}),
    attention("other heads of v", ValueError, ("v", "[Tk, Hkv, Dv] = [8, 2, any]", "[8, 1, 3]"),
              lambda kit: {"v": kit.array(8, 1, 3)}),
    attention("fewer tokens in v", ValueError, ("v", "[8, 2, any]", "[7, 2, 3]"),
              lambda kit: {"v": kit.array(7, 2, 3)}),
    attention("other groups of q_idx", ValueError, ("q_idx", "[Tq, Hkv, Di]", "[6, 2, any]",
              "[6, 4, 2]"), lambda kit: {"q_idx": kit.array(6, 4, 2)}),
    attention("other dim of k_idx", ValueError, ("k_idx", "[8, 2]", "[8, 3]"),
              lambda kit: {"k_idx": kit.array(8, 3)}),
    attention("Hq not a multiple of Hkv", ValueError, ("q", "multiple of Hkv = 2", "got 3"),
              lambda kit: {"q": kit.array(6, 3, 4)}),
    attention("no head at all", ValueError, ("q", "[Tq, Hq, D]", "[6, 0, 4]"),
              lambda kit: {"q": kit.array(6, 0, 4)}),
    attention("n_q > n_k", ValueError, ("q", "at most", "k = 8", "got 9"),
              lambda kit: {"q": kit.array(9, 4, 4), "q_idx": kit.array(9, 2, 2)}),
    BadInput("other dim of k_idx in select", ValueError, ("k_idx", "[any, 2]", "[8, 3]"),
             lambda kit: kit.select(k_idx=kit.array(8, 3))),
    BadInput("other groups of q_idx in align_index", ValueError, ("q_idx", "[6, 2, any]"),
             lambda kit: kit.align(q_idx=kit.array(6, 3, 2))),
    BadInput("lse of other heads", ValueError, ("lse", "[Tq, Hq] = [6, 4]", "got [6, 2]"),
             lambda kit: kit.align(lse=kit.array(6, 2))),
    BadInput("lse with heads first", ValueError, ("lse", "[Tq, Hq] = [6, 4]", "got [4, 6]"),
             lambda kit: kit.align(lse=kit.array(4, 6))),
    BadInput("batched lse beside packed q", ValueError, ("lse", "[Tq, Hq]", "got [1, 6, 4]"),
             lambda kit: kit.align(lse=kit.array(1, 6, 4))),
]  # fmt: skip


KIND_CASES = [
    attention("mixed dtype", TypeError, ("k", "dtype of q", "float32", "float16"),
              lambda kit: {"k": kit.array(8, 2, 4, dtype="float16")}),
    attention("mixed dtype in the index branch", TypeError, ("k_idx", "dtype of q_idx", "float64"),
              lambda kit: {"k_idx": kit.array(8, 2, dtype="float64")}),
    attention("integer values", TypeError, ("v", "float16 or bfloat16 or float32", "int32"),
              lambda kit: {"v": kit.integers(np.ones((8, 2, 3)))}),
    attention("a list", TypeError, ("q", "array", "list"), lambda kit: {"q": [[[1.0]]]}),
    attention("last dim not contiguous", ValueError, ("k", "contiguous", "strides"),
              lambda kit: {"k": kit.array(8, 2, 8)[..., ::2]}),
    attention("transposed last dim", ValueError, ("v", "contiguous", "strides"),
              lambda kit: {"v": kit.array(3, 2, 8).T if kit.subject.kind == "numpy"
                           else kit.array(3, 2, 8).permute(2, 1, 0)}),
    attention("a dictionary as config", TypeError, ("config", "MSAConfig", "dict"),
              lambda kit: {"config": {}}),
    attention("align in words", TypeError, ("align", "True or False", "'yes'"),
              lambda kit: {"align": "yes"}),
    BadInput("lse in half precision", TypeError, ("lse", "float32 or float64", "float16"),
             lambda kit: kit.align(lse=kit.array(6, 4, dtype="float16"))),
    BadInput("lse of another kind", TypeError, ("lse", "array", "float"),
             lambda kit: kit.align(lse=1.0)),
]  # fmt: skip
