"""The backends that can be tested on this machine, called with NumPy arrays.

A `Subject` is a module of functions (`msa.interface.Backend`), the array library that it needs, and
the part of the rules that it claims to follow. A property gives it NumPy arrays and forms, and gets
the same back. So one property is written once for all backends, and for functions of your own:

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

from msa import checks, kernel_choice
from msa.checks import is_torch
from msa.conformance.tolerances import HOPPER, PRECISIONS, MatrixUnit, Precision
from msa.dispatch import load_backend, map_arrays
from msa.interface import Backend
from msa.ir import Array

REFERENCE: Any = load_backend("reference")
"""The spec. Its type is Any because it also has mask_of, which is not in the contract."""

STAGES = tuple(name for name in vars(Backend) if not name.startswith("_"))
"""The names of the functions of the contract."""

OPTIONS = frozenset({"loop_order", "index_dtype", "left_padding", "streams", "devices", "graphs"})
"""What a backend may claim beyond the contract.

Keyword arguments: loop_order of attend_selection and prefill_chunk ("auto", "kv_outer", "union");
index_dtype ("fp8_e4m3") and left_padding (a number of rubbish tokens before each row) of
select_fused.
Places (R21): CUDA streams, several CUDA devices, attention and decoding in a CUDA graph.
"""

LARGEST_TOP_K: int = getattr(checks, "LARGEST_TOP_K", 16384)
KERNEL_TOP_K: int = getattr(checks, "KERNEL_TOP_K", 1024)


@dataclass(frozen=True)
class Domain:
    """What a backend claims to support. Strategies draw only such cases, so no case is skipped."""

    dtypes: tuple[str, ...] = ("float64", "float32", "float16", "bfloat16")
    block_sizes: tuple[int, ...] | None = None
    """None means any block size from 1."""
    dims: tuple[int, ...] | None = None
    """Sizes of D, Dv and Di. None means any size from 1."""
    missing: frozenset[str] = frozenset()
    """Names that this backend does not implement: functions of the contract, and these abilities:
    "backward" (R18), "api" (R20), "lse" (R10), "tensors" (torch is installed), "threads" (R21) and
    "eight_bits" (R12)."""
    options: frozenset[str] = frozenset()
    """The names in OPTIONS that this backend supports. A property can need them."""
    product_roundoff: dict[str, float] | None = None
    """The roundoff of products, for dtypes where it is coarser than float32, as with TF32."""
    units: dict[str, MatrixUnit] | None = None
    """The matrix unit, for dtypes whose products are added by one, as tensor cores do."""
    largest_top_k: int = LARGEST_TOP_K
    """The most blocks that a query may keep."""
    sinks: bool = True
    """Whether sink blocks, the first blocks of a sequence, can be forced."""
    more_local: bool = True
    """Whether more local blocks than the own block can be forced."""
    full_rows: bool = False
    """Whether a Selection must give each query min(k, visible blocks) of them."""
    cost: int = 1
    """The number of examples is divided by this, where one example takes long."""

    def precision(self, dtype: str) -> Precision:
        """The roundoffs of one dtype, from which the error budget is computed."""
        known = replace(PRECISIONS[dtype], unit=(self.units or {}).get(dtype))
        work = (self.product_roundoff or {}).get(dtype)
        return known if work is None else replace(known, work=work)

    def has(self, *needed: str) -> bool:
        """Whether the backend claims all of these functions, abilities, options and dtypes.

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
    kernels: str = ""
    """The kernels to name in calls that take this option; empty leaves the option out."""

    @property
    def backend(self) -> str:
        """The name that public functions know: "triton" for "triton-hopper-walk"."""
        return self.name.partition("-")[0]

    def public(self, function: str) -> dict[str, Any]:
        """The arguments by which a public function uses this backend."""
        return {"backend": self.backend} | self.option(function)

    def loop_orders(self, group: int) -> tuple[str, ...]:
        """The loop orders that attend_selection takes with so many query heads in a group."""
        some = self.kernels == "hopper" and group not in kernel_choice.CHUNK_GROUPS
        return ("auto", "union") if some else ("auto", "kv_outer", "union")

    def option(self, function: str) -> dict[str, Any]:
        """The kernels to name, if the function takes this option."""
        takes = ("attention", "select", "sparse_attention", "align_index", "prefill", "decode",
                 "attend", "select_fused", "attend_selection", "prefill_chunk",
                 "decode_step")  # fmt: skip
        return {"kernels": self.kernels} if self.kernels and function in takes else {}

    @property
    def label(self) -> str:
        """The name in tables and tests."""
        return self.name if self.device == "cpu" else f"{self.name}-{self.device}"

    def run(self, function: str, *args: Any, cast: str, **options: Any) -> Any:
        """Call a function of the contract. Floats go in as dtype `cast`; NumPy arrays come out."""
        given = [self.give(thing, cast) for thing in args]
        options = self.option(function) | options
        return self.read(getattr(self.module, function)(*given, **options))

    def give(self, thing: Any, dtype: str) -> Any:
        """Convert an array, or the arrays in a form, to this backend's kind of array."""
        return map_arrays(thing, lambda array: self._give_array(array, dtype))

    def _give_array(self, array: Array, dtype: str) -> Any:
        floating = array.dtype.kind == "f"
        if self.kind == "numpy":  # NumPy has no bfloat16; float64 holds the same values
            known = "float64" if dtype == "bfloat16" else dtype
            return array.astype(known) if floating else array
        import torch

        tensor = torch.from_numpy(np.array(array)).to(self.device)
        return tensor.to(self.dtype(dtype)) if floating else tensor

    def read(self, thing: Any) -> Any:
        """Convert back to NumPy. bfloat16 becomes float32, which holds each of its values."""
        return map_arrays(thing, _to_numpy)

    def dtype(self, name: str) -> Any:
        """The dtype object of this name, such as np.float32 or torch.float32."""
        if self.kind == "numpy":
            return np.dtype(name)
        import torch

        return getattr(torch, name)


