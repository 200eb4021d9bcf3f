"""Calls for which the triton backend has no kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np

import msa
from msa.conformance.bad_input import BadInput
from msa.conformance.bad_input.kit import SHAPES, Arguments, Kit


def _on_kernels(call: Callable[[], Any]) -> Any:
    """Call with TRITON_INTERPRET=1, so that the device is accepted and later checks are reached."""
    with mock.patch.dict("os.environ", {"TRITON_INTERPRET": "1"}):
        return call()


def _off_kernels(call: Callable[[], Any]) -> Any:
    """Call with TRITON_INTERPRET=0."""
    with mock.patch.dict("os.environ", {"TRITON_INTERPRET": "0"}):
        return call()


def _on_the_host(kit: Kit) -> Kit:
    """A kit with arguments on the CPU."""
    return Kit(replace(kit.subject, device="cpu"))


def _pages() -> Arguments:
    """The parts of a cache for two sequences, as NumPy arrays."""
    shapes = {f"{n}_pages": (3, 4, *SHAPES[n][1:]) for n in ("k", "v", "k_idx")}
    arrays: Arguments = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    return arrays | {name: _counts(name, "int32") for name in ("page_table", "lengths")}


def _counts(name: str, dtype: str) -> Any:
    return np.array([[0, 2], [1, 0]] if name == "page_table" else [7, 3], dtype)


def kernels(
    name: str, error: type[Exception], says: tuple[str, ...], block_size: int = 16,
    dtype: str = "float32", **options: Any,
) -> BadInput:  # fmt: skip
    """A case that calls msa.attention for which the triton backend has no kernel."""
    given: Arguments = {n: np.ones(shape, dtype) for n, shape in SHAPES.items()} | options
    given |= {"config": msa.MSAConfig(block_size, top_k=2), "backend": "triton"}
    return BadInput(name, error, says, lambda kit: _on_kernels(lambda: msa.attention(**given)))


def hopper(
    name: str, error: type[Exception], says: tuple[str, ...], dtype: str = "float16",
    index_dim: int = 64, groups: int = 2, **config: int,
) -> BadInput:  # fmt: skip
    """A case that names the hopper kernels in msa.select where they cannot run."""
    shapes = {"q_idx": (6, groups, index_dim), "k_idx": (8, index_dim)}
    given: Arguments = {name: np.ones(shape, dtype) for name, shape in shapes.items()}
    given |= {"config": msa.MSAConfig(**{"block_size": 64} | config), "backend": "triton"}
    return BadInput(
        name, error, (*says, "kernels='hopper'", "use kernels='portable'"),
        lambda kit: _on_kernels(lambda: msa.select(**given, kernels="hopper")),
    )  # fmt: skip


def walk(
    name: str, error: type[Exception], says: tuple[str, ...], dtype: str = "float16",
    dims: tuple[int, int] = (128, 128), group: int = 1, block_size: int = 128, **options: Any,
) -> BadInput:  # fmt: skip
    """A case that names the hopper kernels in msa.sparse_attention where they cannot run."""
    shapes = {"q": (8, group, dims[0]), "k": (8, 1, dims[0]), "v": (8, 1, dims[1])}
    given: Arguments = {name: np.ones(shape, dtype) for name, shape in shapes.items()}
    ids = np.zeros((8, 1, 1), np.int32)
    given["selection"] = msa.Selection(ids, msa.Sequences.one(8, 8), block_size)
    given |= {"backend": "triton", "kernels": "hopper"} | options
    return BadInput(
        name, error, (*says, "kernels='hopper'", "use kernels='portable'"),
        lambda kit: _on_kernels(lambda: msa.sparse_attention(**given)),
    )  # fmt: skip


HOPPER_CASES = [
    walk("float32 for the hopper walk", TypeError, ("q", "float16 or bfloat16", "got float32"),
         dtype="float32"),
    walk("heads of 64 for the hopper walk", ValueError, ("q", "D = 128", "got 64"),
         dims=(64, 128)),
    walk("values of 64 for the hopper walk", ValueError, ("v", "Dv = 128", "got 64"),
         dims=(128, 64)),
    walk("blocks of 64 for the hopper walk", ValueError, ("block_size", "128", "got 64"),
         block_size=64),
    walk("65 heads in a group for the hopper walk", ValueError,
         ("q", "at most 64 heads in a group", "got 65"), group=65),
    walk("kv_outer of five heads on hopper kernels", ValueError, ("q", "8, 16, 32 or 64 heads",
         "'kv_outer'", "got 5"), group=5, loop_order="kv_outer"),
    walk("the hopper walk on the host", ValueError, ("q", "GPU of compute capability 9.x",
         "got the CPU")),
    hopper("float32 for hopper kernels", TypeError, ("q_idx", "float16 or bfloat16",
           "got float32"), dtype="float32"),
    hopper("an index of 16 channels for hopper kernels", ValueError, ("q_idx", "Di = 64 or 128",
           "got 16"), index_dim=16),
    hopper("blocks of 32 for hopper kernels", ValueError, ("block_size", "64 or 128", "got 32"),
           block_size=32),
    hopper("257 groups for hopper kernels", ValueError, ("q_idx", "at most 256 groups", "got 257"),
           groups=257),
    hopper("70 places for hopper kernels", ValueError, ("top_k", "at most 64 more than sink_blocks",
           "got 65 more"), top_k=70, sink_blocks=3, local_blocks=2),
    hopper("hopper kernels on the host", ValueError, ("q_idx", "GPU of compute capability 9.x",
           "got the CPU")),
    kernels("hopper kernels in attention", TypeError, ("q_idx", "float16 or bfloat16",
            "kernels='hopper'", "got float32"), kernels="hopper"),
]  # fmt: skip
KERNEL_CASES = [
    *HOPPER_CASES,
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
