"""Bad input of R20 about the choice of a backend: its name, its options, its kinds of array."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np

import msa
from msa.conformance.bad_input import CONFIG, SHAPES, Arguments, BadInput, Kit, attention
from msa.dispatch import available_backends

OTHER_CASES = [
    attention("unknown backend", ValueError, ("backend", "reference, torch, triton", "'cuda'"),
              lambda kit: {"backend": "cuda"}),
    BadInput("unavailable backend", ValueError, ("backend", "available", "'torch'", "pip install"),
             lambda kit: _without_libraries(kit)),
    BadInput("chunk size 0", ValueError, ("chunk_size", "at least 1", "got 0"),
             lambda kit: kit.lower(chunk_size=0)),
    BadInput("tile size 32", ValueError, ("tile_size", "at most 31", "got 32"),
             lambda kit: kit.lower(tile_size=32)),
    BadInput("a dictionary as config of lower", TypeError, ("config", "MSAConfig", "dict"),
             lambda kit: kit.lower(config={})),
]  # fmt: skip


OPTION_CASES = [
    attention("unknown loop order", ValueError,
              ("loop_order", "'auto', 'kv_outer' or 'union'", "'outer'"),
              lambda kit: {"loop_order": "outer"}),
    attention("unknown index dtype", ValueError, ("index_dtype", "None or 'fp8_e4m3'", "'int8'"),
              lambda kit: {"index_dtype": "int8"}),
    BadInput("unknown loop order of sparse_attention", ValueError, ("loop_order", "got None"),
             lambda kit: kit.sparse(loop_order=None)),
    BadInput("unknown index dtype of select", ValueError, ("index_dtype", "None", "got 'auto'"),
             lambda kit: kit.select(index_dtype="auto")),
    attention("a loop order for the reference", ValueError,
              ("loop_order", "'auto' for backend='reference'", "one order", "got 'union'"),
              lambda kit: {"loop_order": "union", "backend": "reference"}),
    BadInput("a loop order of sparse_attention for the reference", ValueError,
             ("loop_order", "'auto' for backend='reference'", "got 'kv_outer'"),
             lambda kit: kit.sparse(loop_order="kv_outer", backend="reference")),
    BadInput("8 bits for the reference", ValueError,
             ("index_dtype", "None for backend='reference'", "keeps the dtype", "'fp8_e4m3'"),
             lambda kit: kit.select(index_dtype="fp8_e4m3", backend="reference")),
]  # fmt: skip


def _without_libraries(kit: Kit) -> Any:
    with mock.patch("msa.dispatch.available_backends", lambda: ("reference",)):
        return kit.attention(backend="torch")


def _without_interpreter() -> Any:
    with mock.patch.dict("os.environ", {"TRITON_INTERPRET": "0"}):
        return msa.attention(**_torch_arrays(), config=CONFIG, backend="triton")


def _torch_array(*shape: int, device: str = "cpu", **options: Any) -> Any:
    import torch

    return torch.ones(shape, device=device, **options)


def _torch_arrays(**changes: Any) -> Arguments:
    return {**{name: _torch_array(*shape) for name, shape in SHAPES.items()}, **changes}


def _torch_pool(**changes: Any) -> msa.PagePool:
    shapes = {f"{name}_pages": (3, 4, *SHAPES[name][1:]) for name in ("k", "v", "k_idx")}
    pages: Arguments = {name: _torch_array(*shape) for name, shape in shapes.items()}
    return msa.PagePool(**(pages | changes), batch=2)


def _on_kernels(call: Callable[[], Any]) -> Any:
    """With Triton's interpreter allowed, so that only what comes after is refused."""
    with mock.patch.dict("os.environ", {"TRITON_INTERPRET": "1"}):
        return call()


def _off_kernels(call: Callable[[], Any]) -> Any:
    """Without Triton's interpreter."""
    with mock.patch.dict("os.environ", {"TRITON_INTERPRET": "0"}):
        return call()


def kernels(
    name: str, error: type[Exception], says: tuple[str, ...], block_size: int = 16,
    dtype: str = "float32", **options: Any,
) -> BadInput:  # fmt: skip
    """A call of msa.attention that the triton backend has no kernel for."""
    given: Arguments = {n: np.ones(shape, dtype) for n, shape in SHAPES.items()} | options
    given |= {"config": msa.MSAConfig(block_size, top_k=2), "backend": "triton"}
    return BadInput(name, error, says, lambda kit: _on_kernels(lambda: msa.attention(**given)))