def _to_numpy(array: Any) -> Array:
    if not is_torch(array):
        return array
    array = array.detach().cpu()
    return (array.float() if str(array.dtype) == "torch.bfloat16" else array).numpy()


# -- the backends of this machine -----------------------------------------------------------------
NUMPY_DTYPES = ("float64", "float32", "float16")


def reference_subject() -> list[Subject]:
    """The reference. It has no bfloat16, because NumPy has none, and no backward."""
    no_tensors = () if importlib.util.find_spec("torch") else ("tensors",)
    domain = Domain(dtypes=NUMPY_DTYPES, missing=frozenset({"backward", "eight_bits", *no_tensors}))
    return [Subject("reference", REFERENCE, "numpy", domain)]


def torch_subjects() -> list[Subject]:
    """The torch backend on the CPU, and also on a GPU if there is one."""
    if not importlib.util.find_spec("torch"):
        return []
    module = load_backend("torch")
    found = [Subject("torch", module, "torch")]
    if cuda_here():
        domain = Domain(options=cuda_places())
        found.append(Subject("torch", module, "torch", domain, "cuda"))
    return found


def triton_subjects() -> list[Subject]:
    """The kernels on a GPU, or in Triton's interpreter if TRITON_INTERPRET=1 was set before import.

    These are the portable kernels; those for Hopper are the subject "triton-hopper". In the
    interpreter neither bfloat16 nor threads are claimed: it multiplies bfloat16 wrongly, and it
    keeps the id of the running program in global variables.
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
    device = "cpu" if interpreted else "cuda"
    return [Subject("triton", module, "torch", domain, device, kernels="portable")]


def hopper_subjects() -> list[Subject]:
    """The triton backend with its kernels for Hopper, where a GPU can run them.

    "triton-hopper" selects with them, in all sizes that the selection takes. "triton-hopper-walk"
    attends to a selection with them, in the one head size and block size that they have.
    "triton-hopper-pages" decodes, with scores by them. The rest is left to the subject "triton".
    """
    if not any(subject.device == "cuda" for subject in triton_subjects()):
        return []
    if kernel_choice.obstacle(kernel_choice.usual_call()) is not None:
        return []
    selecting = {"score_blocks", "select_blocks", "select_fused", "attend", "prefill_chunk"}
    domain = Domain(
        dtypes=kernel_choice.DTYPES,
        block_sizes=kernel_choice.BLOCK_SIZES,
        dims=kernel_choice.INDEX_DIMS,
        missing=frozenset(STAGES) - selecting | {"backward", "eight_bits"},
        options=frozenset({"index_dtype", "graphs"}) | cuda_places(),
        units=HOPPER,
        largest_top_k=kernel_choice.LARGEST_PLACES + 1,  # one block at least is forced
        cost=6,
    )
    walking = {"attend_selection", "attend", "prefill_chunk"}
    walk_domain = replace(
        domain,
        dims=(kernel_choice.WALK_DIM,),
        block_sizes=(kernel_choice.WALK_BLOCK_SIZE,),
        missing=frozenset(STAGES) - walking | {"eight_bits"},
        options=frozenset({"loop_order", "graphs"}) | cuda_places(),
    )
    page_domain = replace(
        domain,
        missing=frozenset(STAGES) - {"decode_step"} | {"backward", "eight_bits", "api"},
        options=frozenset(),
        largest_top_k=KERNEL_TOP_K,
    )
    module = load_backend("triton")
    return [
        Subject(name, module, "torch", part, "cuda", kernels="hopper")
        for name, part in (
            ("triton-hopper", domain),
            ("triton-hopper-walk", walk_domain),
            ("triton-hopper-pages", page_domain),
        )
    ]


def cuda_here() -> bool:
    """Whether torch sees a GPU."""
    import torch

    return torch.cuda.is_available()


def cuda_places() -> frozenset[str]:
    """The places to test on GPUs: streams, and with two GPUs also several devices."""
    import torch

    return frozenset({"streams", "devices"} if torch.cuda.device_count() > 1 else {"streams"})


FINDERS: dict[str, Callable[[], list[Subject]]] = {
    "reference": reference_subject,
    "torch": torch_subjects,
    "triton": triton_subjects,
    "triton-hopper": hopper_subjects,
}


def subjects(names: tuple[str, ...] = ()) -> tuple[Subject, ...]:
    """All backends that can be tested on this machine, or those of the given names.

    Raises:
        ValueError: a name is unknown, or its backend does not run on this machine.
    """
    for name in names:
        if name not in FINDERS:
            raise ValueError(f"backend must be one of {', '.join(FINDERS)}, got {name!r}")
    found = [s for name, find in FINDERS.items() if not names or name in names for s in find()]
    absent = set(names) - {s.name for s in found}
    if absent:
        raise ValueError(
            f"backend must be one that runs here ({', '.join(s.name for s in subjects())}), "
            f"got {', '.join(sorted(absent))}; triton needs a GPU, or TRITON_INTERPRET=1, and "
            f"triton-hopper a GPU of compute capability {kernel_choice.CAPABILITY}.x"
        )
    return tuple(found)


def as_module(functions: dict[str, Callable[..., Any]], like: Any = REFERENCE) -> Any:
    """A backend made of your functions; it takes all other functions from `like`."""
    made = ModuleType("functions under test")
    vars(made).update({name: getattr(like, name) for name in STAGES if hasattr(like, name)})
    vars(made).update(functions)
    return made
