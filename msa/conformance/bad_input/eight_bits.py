"""Bad caches of 8 bits: pages, scales and queries that do not fit together."""

from __future__ import annotations

from typing import Any

import numpy as np

import msa
from msa.conformance.bad_input import BadInput
from msa.conformance.bad_input.kit import CONFIG, SHAPES, Arguments
from msa.conformance.bad_input.torch_arrays import torch_array, torch_arrays, torch_pool


def _eight_bits(*names: str) -> Arguments:
    """The pages of these names in 8 bits, with scales."""
    import torch

    scales = {"k": (3, 2), "v": (3, 2), "k_idx": (3,)}
    pages = {f"{n}_pages": torch_array(3, 4, *SHAPES[n][1:]) for n in scales}
    pages |= {f"{n}_pages": pages[f"{n}_pages"].to(torch.float8_e4m3fn) for n in names}
    return pages | {f"{n}_scales": torch_array(*scales[n]) for n in names}


def eight_bit_cache(*names: str, **changes: Any) -> msa.PagedKV:
    """A cache of torch tensors, the pages of these names in 8 bits, with some parts replaced."""
    import torch

    parts: Arguments = {
        "page_table": torch.tensor([[0, 2], [1, 0]]), "lengths": torch.tensor([7, 3])
    }  # fmt: skip
    return msa.PagedKV(**(parts | _eight_bits(*names) | changes))


def _decode_eight(*names: str, **changes: Any) -> Any:
    """Decode from such a cache, with some parts or queries replaced."""
    queries: Arguments = {"q": torch_array(2, 1, 4, 4), "q_idx": torch_array(2, 1, 2, 2)}
    queries |= {name: changes.pop(name) for name in ("q", "q_idx") if name in changes}
    cache = eight_bit_cache(*names, **changes)
    return msa.decode(**queries, cache=cache, config=CONFIG, backend="torch")


def _spoiled_scales(name: str, value: float) -> Any:
    """Scales with a wrong value for page 2, which is the second block of sequence 0."""
    scales = _eight_bits(name)[f"{name}_scales"]
    scales[2] = value
    return scales


def masked_scales(name: str) -> BadInput:
    """A case with masked scales. They are refused, since backends ignore masks."""
    scales = np.ma.masked_array(np.ones((3, 2)[: 1 + (name != "k_idx")], np.float32), mask=True)
    return BadInput(
        f"a mask on cache.{name}_scales", TypeError,
        (f"cache.{name}_scales", "numpy.ndarray itself", "MaskedArray"),
        lambda kit: _decode_eight("k", "v", "k_idx", **{f"{name}_scales": scales}),
    )  # fmt: skip


def _append_eight(**changes: Any) -> None:
    """Append to a pool of 8-bit pages, with some tokens replaced."""
    pages = {name: array for name, array in _eight_bits("k", "v", "k_idx").items()
             if name.endswith("pages")}  # fmt: skip
    tokens = {name: torch_array(1, *SHAPES[name][1:]) for name in ("k", "v", "k_idx")}
    msa.PagePool(**pages, batch=2).append(0, **(tokens | changes))


def _half(*shape: int) -> Any:
    return torch_array(*shape).half()