KERNEL_CASES = [
    kernels("blocks of 24 for kernels", ValueError, ("block_size", "16, 32, 64, 128 or 256",
            "got 24", "backend='torch'"), block_size=24),
    kernels("blocks of 8 for kernels", ValueError, ("block_size", "got 8"), block_size=8),
    kernels("blocks of 512 for kernels", ValueError, ("block_size", "got 512"), block_size=512),
    kernels("float64 for kernels", TypeError, ("q", "float16, bfloat16 or float32",
            "backend='triton'", "got float64"), dtype="float64"),
    kernels("8 bits in the interpreter", ValueError, ("index_dtype", "None", "CUDA",
            "'fp8_e4m3'"), index_dtype="fp8_e4m3"),
    BadInput("blocks of 24 for kernels in select", ValueError, ("block_size", "got 24"),
             lambda kit: _on_kernels(lambda: kit.select(
                 config=msa.MSAConfig(24, top_k=2), backend="triton"))),
    BadInput("blocks of 4 for kernels in sparse_attention", ValueError, ("block_size", "got 4"),
             lambda kit: _on_kernels(lambda: kit.sparse(backend="triton"))),
    BadInput("blocks of 4 for kernels in decode", ValueError, ("block_size", "got 4"),
             lambda kit: _on_kernels(lambda: kit.decode(backend="triton"))),
    BadInput("blocks of 4 for append_tokens", ValueError, ("block_size", "got 4"),
             lambda kit: _on_kernels(lambda: kit.append_tokens(2, 1))),
    BadInput("append_tokens without the batch", ValueError, ("k", "[S, n, Hkv, D]", "[1, 2, 4]"),
             lambda kit: _on_kernels(lambda: kit.append_tokens(1))),
    BadInput("append_tokens for a batch of 3", ValueError,
             ("k", "[2, any, 2, 4]", "got [3, 1, 2, 4]"),
             lambda kit: _on_kernels(lambda: kit.append_tokens(3, 1))),
    BadInput("append_tokens of another dtype", TypeError,
             ("v", "dtype of cache.v_pages", "float16"),
             lambda kit: _on_kernels(
                 lambda: kit.append_tokens(2, 1, v=kit.array(2, 1, 2, 3, dtype="float16")))),
    BadInput("append_tokens to arrays of the host", ValueError,
             ("backend='triton'", "CUDA tensors"),
             lambda kit: _off_kernels(lambda: kit.append_tokens(2, 1))),
]  # fmt: skip

TORCH_CASES = [
    attention("a loop order for torch", ValueError,
              ("loop_order", "'auto' for backend='torch'", "one order", "got 'union'"),
              lambda kit: _torch_arrays(loop_order="union", backend="torch")),
    attention("8 bits for torch", ValueError,
              ("index_dtype", "None for backend='torch'", "got 'fp8_e4m3'"),
              lambda kit: _torch_arrays(index_dtype="fp8_e4m3", backend="torch")),
    attention("mixed kinds", TypeError, ("k", "torch.Tensor as q is", "numpy.ndarray"),
              lambda kit: _torch_arrays(k=np.ones(SHAPES["k"], np.float32))),
    attention("mixed devices", ValueError, ("v", "device of q = cpu", "meta"),
              lambda kit: _torch_arrays(v=_torch_array(*SHAPES["v"], device="meta"))),
    attention("index branch elsewhere", ValueError, ("k_idx", "device of q = cpu", "meta"),
              lambda kit: _torch_arrays(k_idx=_torch_array(*SHAPES["k_idx"], device="meta"))),
    attention("a gradient asked of the reference", ValueError,
              ("q", "gradient", "requires_grad=True"),
              lambda kit: _torch_arrays(q=_torch_array(*SHAPES["q"], requires_grad=True),
                                        backend="reference")),
    BadInput("lse on another device", ValueError, ("lse", "device of q = cpu", "meta"),
             lambda kit: msa.align_index(
                 **{n: _torch_array(*SHAPES[n]) for n in ("q", "k", "q_idx", "k_idx")},
                 lse=_torch_array(6, 4, device="meta"), config=CONFIG)),
    BadInput("mixed kinds in a pool", TypeError, ("v_pages", "torch.Tensor as k_pages", "ndarray"),
             lambda kit: _torch_pool(v_pages=np.ones((3, 4, 2, 3), np.float32))),
    BadInput("new keys on another device", ValueError, ("k", "cache.k_pages = cpu", "got meta"),
             lambda kit: _torch_pool().append(0, *(
                 _torch_array(1, *SHAPES[n][1:], device="meta") for n in ("k", "v", "k_idx")))),
    BadInput("triton on the CPU", ValueError, ("backend='triton'", "CUDA", "cpu"),
             lambda kit: _without_interpreter()),
    BadInput("a selection of another kind", TypeError, ("selection.indices", "Tensor", "ndarray"),
             lambda kit: kit.sparse(**{n: _torch_array(*SHAPES[n]) for n in ("q", "k", "v")},
                                    selection=msa.Selection(
                                        np.array(kit.subject.read(kit.selection().indices)),
                                        msa.Sequences.one(6, 8), 4))),
]  # fmt: skip


