"""What a GPU has and lacks, by family: the one place that says so.

A family is the GPUs that one compilation of a kernel serves: NVIDIA's compute capabilities, AMD's
gfx targets. `MISSING` says what happens without a feature; `msa doctor` and `msa explain` print it.
Sizes that differ within a family are read from the device (`chip_of`).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

KIB, MIB = 2**10, 2**20


@dataclass(frozen=True)
class Family:
    """GPUs that run the same compiled kernels, and what these may use."""

    name: str
    """The compute capability, or AMD's target."""
    examples: str
    shared: int
    """Bytes of shared memory (AMD: LDS) that one program may have."""
    operations_per_byte: int
    """Products of 16 bits over bytes of memory, both per second, of the first of the examples."""
    e4m3: bool = True
    """The instructions for numbers of 8 bits (e4m3) exist, or the compiler replaces them."""
    descriptors: bool = False
    """The bulk copy engine (TMA) exists."""
    dependent_launch: bool = False
    """A kernel can be set up while the one before it still runs."""
    hopper: bool = False
    """The Gluon kernels of msa/triton_impl/hopper run."""
    warp: int = 32
    """Threads of a warp (AMD: wavefront)."""

    @property
    def is_amd(self) -> bool:
        """Whether kernels are compiled by the AMD part of Triton."""
        return self.name.startswith("gfx")


FAMILIES = {
    family.name: family
    for family in (
        Family("8.0", "A100", 163 * KIB, 153, e4m3=False),
        Family("8.6", "A10, RTX 3090", 99 * KIB, 208, e4m3=False),
        Family("8.9", "L4, L40S, RTX 4090", 99 * KIB, 403),
        Family("9.0", "H100, H200", 227 * KIB, 295, descriptors=True, dependent_launch=True,
               hopper=True),
        Family("10.0", "B200", 227 * KIB, 281, descriptors=True, dependent_launch=True),
        Family("12.0", "RTX 5090", 99 * KIB, 117, descriptors=True, dependent_launch=True),
        Family("gfx942", "MI300X, MI325X", 64 * KIB, 247, warp=64),
        Family("gfx950", "MI355X", 160 * KIB, 314, warp=64),
    )
}  # fmt: skip
"""Sizes from the CUDA programming guide and AMD's data sheets; rates from the vendors' sheets."""

MISSING: dict[str, tuple[str, str]] = {
    "e4m3": (
        "numbers of 8 bits (e4m3)",
        "refused: index_dtype='fp8_e4m3' and pages of 8 bits, whose kernels do not compile; pages "
        "of 8 bits work with backend='torch'",
    ),
    "descriptors": (
        "bulk copies (TMA)",
        "replaced: kernels load tiles through pointers, with the same results",
    ),
    "dependent_launch": (
        "dependent launch",
        "replaced: the kernels of a decode step start one after the other, with the same results",
    ),
    "hopper": (
        "the hopper kernels",
        "replaced: kernels='auto' means the portable kernels; kernels='hopper' is refused",
    ),
}
"""Features that a family may lack: what each is called, and what happens without it."""

NEEDS = {
    "e4m3": "compute capability 8.9 or AMD's gfx942",
    "descriptors": "compute capability 9.0",
    "dependent_launch": "compute capability 9.0",
    "hopper": "compute capability 9.x",
}
"""The first GPUs that have a feature."""


def missing(family: Family) -> list[tuple[str, str]]:
    """What a family lacks, and what happens instead.

    >>> [name for name, _ in missing(FAMILIES["8.0"])][:2], missing(FAMILIES["9.0"])
    (['numbers of 8 bits (e4m3)', 'bulk copies (TMA)'], [])
    """
    return [words for feature, words in MISSING.items() if not getattr(family, feature)]


def family_of(capability: str) -> Family:
    """The family of a compute capability such as "8.6", or of AMD's target such as "gfx942".

    A GPU between two families belongs to the older one, of which it has all instructions. One that
    is older than all, or of an unknown target of AMD, is taken for the one with the least.

    >>> [family_of(c).name for c in ("8.7", "9.0", "10.3", "11.0", "gfx942:sramecc+", "gfx90a")]
    ['8.6', '9.0', '10.0', '10.0', 'gfx942', 'gfx90a']
    """
    target = capability.partition(":")[0]
    if target in FAMILIES:
        return FAMILIES[target]
    if target.startswith("gfx"):
        return replace(FAMILIES["gfx942"], name=target, examples="unknown", e4m3=False)
    wanted = as_numbers(target)
    older = [f for f in FAMILIES.values() if not f.is_amd and as_numbers(f.name) <= wanted]
    return older[-1] if older else FAMILIES["8.6"]


def as_numbers(capability: str) -> tuple[int, ...]:
    """A compute capability as numbers that can be compared.

    >>> as_numbers("10.0") > as_numbers("9.0")
    True
    """
    return tuple(map(int, capability.split(".")))


@dataclass(frozen=True)
class Chip:
    """One GPU: its family, and the sizes that differ within it."""

    family: Family
    model: str
    multiprocessors: int
    shared: int
    """Bytes of shared memory that one program may have."""
    l2: int
    """Bytes of the L2 cache."""


MEASURED = Chip(FAMILIES["9.0"], "NVIDIA H200", 132, 227 * KIB, 60 * MIB)
"""The GPU on which the numbers of the triton backend were measured. Triton's interpreter takes the
tiles and the shares of work of this one."""


@lru_cache(maxsize=64)
def chip_of(device: int) -> Chip:
    """The chip of a CUDA or ROCm device, by its number."""
    import torch

    found: Any = torch.cuda.get_device_properties(device)
    family = family_of(capability_of(found))
    return Chip(
        family, found.name, found.multi_processor_count,
        getattr(found, "shared_memory_per_block_optin", 0) or family.shared,
        getattr(found, "L2_cache_size", 0) or MEASURED.l2,
    )  # fmt: skip


def capability_of(properties: Any) -> str:
    """The compute capability of torch's device properties; AMD's target under ROCm, for which the
    numbers that torch gives mean something else: those of gfx942 are 9.4.
    """
    import torch

    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0]
    return f"{properties.major}.{properties.minor}"


def current() -> Chip:
    """The chip of the current device, to which the next launch goes.

    Without a GPU, in Triton's interpreter, it is the one that was measured.
    """
    import torch

    if not torch.cuda.is_initialized():
        return MEASURED
    return chip_of(torch.cuda.current_device())


def usual() -> Chip | None:
    """The current GPU, or None without a GPU or without torch."""
    try:
        torch: Any = importlib.import_module("torch")
    except Exception:  # a broken installation raises OSError, RuntimeError and others
        return None
    return chip_of(torch.cuda.current_device()) if torch.cuda.is_available() else None


def check_eight_bits(name: str, wanted: str, got: str, device: Any) -> None:
    """The GPU of a CUDA tensor has numbers of 8 bits."""
    chip = chip_of(device.index or 0)
    if not chip.family.e4m3:
        raise ValueError(
            f"{name} must be {wanted} for backend='triton' on a GPU without e4m3, which needs "
            f"{NEEDS['e4m3']}, got {got} on {chip.model} of {chip.family.name}"
        )