EIGHT_BIT_CASES = [
    BadInput("8-bit keys without scales", ValueError,
             ("cache.k_scales", "given where cache.k_pages", "float8_e4m3fn", "got None"),
             lambda kit: _decode_eight("k", "v", k_scales=None)),
    BadInput("8-bit index keys without scales", ValueError,
             ("cache.k_idx_scales", "given where cache.k_idx_pages", "got None"),
             lambda kit: _decode_eight("k_idx", k_idx_scales=None)),
    BadInput("flat of 8 bits without scales", ValueError, ("cache.v_scales", "given", "got None"),
             lambda kit: msa.PagedKV(
                 **_eight_bits("k", "v") | {"v_scales": None},
                 page_table=kit.integers([[0, 2]]), lengths=kit.integers([7])).flat(0)),
    BadInput("index scales beside index pages of 32 bits", ValueError,
             ("cache.k_idx_scales", "None where cache.k_idx_pages", "got torch.Tensor"),
             lambda kit: _decode_eight("k", "v", k_idx_scales=torch_array(3))),
    BadInput("8-bit keys, but not values", TypeError,
             ("cache.v_pages", "dtype of cache.k_pages", "float8_e4m3fn", "got torch.float32"),
             lambda kit: _decode_eight("k")),
    BadInput("8-bit values, but not keys", TypeError,
             ("cache.v_pages", "dtype of cache.k_pages", "float32", "got torch.float8_e4m3fn"),
             lambda kit: _decode_eight("v")),
    BadInput("8-bit queries", TypeError, ("q", "float16", "got torch.float8_e4m3fn"),
             lambda kit: _decode_eight(
                 "k", "v", q=_eight_bits("k")["k_pages"][:2, :1].repeat(1, 1, 2, 1))),
    BadInput("half-precision queries, 8-bit index keys alone", TypeError,
             ("cache.k_pages", "dtype of q = torch.float16", "got torch.float32"),
             lambda kit: _decode_eight("k_idx", q=_half(2, 1, 4, 4))),
    BadInput("half-precision index queries, 8-bit keys alone", TypeError,
             ("cache.k_idx_pages", "dtype of q_idx = torch.float16", "got torch.float32"),
             lambda kit: _decode_eight("k", "v", q_idx=_half(2, 1, 2, 2))),
    BadInput("a scale for each page alone", ValueError,
             ("cache.k_scales", "[pages, Hkv] = [3, 2]", "got [3]"),
             lambda kit: _decode_eight("k", "v", k_scales=torch_array(3))),
    BadInput("scales of other pages", ValueError, ("cache.v_scales", "[3, 2]", "got [4, 2]"),
             lambda kit: _decode_eight("k", "v", v_scales=torch_array(4, 2))),
    BadInput("index scales with heads", ValueError,
             ("cache.k_idx_scales", "[pages] = [3]", "got [3, 2]"),
             lambda kit: _decode_eight("k_idx", k_idx_scales=torch_array(3, 2))),
    BadInput("scales in half precision", TypeError, ("cache.k_scales", "float32", "float16"),
             lambda kit: _decode_eight("k", "v", k_scales=_half(3, 2))),
    BadInput("scales without numbers", ValueError, ("cache.v_scales", "hold numbers", "meta"),
             lambda kit: _decode_eight("k", "v", v_scales=torch_array(3, 2, device="meta"))),
    *(BadInput(f"{value} as a scale of {name}", ValueError,
               (f"cache.{name}_scales", "finite and positive", f"got {value}", "block 1",
                "sequence 0"),
               lambda kit, name=name, value=value: _decode_eight(
                   "k", "v", "k_idx", **{f"{name}_scales": _spoiled_scales(name, value)}))
      for name in ("k", "v", "k_idx") for value in (-1.0, 0.0, float("inf"), float("nan"))),
    BadInput("a negative scale in flat", ValueError,
             ("cache.v_scales", "finite and positive", "got -1.0", "block 1", "sequence 0"),
             lambda kit: eight_bit_cache(
                 "k", "v", v_scales=_spoiled_scales("v", -1.0)).flat(0)),
    masked_scales("k"), masked_scales("v"), masked_scales("k_idx"),
    BadInput("a pool of 8-bit keys and 32-bit values", TypeError,
             ("v_pages", "dtype of k_pages = torch.float8_e4m3fn", "got torch.float32"),
             lambda kit: torch_pool(k_pages=_eight_bits("k")["k_pages"])),
    BadInput("new keys of 8 bits", TypeError,
             ("k", "float16 or bfloat16 or float32", "got torch.float8_e4m3fn"),
             lambda kit: _append_eight(k=_eight_bits("k")["k_pages"][0, :1])),
    BadInput("new index keys of 64 bits for pages of 8", TypeError,
             ("k_idx", "float16 or bfloat16 or float32", "got torch.float64"),
             lambda kit: _append_eight(k_idx=torch_array(1, 2).double())),
    BadInput("new keys and values of two dtypes", TypeError,
             ("v", "dtype of k = torch.float32", "got torch.float16"),
             lambda kit: _append_eight(v=_half(1, 2, 3))),
    BadInput("the quality of arrays", TypeError, ("q", "torch.Tensor", "numpy.ndarray"),
             lambda kit: msa.cache_quality(*(np.ones(s, np.float32) for s in SHAPES.values()))),
    BadInput("the quality of more queries than keys", ValueError, ("q", "k = 8", "got 9"),
             lambda kit: msa.cache_quality(
                 **torch_arrays(q=torch_array(9, 4, 4), q_idx=torch_array(9, 2, 2)))),
    BadInput("the quality of 64 bits", TypeError, ("v", "bfloat16 or float32", "float64"),
             lambda kit: msa.cache_quality(**torch_arrays(v=torch_array(8, 2, 3).double()))),
]  # fmt: skip