def _eight_bits(*names: str) -> Arguments:
    """The pages of these names in 8 bits, with scales."""
    import torch

    scales = {"k": (3, 2), "v": (3, 2), "k_idx": (3,)}
    pages = {f"{n}_pages": _torch_array(3, 4, *SHAPES[n][1:]) for n in scales}
    pages |= {f"{n}_pages": pages[f"{n}_pages"].to(torch.float8_e4m3fn) for n in names}
    return pages | {f"{n}_scales": _torch_array(*scales[n]) for n in names}


def _decode_eight(*names: str, **changes: Any) -> Any:
    """Decoding from a good cache of torch tensors, or with some parts replaced."""
    import torch

    parts: Arguments = {
        "page_table": torch.tensor([[0, 2], [1, 0]]),
        "lengths": torch.tensor([7, 3]),
        "q": _torch_array(2, 1, 4, 4),
        "q_idx": _torch_array(2, 1, 2, 2),
    }
    parts |= _eight_bits(*names) | changes
    q, q_idx = parts.pop("q"), parts.pop("q_idx")
    return msa.decode(q, q_idx, msa.PagedKV(**parts), config=CONFIG, backend="torch")


def _append_eight(**changes: Any) -> None:
    """Appending to a pool of 8 bits."""
    pages = {name: array for name, array in _eight_bits("k", "v", "k_idx").items()
             if name.endswith("pages")}  # fmt: skip
    tokens = {name: _torch_array(1, *SHAPES[name][1:]) for name in ("k", "v", "k_idx")}
    msa.PagePool(**pages, batch=2).append(0, **(tokens | changes))


def _half(*shape: int) -> Any:
    return _torch_array(*shape).half()


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
             lambda kit: _decode_eight("k", "v", k_idx_scales=_torch_array(3))),
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
             lambda kit: _decode_eight("k", "v", k_scales=_torch_array(3))),
    BadInput("scales of other pages", ValueError, ("cache.v_scales", "[3, 2]", "got [4, 2]"),
             lambda kit: _decode_eight("k", "v", v_scales=_torch_array(4, 2))),
    BadInput("index scales with heads", ValueError,
             ("cache.k_idx_scales", "[pages] = [3]", "got [3, 2]"),
             lambda kit: _decode_eight("k_idx", k_idx_scales=_torch_array(3, 2))),
    BadInput("scales in half precision", TypeError, ("cache.k_scales", "float32", "float16"),
             lambda kit: _decode_eight("k", "v", k_scales=_half(3, 2))),
    BadInput("scales on another device", ValueError, ("cache.v_scales", "device of q", "got meta"),
             lambda kit: _decode_eight("k", "v", v_scales=_torch_array(3, 2, device="meta"))),
    BadInput("a pool of 8-bit keys and 32-bit values", TypeError,
             ("v_pages", "dtype of k_pages = torch.float8_e4m3fn", "got torch.float32"),
             lambda kit: _torch_pool(k_pages=_eight_bits("k")["k_pages"])),
    BadInput("new keys of 8 bits", TypeError,
             ("k", "float16 or bfloat16 or float32", "got torch.float8_e4m3fn"),
             lambda kit: _append_eight(k=_eight_bits("k")["k_pages"][0, :1])),
    BadInput("new index keys of 64 bits for pages of 8", TypeError,
             ("k_idx", "float16 or bfloat16 or float32", "got torch.float64"),
             lambda kit: _append_eight(k_idx=_torch_array(1, 2).double())),
    BadInput("new keys and values of two dtypes", TypeError,
             ("v", "dtype of k = torch.float32", "got torch.float16"),
             lambda kit: _append_eight(v=_half(1, 2, 3))),
    BadInput("the quality of arrays", TypeError, ("q", "torch.Tensor", "numpy.ndarray"),
             lambda kit: msa.cache_quality(*(np.ones(s, np.float32) for s in SHAPES.values()))),
    BadInput("the quality of more queries than keys", ValueError, ("q", "k = 8", "got 9"),
             lambda kit: msa.cache_quality(
                 **_torch_arrays(q=_torch_array(9, 4, 4), q_idx=_torch_array(9, 2, 2)))),
    BadInput("the quality of 64 bits", TypeError, ("v", "bfloat16 or float32", "float64"),
             lambda kit: msa.cache_quality(**_torch_arrays(v=_torch_array(8, 2, 3).double()))),
]  # fmt: skip

BACKEND_CASES: tuple[BadInput, ...] = (
    *OTHER_CASES,
    *OPTION_CASES,
    *(KERNEL_CASES if "triton" in available_backends() else []),
    *(EIGHT_BIT_CASES if "torch" in available_backends() else []),
    *(TORCH_CASES if "torch" in available_backends() else []),
)
