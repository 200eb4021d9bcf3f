"""NumPy arrays of other types: masked arrays, matrices, arrays of objects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from msa.conformance.bad_input import BadInput, attention
from msa.conformance.bad_input.kit import SHAPES, Kit


def masked(name: str, call: Callable[[Kit, Any], Any], *shape: int, dtype: str = "f4") -> BadInput:
    """A case with a masked array as one argument. It is refused, since backends ignore masks."""
    says = name.partition(" ")[0], "numpy.ndarray itself", "MaskedArray", "filled"
    array = np.ma.masked_array(np.ones(shape, dtype), mask=True)
    return BadInput(f"a mask on {name}", TypeError, says, lambda kit: call(kit, array))


QUERIES = {"q": (2, 1, 4, 4), "q_idx": (2, 1, 2, 2)}
PAGES = {f"{name}_pages": (3, 4, *SHAPES[name][1:]) for name in ("k", "v", "k_idx")}
ARRAY_TYPE_CASES = [
    *(masked(f"{n} of attention", lambda kit, x, n=n: kit.attention(**{n: x}), *SHAPES[n])
      for n in SHAPES),
    *(masked(f"{n} of lower", lambda kit, x, n=n: kit.lower(**{n: x}), *SHAPES[n])
      for n in SHAPES),
    *(masked(f"{n} of select", lambda kit, x, n=n: kit.select(**{n: x}), *SHAPES[n])
      for n in ("q_idx", "k_idx")),
    *(masked(f"{n} of sparse_attention", lambda kit, x, n=n: kit.sparse(**{n: x}), *SHAPES[n])
      for n in ("q", "k", "v")),
    *(masked(f"{n} of align_index", lambda kit, x, n=n: kit.align(**{n: x}), *SHAPES[n])
      for n in ("q", "k", "q_idx", "k_idx")),
    masked("lse of align_index", lambda kit, x: kit.align(lse=x), 6, 4),
    masked("selection.indices", lambda kit, x: kit.sparse(selection=kit.selection(indices=x)),
           6, 2, 2, dtype="i4"),
    masked("selection.indices of align_index",
           lambda kit, x: kit.align(selection=kit.selection(indices=x)), 6, 2, 2, dtype="i4"),
    masked("selection.indices to be validated",
           lambda kit, x: kit.selection(indices=x).validate(), 6, 2, 2, dtype="i4"),
    *(masked(f"cu_seqlens_{n}", lambda kit, x, n=n: kit.attention(
        **{"cu_seqlens_q": [0, 6], "cu_seqlens_k": [0, 8], f"cu_seqlens_{n}": x}), 2, dtype="i4")
      for n in "qk"),
    *(masked(f"{n} of decode", lambda kit, x, n=n: kit.decode(**{n: x}), *shape)
      for n, shape in QUERIES.items()),
    *(masked(f"cache.{n}", lambda kit, x, n=n: kit.decode({n: x}), *shape)
      for n, shape in PAGES.items()),
    masked("cache.page_table", lambda kit, x: kit.decode({"page_table": x}), 2, 2, dtype="i4"),
    masked("cache.lengths", lambda kit, x: kit.decode({"lengths": x}), 2, dtype="i4"),
    masked("cache.page_table of flat", lambda kit, x: kit.cache(page_table=x).flat(0), 2, 2,
           dtype="i4"),
    *(masked(f"{n} of a pool", lambda kit, x, n=n: kit.pool(**{n: x}), *shape)
      for n, shape in PAGES.items()),
    *(masked(f"{n} of append", lambda kit, x, n=n: kit.append(0, 1, **{n: x}), 1, *SHAPES[n][1:])
      for n in ("k", "v", "k_idx")),
    attention("a matrix", TypeError, ("q", "numpy.ndarray itself", "matrix", "numpy.asarray"),
              lambda kit: {"q": np.ones((6, 4)).view(np.matrix)}),
    attention("an array of objects", TypeError, ("k", "float16", "got object"),
              lambda kit: {"k": np.ones(SHAPES["k"], object)}),
    attention("the other order of bytes", TypeError, ("q", "float16", "got >f4"),
              lambda kit: {"q": np.ones(SHAPES["q"], ">f4")}),
]  # fmt: skip
