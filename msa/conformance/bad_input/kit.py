"""Good arguments for every public function. A case of bad input replaces some of them."""

from __future__ import annotations

from typing import Any

import numpy as np

import msa
from msa.conformance.backends import Subject

SHAPES = {
    "q": (6, 4, 4),  # Tq, Hq, D
    "k": (8, 2, 4),  # Tk, Hkv, D
    "v": (8, 2, 3),  # Tk, Hkv, Dv
    "q_idx": (6, 2, 2),  # Tq, Hkv, Di
    "k_idx": (8, 2),  # Tk, Di
}
CONFIG = msa.MSAConfig(block_size=4, top_k=2)
Arguments = dict[str, Any]


class Kit:
    """Good arguments as arrays of the subject's kind, and calls with some of them replaced."""

    def __init__(self, subject: Subject) -> None:
        self.subject, self.backend = subject, subject.backend
        self.common: Arguments = {"config": CONFIG, "backend": self.backend}

    def array(self, *shape: int, dtype: str = "float32") -> Any:
        """An array of ones."""
        return self.subject.give(np.ones(shape), dtype)

    def integers(self, values: Any, dtype: str = "int32") -> Any:
        """An array of integers, such as block ids or lengths."""
        return self.subject.give(np.array(values, dtype), "float32")

    def arrays(self, names: str = "q k v q_idx k_idx") -> Arguments:
        """Tensors of these names, whose shapes fit together."""
        return {name: self.array(*SHAPES[name]) for name in names.split()}

    def attention(self, **changes: Any) -> Any:
        """Call msa.attention with some arguments replaced."""
        return msa.attention(**(self.arrays() | self.common | changes))

    def select(self, **changes: Any) -> Any:
        """Call msa.select with some arguments replaced."""
        return msa.select(**(self.arrays("q_idx k_idx") | self.common | changes))

    def selection(self, **changes: Any) -> msa.Selection:
        """A canonical selection of 6 queries at positions 2 to 7; some fields replaced."""
        rows = [[0, -1], [0, -1], [0, 1], [0, 1], [0, 1], [1, -1]]
        good: Arguments = {
            "indices": self.integers([[row, row] for row in rows]),
            "sequences": msa.Sequences.one(6, 8),
            "block_size": 4,
        }
        return msa.Selection(**(good | changes))

    def sparse(self, **changes: Any) -> Any:
        """Call msa.sparse_attention with some arguments replaced."""
        good: Arguments = {"selection": self.selection(), "backend": self.backend}
        return msa.sparse_attention(**(self.arrays("q k v") | good | changes))

    def spoiled(self, query: int, group: int, ids: list[int]) -> Any:
        """Call msa.sparse_attention with a Selection in which one row is replaced."""
        selection = self.selection()
        indices = np.array(self.subject.read(selection.indices))
        indices[query, group] = ids
        return self.sparse(selection=self.selection(indices=self.integers(indices)))

    def align(self, **changes: Any) -> Any:
        """Call msa.align_index with some arguments replaced."""
        return msa.align_index(**(self.arrays("q k q_idx k_idx") | self.common | changes))

    def cache(self, **changes: Any) -> msa.PagedKV:
        """A cache of 3 pages of 4 tokens: two sequences of 7 and 3 tokens; some parts replaced."""
        good: Arguments = {
            "k_pages": self.array(3, 4, 2, 4),
            "v_pages": self.array(3, 4, 2, 3),
            "k_idx_pages": self.array(3, 4, 2),
            "page_table": self.integers([[0, 2], [1, 0]]),
            "lengths": self.integers([7, 3]),
        }
        return msa.PagedKV(**(good | changes))

    def decode(self, parts: Arguments | None = None, **changes: Any) -> Any:
        """Call msa.decode with some arguments, or some parts of its cache, replaced."""
        queries: Arguments = {"q": self.array(2, 1, 4, 4), "q_idx": self.array(2, 1, 2, 2)}
        return msa.decode(
            **(queries | {"cache": self.cache(**parts or {})} | self.common | changes)
        )

    def prefill(self, parts: Arguments | None = None, **changes: Any) -> Any:
        """Call msa.prefill with some arguments, or some parts of its cache, replaced."""
        cache, borders = self.cache(**parts or {}), (0, 4, 6)
        good = self.arrays("q q_idx") | {"cache": cache, "cu_seqlens_q": borders}
        return msa.prefill(**(good | self.common | changes))

    def pool(self, **changes: Any) -> msa.PagePool:
        """A pool of 3 pages of 4 tokens for two empty sequences; some arguments replaced."""
        cache = self.cache()
        good: Arguments = {n: getattr(cache, n) for n in ("k_pages", "v_pages", "k_idx_pages")}
        return msa.PagePool(**(good | {"batch": 2, "pages_per_sequence": 2} | changes))

    def tokens(self, *lead: int) -> Arguments:
        """New keys, values and index keys to append."""
        return {name: self.array(*lead, *SHAPES[name][1:]) for name in ("k", "v", "k_idx")}

    def append(self, sequence: Any, *lead: int, **changes: Any) -> None:
        """Append tokens to a pool in which sequence 1 has 3 tokens; some tokens replaced."""
        pool = self.pool()
        pool.append(1, **self.tokens(3))
        pool.append(sequence, **(self.tokens(*lead) | changes))

    def append_tokens(self, *lead: int, **changes: Any) -> None:
        """Call msa.append_tokens on the cache of two sequences, with some tokens replaced."""
        msa.append_tokens(self.cache(), **(self.tokens(*lead) | changes))

    def reserve(self, sequence: Any, n: Any) -> None:
        """Call reserve on an empty pool."""
        self.pool().reserve(sequence, n)

    def lower(self, **changes: Any) -> Any:
        """Call msa.lower with some arguments replaced."""
        return msa.lower(**(self.arrays() | self.common | changes))
