"""Bad input of R20 about the choice of a backend: its name, its options, its kinds of array."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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
    BadInput("chunk size beyond the largest", ValueError,
             ("chunk_size", "LARGEST_CHUNK_SIZE = 2147483648", "got 1180591620717411303424"),
             lambda kit: kit.lower(chunk_size=2**70)),
    BadInput("fractional tile size", TypeError, ("tile_size", "integer", "8.0"),
             lambda kit: kit.lower(tile_size=8.0)),
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


def _on_the_host(kit: Kit) -> Kit:
    """The same arguments, not on a GPU."""
    return Kit(replace(kit.subject, device="cpu"))


def _pages() -> Arguments:
    """The parts of a cache for two sequences, of NumPy."""
    shapes = {f"{n}_pages": (3, 4, *SHAPES[n][1:]) for n in ("k", "v", "k_idx")}
    arrays: Arguments = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    return arrays | {name: _counts(name, "int32") for name in ("page_table", "lengths")}


def _counts(name: str, dtype: str) -> Any:
    return np.array([[0, 2], [1, 0]] if name == "page_table" else [7, 3], dtype)


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
             lambda kit: _off_kernels(lambda: _on_the_host(kit).append_tokens(2, 1))),
    *(BadInput(f"append_tokens to a {name} of {dtype}", TypeError,
               (f"cache.{name}", "int32 or int64", f"got {dtype}"),
               lambda kit, name=name, dtype=dtype: msa.append_tokens(
                   msa.PagedKV(**_pages() | {name: _counts(name, dtype)}),
                   *(np.ones((2, 1, *SHAPES[n][1:]), "f4") for n in ("k", "v", "k_idx"))))
      for name in ("page_table", "lengths") for dtype in ("int16", "uint8", "uint32")),
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
    attention("a tensor without numbers", ValueError, ("v", "hold numbers", "meta"),
              lambda kit: _torch_arrays(v=_torch_array(*SHAPES["v"], device="meta"))),
    attention("index branch without numbers", ValueError, ("k_idx", "hold numbers", "meta"),
              lambda kit: _torch_arrays(k_idx=_torch_array(*SHAPES["k_idx"], device="meta"))),
    attention("a gradient asked of the reference", ValueError,
              ("q", "gradient", "requires_grad=True"),
              lambda kit: _torch_arrays(q=_torch_array(*SHAPES["q"], requires_grad=True),
                                        backend="reference")),
    BadInput("lse without numbers", ValueError, ("lse", "hold numbers", "meta"),
             lambda kit: msa.align_index(
                 **{n: _torch_array(*SHAPES[n]) for n in ("q", "k", "q_idx", "k_idx")},
                 lse=_torch_array(6, 4, device="meta"), config=CONFIG)),
    BadInput("mixed kinds in a pool", TypeError, ("v_pages", "torch.Tensor as k_pages", "ndarray"),
             lambda kit: _torch_pool(v_pages=np.ones((3, 4, 2, 3), np.float32))),
    BadInput("new keys without numbers", ValueError, ("k", "hold numbers", "meta"),
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


def _eight_bit_cache(*names: str, **changes: Any) -> msa.PagedKV:
    """A good cache of torch tensors, or with some parts replaced."""
    import torch

    parts: Arguments = {
        "page_table": torch.tensor([[0, 2], [1, 0]]), "lengths": torch.tensor([7, 3])
    }  # fmt: skip
    return msa.PagedKV(**(parts | _eight_bits(*names) | changes))


def _decode_eight(*names: str, **changes: Any) -> Any:
    """Decoding from a good cache of torch tensors, or with some parts replaced."""
    queries: Arguments = {"q": _torch_array(2, 1, 4, 4), "q_idx": _torch_array(2, 1, 2, 2)}
    queries |= {name: changes.pop(name) for name in ("q", "q_idx") if name in changes}
    cache = _eight_bit_cache(*names, **changes)
    return msa.decode(**queries, cache=cache, config=CONFIG, backend="torch")


def _spoiled_scales(name: str, value: float) -> Any:
    """Page 2, the second block of sequence 0, has a scale of no use."""
    scales = _eight_bits(name)[f"{name}_scales"]
    scales[2] = value
    return scales


def masked_scales(name: str) -> BadInput:
    """Scales with a mask, which no backend would look at."""
    scales = np.ma.masked_array(np.ones((3, 2)[: 1 + (name != "k_idx")], np.float32), mask=True)
    return BadInput(
        f"a mask on cache.{name}_scales", TypeError,
        (f"cache.{name}_scales", "numpy.ndarray itself", "MaskedArray"),
        lambda kit: _decode_eight("k", "v", "k_idx", **{f"{name}_scales": scales}),
    )  # fmt: skip


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
    BadInput("scales without numbers", ValueError, ("cache.v_scales", "hold numbers", "meta"),
             lambda kit: _decode_eight("k", "v", v_scales=_torch_array(3, 2, device="meta"))),
    *(BadInput(f"{value} as a scale of {name}", ValueError,
               (f"cache.{name}_scales", "finite and positive", f"got {value}", "block 1",
                "sequence 0"),
               lambda kit, name=name, value=value: _decode_eight(
                   "k", "v", "k_idx", **{f"{name}_scales": _spoiled_scales(name, value)}))
      for name in ("k", "v", "k_idx") for value in (-1.0, 0.0, float("inf"), float("nan"))),
    BadInput("a negative scale in flat", ValueError,
             ("cache.v_scales", "finite and positive", "got -1.0", "block 1", "sequence 0"),
             lambda kit: _eight_bit_cache(
                 "k", "v", v_scales=_spoiled_scales("v", -1.0)).flat(0)),
    masked_scales("k"), masked_scales("v"), masked_scales("k_idx"),
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


def _views_with_pending_negation() -> Any:
    import torch

    return torch.ones(6, 4, 1, dtype=torch.complex64).conj().imag


def _jagged() -> Any:
    import torch

    return torch.nested.nested_tensor(
        [torch.ones(2, 4, 4), torch.ones(4, 4, 4)], layout=torch.jagged
    )


def _nested() -> Any:
    import torch

    return torch.nested.nested_tensor([torch.ones(2, 4, 4), torch.ones(4, 4, 4)])


def _subclass() -> Any:
    import torch

    class Marked(torch.Tensor):
        """Means more than its numbers."""

    return torch.ones(SHAPES["q"]).as_subclass(Marked)


def _fake() -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return _torch_array(*SHAPES["q"])


def _in_vmap(kit: Kit) -> Any:
    import torch

    def attend(q: Any) -> Any:
        return kit.attention(**_torch_arrays(q=q, backend="torch"))

    return torch.func.vmap(attend)(_torch_array(2, *SHAPES["q"]))


def _in_grad(kit: Kit) -> Any:
    import torch

    def total(q: Any) -> Any:
        return kit.attention(**_torch_arrays(q=q, backend="torch")).out.sum()

    return torch.func.grad(total)(_torch_array(*SHAPES["q"]))


def _with_tangent(kit: Kit) -> Any:
    from torch.autograd import forward_ad

    with forward_ad.dual_level():
        k = forward_ad.make_dual(_torch_array(*SHAPES["k"]), _torch_array(*SHAPES["k"]))
        return kit.attention(**_torch_arrays(k=k, backend="torch"))


def dense(name: str, says: tuple[str, ...], make: Callable[[], Any]) -> BadInput:
    """A tensor in the place of q that is not what it looks like."""
    error = ValueError if "resolve_neg" in says[-1] else TypeError
    return attention(name, error, ("q", *says), lambda kit: _torch_arrays(q=make()))


MEMORY_CASES = [
    dense("a sparse tensor", ("dense", "torch.sparse_coo", "to_dense"),
          lambda: _torch_array(*SHAPES["q"]).to_sparse()),
    dense("a sparse tensor by rows", ("dense", "torch.sparse_csr", "to_dense"),
          lambda: _torch_array(*SHAPES["q"]).to_sparse_csr()),
    dense("a nested tensor", ("dense", "nested", "cu_seqlens"), _nested),
    dense("a jagged tensor", ("torch.Tensor itself", "NestedTensor", "offsets()"), _jagged),
    dense("a subclass of tensors", ("torch.Tensor itself", "Marked", "as_subclass"), _subclass),
    dense("a fake tensor", ("torch.Tensor itself", "FakeTensor", "msa.ops"), _fake),
    dense("a view to be negated", ("hold its numbers", "negated", "resolve_neg"),
          _views_with_pending_negation),
    BadInput("a call inside vmap", TypeError, ("q", "torch.func", "vmap", "whole batch"), _in_vmap),
    BadInput("a call inside grad", TypeError, ("q", "torch.func", "torch.autograd"), _in_grad),
    BadInput("a tangent", TypeError, ("k", "no tangent", "forward-mode"), _with_tangent),
    attention("sparse cu_seqlens", TypeError, ("cu_seqlens_k", "dense", "sparse_coo"),
              lambda kit: _torch_arrays(cu_seqlens_q=[0, 6],
                                        cu_seqlens_k=_torch_array(2).int().to_sparse())),
    attention("cu_seqlens without numbers", ValueError, ("cu_seqlens_k", "hold numbers", "meta"),
              lambda kit: _torch_arrays(cu_seqlens_q=[0, 6],
                                        cu_seqlens_k=_torch_array(2, device="meta").int())),
    BadInput("ids without numbers", ValueError, ("selection.indices", "hold numbers", "meta"),
             lambda kit: kit.sparse(selection=kit.selection(
                 indices=_torch_array(6, 2, 2, device="meta").int()))),
    BadInput("lengths without numbers", ValueError, ("cache.lengths", "hold numbers", "meta"),
             lambda kit: kit.decode({"lengths": _torch_array(2, device="meta").int()})),
    BadInput("the quality without a configuration", TypeError, ("config", "MSAConfig", "NoneType"),
             lambda kit: msa.cache_quality(
                 **_torch_arrays(), config=None)),  # type: ignore[arg-type]
]  # fmt: skip

BACKEND_CASES: tuple[BadInput, ...] = (
    *OTHER_CASES,
    *OPTION_CASES,
    *(KERNEL_CASES if "triton" in available_backends() else []),
    *(EIGHT_BIT_CASES if "torch" in available_backends() else []),
    *(TORCH_CASES if "torch" in available_backends() else []),
    *(MEMORY_CASES if "torch" in available_backends() else []),
)
