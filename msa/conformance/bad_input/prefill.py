"""Bad prefills over a paged cache: borders, queries and options. Bad caches are in caches.py."""

from __future__ import annotations

from typing import Any

from msa.conformance.bad_input import BadInput
from msa.conformance.bad_input.eight_bits import eight_bit_cache
from msa.conformance.bad_input.kit import Kit
from msa.conformance.bad_input.torch_arrays import torch_array

PREFILL_CASES = [
    BadInput("no borders for two sequences", ValueError,
             ("cu_seqlens_q", "given for packed queries of 2 sequences", "got None"),
             lambda kit: kit.prefill(cu_seqlens_q=None)),
    BadInput("borders of other sequences", ValueError,
             ("cu_seqlens_q", "3 entries for the 2 sequences of the cache", "got 2"),
             lambda kit: kit.prefill(cu_seqlens_q=(0, 6))),
    BadInput("borders of fewer queries", ValueError, ("cu_seqlens_q", "end with Tq = 6", "got 5"),
             lambda kit: kit.prefill(cu_seqlens_q=(0, 4, 5))),
    BadInput("borders that decrease in prefill", ValueError,
             ("cu_seqlens_q", "not decrease", "got 7 then 6"),
             lambda kit: kit.prefill(cu_seqlens_q=(0, 7, 6))),
    BadInput("borders of prefill that start at 1", ValueError,
             ("cu_seqlens_q", "start with 0", "got (1, 4, 6)"),
             lambda kit: kit.prefill(cu_seqlens_q=(1, 4, 6))),
    BadInput("borders of fractions", TypeError, ("cu_seqlens_q", "integers"),
             lambda kit: kit.prefill(cu_seqlens_q=kit.array(3))),
    BadInput("borders beside batched queries", ValueError,
             ("cu_seqlens_q", "None where tensors are batched", "got tuple"),
             lambda kit: kit.prefill(q=kit.array(2, 3, 4, 4), q_idx=kit.array(2, 3, 2, 2))),
    BadInput("batched queries of other sequences", ValueError,
             ("cache.page_table", "[3, any]", "[2, 2]"),
             lambda kit: kit.prefill(q=kit.array(3, 2, 4, 4), q_idx=kit.array(3, 2, 2, 2),
                                     cu_seqlens_q=None)),
    BadInput("more queries than cached tokens", ValueError,
             ("cache.lengths", "at least the 4 queries", "got 3", "sequence 1"),
             lambda kit: kit.prefill(cu_seqlens_q=(0, 2, 6))),
    BadInput("queries for an empty slot", ValueError,
             ("cache.lengths", "at least the 2 queries", "got 0", "sequence 1"),
             lambda kit: kit.prefill({"lengths": kit.integers([7, 0])})),
    BadInput("q of rank 2 in prefill", ValueError, ("q", "[Tq, Hq, D]", "[6, 4]"),
             lambda kit: kit.prefill(q=kit.array(6, 4))),
    BadInput("index queries of fewer tokens", ValueError, ("q_idx", "[6, 2, 2]", "[5, 2, 2]"),
             lambda kit: kit.prefill(q_idx=kit.array(5, 2, 2))),
    BadInput("other heads of q in prefill", ValueError, ("q", "multiple of Hkv = 2", "got 3"),
             lambda kit: kit.prefill(q=kit.array(6, 3, 4))),
    BadInput("a page out of range in prefill", ValueError, ("cache.page_table", "0 to 2", "got 3"),
             lambda kit: kit.prefill({"page_table": kit.integers([[0, 3], [1, 0]])})),
    BadInput("a table too short in prefill", ValueError, ("cache.page_table", "2 entries", "got 1"),
             lambda kit: kit.prefill({"page_table": kit.integers([[0], [1]])})),
    BadInput("prefill from a dictionary", TypeError, ("cache", "PagedKV", "dict"),
             lambda kit: kit.prefill(cache={})),
    BadInput("prefill with another dtype", TypeError, ("cache.k_pages", "dtype of q", "float32"),
             lambda kit: kit.prefill(q=kit.array(6, 4, 4, dtype="float16"))),
    BadInput("an unknown loop order of prefill", ValueError, ("loop_order", "'auto'", "got 'all'"),
             lambda kit: kit.prefill(loop_order="all")),
    BadInput("kernels of prefill for the reference", ValueError,
             ("kernels", "'auto' for backend='reference'", "got 'hopper'"),
             lambda kit: kit.prefill(kernels="hopper", backend="reference")),
]  # fmt: skip


def _prefill_eight(kit: Kit, *names: str, **changes: Any) -> Any:
    """Prefill over torch tensors, the pages of these names in 8 bits, some parts replaced."""
    queries = {"q": torch_array(6, 4, 4), "q_idx": torch_array(6, 2, 2)}
    return kit.prefill(cache=eight_bit_cache(*names, **changes), **queries, backend="torch")


PREFILL_EIGHT_CASES = [
    BadInput("8-bit keys of prefill without scales", ValueError,
             ("cache.k_scales", "given where cache.k_pages", "float8_e4m3fn", "got None"),
             lambda kit: _prefill_eight(kit, "k", "v", k_scales=None)),
    BadInput("8-bit values of prefill, but not keys", TypeError,
             ("cache.v_pages", "dtype of cache.k_pages", "got torch.float8_e4m3fn"),
             lambda kit: _prefill_eight(kit, "v")),
]  # fmt: skip
