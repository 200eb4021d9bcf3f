"""The rule of `kernels="auto"`: which kernels of the triton backend select the blocks.

    portable    the Triton kernels beside the spec's files: every shape, any GPU, the interpreter
    hopper      the Gluon kernels of msa/triton_impl/hopper: GPUs of compute capability 9.x, the
                shapes below; the same selection bit for bit, in less time
    auto        hopper where these kernels run, else portable

They were faster on every shape that was measured (docs/ladder.md), so there is no shape that they
take and that "auto" leaves to the portable ones. `choose` decides, and nothing else does: `msa
explain` prints its rule, and benchmarks write its answer into their results.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from msa.checks import dtype_name, either, is_interpreted, is_torch
from msa.config import MSAConfig
from msa.ir import Array

Kernels = Literal["auto", "portable", "hopper"]

CAPABILITY = 9
"""The major number of the compute capability whose instructions the kernels use."""
TRITON = (3, 6)
"""The first release of triton whose Gluon compiles them."""
DTYPES = ("float16", "bfloat16")
INDEX_DIMS = (64, 128)
BLOCK_SIZES = (64, 128)
"""With larger blocks the products do not fit into the registers of a consumer."""
LARGEST_GROUPS = 256
"""A tile has so many rows, and holds at least one query of all groups."""
LARGEST_PLACES = 64
"""Blocks of a row that are not forced. So many scores stay in the registers of a thread."""


@dataclass(frozen=True)
class Call:
    """What the choice depends on."""

    q_dtype: str
    k_dtype: str
    index_dim: int
    groups: int
    block_size: int
    places: int
    """top_k less the forced blocks."""
    device: str
    capability: tuple[int, int] | None
    """None where the device is not a CUDA device."""
    triton: str | None
    """The version of triton; None where there is none."""
    interpreted: bool
    """Whether kernels run in Triton's interpreter."""


def call_of(q_idx: Array, k_idx: Array, config: MSAConfig) -> Call:
    """What the choice depends on, for these arguments of a selection."""
    on_gpu = is_torch(q_idx) and q_idx.is_cuda
    return Call(
        q_dtype=dtype_name(q_idx),
        k_dtype=dtype_name(k_idx),
        index_dim=q_idx.shape[-1],
        groups=q_idx.shape[-2],
        block_size=config.block_size,
        places=config.top_k - config.forced_blocks,
        device=str(q_idx.device) if is_torch(q_idx) else "the CPU",
        capability=capability_of(q_idx.device.index) if on_gpu else None,
        triton=triton_version(),
        interpreted=is_interpreted(),
    )


def usual_call() -> Call:
    """The usual shape of this machine: bfloat16, 4 groups, Di = 128, and the default config."""
    config, capability = MSAConfig(), None
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError:
        torch = None
    if torch is not None and torch.cuda.is_available():
        capability = capability_of(torch.cuda.current_device())
    return Call(
        q_dtype="bfloat16",
        k_dtype="bfloat16",
        index_dim=128,
        groups=4,
        block_size=config.block_size,
        places=config.top_k - config.forced_blocks,
        device="the CPU" if capability is None else "the current GPU",
        capability=capability,
        triton=triton_version(),
        interpreted=is_interpreted(),
    )


@lru_cache(maxsize=64)
def capability_of(device: int) -> tuple[int, int]:
    """The compute capability of a CUDA device."""
    import torch

    return torch.cuda.get_device_capability(device)


@lru_cache(maxsize=1)
def triton_version() -> str | None:
    """The version of triton, or None where it cannot be imported."""
    try:
        triton: Any = importlib.import_module("triton")
    except ImportError:
        return None
    return triton.__version__


def is_older(version: str, than: tuple[int, int]) -> bool:
    """Whether a version such as "3.6.0+git1" is older than a release.

    >>> is_older("3.5.1", (3, 6)), is_older("3.6.0+git1", (3, 6)), is_older("4.0", (3, 6))
    (True, False, False)
    """
    major, minor, *_ = version.split(".")
    return (int(major), int(minor)) < than


def obstacle(call: Call) -> TypeError | ValueError | None:
    """Why the hopper kernels cannot take a call: the argument, what is wanted, what came (R20).

    None if they can.
    """

    def must(name: str, wanted: str, got: object, do: str = "use kernels='portable'") -> str:
        return f"{name} must {wanted} for kernels='hopper', got {got}: {do}"

    for name, dtype in (("q_idx", call.q_dtype), ("k_idx", call.k_dtype)):
        if dtype not in DTYPES:
            return TypeError(must(name, f"have dtype {either(DTYPES)}", dtype))
    if call.k_dtype != call.q_dtype:
        return TypeError(must("k_idx", f"have dtype {call.q_dtype} as q_idx has", call.k_dtype))
    if call.index_dim not in INDEX_DIMS:
        return ValueError(must("q_idx", f"have Di = {either(INDEX_DIMS)}", call.index_dim))
    if call.block_size not in BLOCK_SIZES:
        return ValueError(must("block_size", f"be {either(BLOCK_SIZES)}", call.block_size))
    if call.groups > LARGEST_GROUPS:
        return ValueError(must("q_idx", f"have at most {LARGEST_GROUPS} groups", call.groups))
    if call.places > LARGEST_PLACES:
        least = f"be at most {LARGEST_PLACES} more than sink_blocks + local_blocks"
        return ValueError(must("top_k", least, f"{call.places} more"))
    if call.capability is None or call.capability[0] != CAPABILITY:
        got = call.device
        if call.capability is not None:
            got += " of {}.{}".format(*call.capability)
        return ValueError(must("q_idx", f"be on a GPU of compute capability {CAPABILITY}.x", got))
    if call.interpreted:
        unset = "unset it before Python starts, or use kernels='portable'"
        return ValueError(must("TRITON_INTERPRET", "not be set", "'1'", unset))
    if call.triton is None or is_older(call.triton, TRITON):
        least = "be {}.{} or newer".format(*TRITON)
        return ValueError(must("the version of triton", least, call.triton))
    return None


def choose(kernels: Kernels, call: Call) -> Literal["portable", "hopper"]:
    """The kernels that select the blocks of a call.

    Raises:
        TypeError, ValueError: "hopper" is named, and these kernels cannot take the call (R20).
    """
    if kernels == "portable":
        return "portable"
    found = obstacle(call)
    if found is None:
        return "hopper"
    if kernels == "hopper":
        raise found
    return "portable"


def rule() -> list[tuple[str, str]]:
    """What a call must have for the hopper kernels, as pairs of a name and the wanted values."""
    return [
        ("compute capability", f"{CAPABILITY}.x, not in Triton's interpreter"),
        ("triton", "{}.{} or newer".format(*TRITON)),
        ("dtype of q_idx and k_idx", either(DTYPES)),
        ("Di", either(INDEX_DIMS)),
        ("block_size", either(BLOCK_SIZES)),
        ("groups", f"at most {LARGEST_GROUPS}"),
        ("top_k less the forced blocks", f"at most {LARGEST_PLACES}"),
    ]
