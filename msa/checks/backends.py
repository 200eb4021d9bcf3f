"""Checks of the choice of a backend: which ones there are, and what each of them takes (R20)."""

from __future__ import annotations

import os
from typing import Any

from msa.checks.arrays import FLOAT_DTYPES, dtype_name, is_torch
from msa.checks.values import either, kind

BACKENDS = ("auto", "reference", "torch", "triton")
KERNEL_DTYPES = FLOAT_DTYPES[:3]
KERNEL_BLOCK_SIZES = (16, 32, 64, 128, 256)
KERNEL_TOP_K = 1024
"""The most blocks per query that every kernel of the triton backend has room for."""
KERNEL_SCORED_BLOCKS = 2**17
"""The most blocks per sequence whose scores one kernel sorts; `select_fused` has no such limit."""
OPTIONS: dict[str, tuple[tuple[str | None, ...], str]] = {
    "loop_order": (("auto", "kv_outer", "union"), "has one order"),
    "index_dtype": ((None, "fp8_e4m3"), "keeps the dtype that it is given"),
    "kernels": (("auto", "portable", "hopper"), "has no kernels to choose from"),
}
"""Options of the triton backend: their values, the default first, and why the other backends accept
only the default."""


def check_backend(name: Any, available: tuple[str, ...]) -> None:
    """A known name whose libraries are installed."""
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name != "auto" and name not in available:
        raise ValueError(
            f"backend must be available here ({', '.join(available)}), got {name!r}: "
            f"install it with pip install 'msa-stack[{name}]'"
        )


def check_options(backend: str, array: Any, **options: Any) -> None:
    """Each option has one of its values; values other than the default need triton.

    8 bits need a GPU.
    """
    for name, value in options.items():
        known, reason = OPTIONS[name]
        if value not in known:
            raise ValueError(f"{name} must be {either(map(repr, known))}, got {value!r}")
        if backend != "triton" and value != known[0]:
            raise ValueError(
                f"{name} must be {known[0]!r} for backend={backend!r}, which {reason}, "
                f"got {value!r}"
            )
    if options.get("index_dtype") and not (is_torch(array) and array.is_cuda):
        raise ValueError("index_dtype must be None off a CUDA device, got 'fp8_e4m3'")


def check_triton_device(array: Any, interpreted: bool) -> None:
    """Kernels need a GPU, or Triton's interpreter, which runs them on the CPU for tests."""
    if not interpreted and not (is_torch(array) and array.is_cuda):
        where, other = f"a {kind(array)}", "reference"
        if is_torch(array):
            where, other = f"a tensor on {array.device}", "torch"
        raise ValueError(
            f"backend='triton' must be given CUDA tensors, got {where}: use backend='{other}', "
            "or, to run on the CPU (slowly), set TRITON_INTERPRET=1 before starting Python"
        )


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def check_kernels(block_size: int, top_k: int = 1, **arrays: Any) -> None:
    """The triton backend has kernels for this block size, this top_k and these dtypes."""
    check_top_k(top_k)
    if block_size not in KERNEL_BLOCK_SIZES:
        raise ValueError(
            f"block_size must be {either(KERNEL_BLOCK_SIZES)} for backend='triton', "
            f"got {block_size}: use backend='torch'"
        )
    for name, array in arrays.items():
        dtype = dtype_name(array)
        if dtype not in KERNEL_DTYPES:
            raise TypeError(
                f"{name} must have dtype {either(KERNEL_DTYPES)} for backend='triton', "
                f"got {array.dtype}: use backend='torch'"
            )
        if dtype == "bfloat16" and is_interpreted():
            raise TypeError(
                f"{name} must have dtype float16 or float32 for backend='triton' under "
                f"TRITON_INTERPRET=1, for Triton's interpreter multiplies bfloat16 wrongly, "
                f"got {array.dtype}: use backend='torch'"
            )


def check_top_k(top_k: int) -> None:
    """The triton backend has room for so many blocks per query."""
    if top_k > KERNEL_TOP_K:
        raise ValueError(
            f"top_k must be at most {KERNEL_TOP_K} for backend='triton', got {top_k}: "
            "use backend='torch'"
        )


def check_scored_blocks(blocks: int) -> None:
    """The triton backend can sort the scores of so many blocks."""
    if blocks > KERNEL_SCORED_BLOCKS:
        raise ValueError(
            f"scores.values must have at most {KERNEL_SCORED_BLOCKS} blocks, got {blocks}"
        )


# -- CUDA graphs ----------------------------------------------------------------------------------
def is_captured(array: Any) -> bool:
    """Whether a CUDA graph is being captured on the current stream of the array's device."""
    if not is_torch(array) or not array.is_cuda:
        return False
    import torch

    with torch.cuda.device(array.device):
        return torch.cuda.is_current_stream_capturing()


def check_known_before_capture(capturing: bool) -> None:
    """No CUDA graph is captured while the lookup tables of a new shape have to be made.

    The first call with a shape makes its tables, and waits for them, which a capture forbids.
    """
    if capturing:
        raise ValueError(
            "cu_seqlens (or the shapes that say the same) must have been used in a call before a "
            "CUDA graph is captured with them, got new ones during capture: make the same call "
            "once outside of it"
        )


def check_not_captured(array: Any) -> None:
    """`prefill` reads the lengths of the cache back to the host, which a capture forbids."""
    if is_captured(array):
        raise ValueError(
            "cache.lengths must be read by the host before prefill, got a call while a CUDA graph "
            "is captured: call prefill outside of it, or capture decode"
        )


def check_capturable(backend: str) -> None:
    """A CUDA graph of `decode` needs triton, whose kernels read the lengths on the device."""
    if backend != "triton":
        raise ValueError(
            f"backend must be 'triton' while a CUDA graph is captured, got {backend!r}"
        )
