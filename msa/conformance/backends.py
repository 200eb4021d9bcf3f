"""The backends that can be tried here, spoken to in NumPy.

A `Subject` is a module of functions (`msa.interface.Backend`), the array library that it wants, and
the part of the rules that it claims. Properties give it NumPy arrays and forms and get the same
back, so that one property reads alike for all of them, and for functions of your own:

    Subject("mine", my_module, kind="torch", domain=Domain(missing=frozenset({"api", "backward"})))
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Literal

import numpy as np

from msa import checks
from msa.checks import is_torch
from msa.conformance.tolerances import HOPPER, PRECISIONS, MatrixUnit, Precision
from msa.dispatch import load_backend, map_arrays
from msa.interface import Backend
from msa.ir import Array

REFERENCE: Any = load_backend("reference")
"""The spec; Any, because it also has mask_of, which the contract does not ask for."""

STAGES = tuple(name for name in vars(Backend) if not name.startswith("_"))
"""The names of the functions of the contract."""

OPTIONS = frozenset({"loop_order", "index_dtype", "left_padding", "streams", "devices", "graphs"})
"""What a backend may claim beyond the contract. Keywords: loop_order of attend_selection ("auto",
"kv_outer", "union"), and index_dtype ("fp8_e4m3") and left_padding (tokens of rubbish before each
row) of select_fused. Places (R21): CUDA streams, several CUDA devices, decode_step in a graph."""


LARGEST_TOP_K: int = getattr(checks, "LARGEST_TOP_K", 16384)
KERNEL_TOP_K: int = getattr(checks, "KERNEL_TOP_K", 1024)


@dataclass(frozen=True)
class Domain:
    """What a backend claims. Strategies draw only from it; nothing is drawn and then skipped."""

    dtypes: tuple[str, ...] = ("float64", "float32", "float16", "bfloat16")
    block_sizes: tuple[int, ...] | None = None
    """None: any from 1."""
    dims: tuple[int, ...] | None = None
    """Sizes of D, Dv and Di; None: any from 1."""
    missing: frozenset[str] = frozenset()
    """Functions of the contract that are not there, "backward" (R18), "api" (R20), "lse" (R10),
    "tensors" (torch is installed), "threads" (R21) or "eight_bits" (R12) among them."""
    options: frozenset[str] = frozenset()
    """Of OPTIONS, those that it takes: what a property then needs beside the functions."""
    product_roundoff: dict[str, float] | None = None
    """For dtypes whose products are rounded more coarsely than float32, as TF32 does."""
    units: dict[str, MatrixUnit] | None = None
    """For dtypes whose products a matrix unit adds, as tensor cores do."""
    largest_top_k: int = LARGEST_TOP_K
    """The most blocks that a query may keep."""
    sinks: bool = True
    """Whether the first blocks can be forced."""
    more_local: bool = True
    """Whether more than the own block can be forced."""
    full_rows: bool = False
    """Whether a Selection must give each query min(k, visible blocks) of them."""
    cost: int = 1
    """How many times fewer examples are worth their time, as in an interpreter."""

    def precision(self, dtype: str) -> Precision:
        """The roundoffs that the error budget is made of."""
        known = replace(PRECISIONS[dtype], unit=(self.units or {}).get(dtype))
        work = (self.product_roundoff or {}).get(dtype)
        return known if work is None else replace(known, work=work)

    def has(self, *needed: str) -> bool:
        """Whether all of these functions, options and dtypes are claimed.

        >>> Domain(dtypes=("float32",)).has("attend"), Domain(dtypes=("float32",)).has("float64")
        (True, False)
        """
        absent = self.missing | (OPTIONS - self.options) | (set(PRECISIONS) - set(self.dtypes))
        return not absent.intersection(needed)


@dataclass(frozen=True)
class Subject:
    """A backend on one device, called with NumPy arrays and forms."""

    name: str
    module: Any
    kind: Literal["numpy", "torch"]
    domain: Domain = Domain()
    device: str = "cpu"

    @property
    def label(self) -> str:
        """For tables and test names."""
        return self.name if self.device == "cpu" else f"{self.name}-{self.device}"

    def run(self, function: str, *args: Any, cast: str, **options: Any) -> Any:
        """Call a function of the contract; floats go in as dtype `cast`, NumPy comes out."""
        given = [self.give(thing, cast) for thing in args]
        return self.read(getattr(self.module, function)(*given, **options))

    def give(self, thing: Any, dtype: str) -> Any:
        """An array, or a form with arrays in it, as this backend wants it; the rest unchanged."""
        return map_arrays(thing, lambda array: self._give_array(array, dtype))

    def _give_array(self, array: Array, dtype: str) -> Any:
        floating = array.dtype.kind == "f"
        if self.kind == "numpy":  # which has no bfloat16: the values are all that counts
            known = "float64" if dtype == "bfloat16" else dtype
            return array.astype(known) if floating else array
        import torch

        tensor = torch.from_numpy(np.array(array)).to(self.device)
        return tensor.to(self.dtype(dtype)) if floating else tensor

    def read(self, thing: Any) -> Any:
        """The way back; bfloat16 becomes float32, which holds each of its values."""
        return map_arrays(thing, _to_numpy)

    def dtype(self, name: str) -> Any:
        """np.float32 or torch.float32, for the one argument of the contract that is a dtype."""
        if self.kind == "numpy":
            return np.dtype(name)
        import torch

        return getattr(torch, name)


def _to_numpy(array: Any) -> Array:
    if not is_torch(array):
        return array
    array = array.detach().cpu()
    return (array.float() if str(array.dtype) == "torch.bfloat16" else array).numpy()


# -- which are here -------------------------------------------------------------------------------
NUMPY_DTYPES = ("float64", "float32", "float16")


def reference_subject() -> list[Subject]:
    """The spec under its own test: NumPy has no bfloat16, and the spec no backward."""
    no_tensors = () if importlib.util.find_spec("torch") else ("tensors",)
    domain = Domain(dtypes=NUMPY_DTYPES, missing=frozenset({"backward", "eight_bits", *no_tensors}))
    return [Subject("reference", REFERENCE, "numpy", domain)]


def torch_subjects() -> list[Subject]:
    """On the CPU, and on a GPU where there is one."""
    if not importlib.util.find_spec("torch"):
        return []
    module = load_backend("torch")
    found = [Subject("torch", module, "torch")]
    if cuda_here():
        domain = Domain(options=cuda_places())
        found.append(Subject("torch", module, "torch", domain, "cuda"))
    return found


def triton_subjects() -> list[Subject]:
    """On a GPU; else in Triton's interpreter, if TRITON_INTERPRET=1 was set before its import.

    The interpreter multiplies bfloat16 wrongly, and keeps the place of the program that it runs in
    global variables: there neither bfloat16 nor threads are claimed.
    """
    if not all(importlib.util.find_spec(name) for name in ("torch", "triton", "msa.triton_impl")):
        return []
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not (interpreted or cuda_here()):
        return []
    module = load_backend("triton")
    domain = Domain(
        dtypes=("float32", "float16") if interpreted else ("float32", "float16", "bfloat16"),
        block_sizes=(16, 32) if interpreted else (16, 32, 64, 128, 256),
        missing=frozenset({"threads"}) if interpreted else frozenset(),
        options=frozenset({"loop_order"})
        if interpreted
        else frozenset({"loop_order", "index_dtype", "graphs"}) | cuda_places(),
        units=None if interpreted else HOPPER,
        largest_top_k=KERNEL_TOP_K,
        cost=3 if interpreted else 6,
    )
    return [Subject("triton", module, "torch", domain, "cpu" if interpreted else "cuda")]


def cuda_here() -> bool:
    """Whether torch sees a GPU."""
    import torch

    return torch.cuda.is_available()


def cuda_places() -> frozenset[str]:
    """Streams on one GPU, and other devices than the current one where there are two."""
    import torch

    return frozenset({"streams", "devices"} if torch.cuda.device_count() > 1 else {"streams"})


FINDERS: dict[str, Callable[[], list[Subject]]] = {
    "reference": reference_subject,
    "torch": torch_subjects,
    "triton": triton_subjects,
}


def subjects(names: tuple[str, ...] = ()) -> tuple[Subject, ...]:
    """All that can be tried here, or those of the given names.

    Raises:
        ValueError: a name that is unknown, or that nothing here answers to.
    """
    for name in names:
        if name not in FINDERS:
            raise ValueError(f"backend must be one of {', '.join(FINDERS)}, got {name!r}")
    found = [s for name, find in FINDERS.items() if not names or name in names for s in find()]
    absent = set(names) - {s.name for s in found}
    if absent:
        raise ValueError(
            f"backend must be one that runs here ({', '.join(s.name for s in subjects())}), "
            f"got {', '.join(sorted(absent))}; triton needs a GPU, or TRITON_INTERPRET=1"
        )
    return tuple(found)


def as_module(functions: dict[str, Callable[..., Any]], like: Any = REFERENCE) -> Any:
    """A backend whose other functions are those of `like`: for one function of your own."""
    made = ModuleType("functions under test")
    vars(made).update({name: getattr(like, name) for name in STAGES if hasattr(like, name)})
    vars(made).update(functions)
    return made
