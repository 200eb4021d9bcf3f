"""The choice of a backend, and how arrays are converted for it and back.

The choice is made here alone, by the name and the kind of array. No registry, environment variable
or list of priorities takes part in it, and no other backend replaces one that is missing.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal

import numpy as np

from msa import checks
from msa.interface import Backend
from msa.ir import Array, Output

BackendName = Literal["auto", "reference", "torch", "triton"]


def available_backends() -> tuple[str, ...]:
    """The backends whose libraries are installed.

    >>> "reference" in available_backends()
    True
    """
    return tuple(
        name
        for name, needed in (
            ("reference", ()),
            ("torch", ("torch",)),
            ("triton", ("torch", "triton")),
        )
        if all(importlib.util.find_spec(library) for library in needed)
    )


def resolve(backend: BackendName, array: Array) -> str:
    """The name of the backend; "auto" is triton for CUDA tensors, torch for others, else reference.

    Raises:
        ValueError: triton for anything but a CUDA tensor (R20).
    """
    if backend == "triton":
        checks.check_triton_device(array, checks.is_interpreted())
    if backend != "auto":
        return backend
    if not checks.is_torch(array):
        return "reference"
    return "triton" if array.is_cuda else "torch"


def load_backend(name: str) -> Backend:
    """The module of that name.

    Raises:
        ValueError: an unknown name, or a backend whose libraries are missing (R20).
    """
    checks.check_backend(name, available_backends())
    match name:
        case "reference":
            from msa import reference

            return reference
        case "torch":
            from msa import torch_impl

            return torch_impl
        case _:
            from msa import triton_impl

            return triton_impl


@dataclass(frozen=True)
class Carrier:
    """Converts arrays and forms to the backend's kind, and results to the caller's kind."""

    name: str
    model: Array
    """The argument whose kind, dtype and device the result has."""

    def exactly(self) -> AbstractContextManager[Any]:
        """A context without autocast, so that products keep the dtypes of the arguments."""
        if not checks.is_torch(self.model):
            return nullcontext()
        import torch

        device = self.model.device.type
        if not torch.is_autocast_enabled(device):
            return nullcontext()
        return torch.autocast(device, enabled=False)

    def take(self, **things: Any) -> list[Any]:
        """Arrays and forms of NumPy for the reference, of torch for the other backends."""
        if self.name != "reference":
            return [map_arrays(thing, _to_torch) for thing in things.values()]
        for name, thing in things.items():
            if checks.is_torch(thing):
                checks.check_no_gradient(name, thing)
        return [map_arrays(thing, _to_numpy) for thing in things.values()]

    def give(self, thing: Any) -> Any:
        """An array or a form of the caller's kind; an Output's out in the caller's dtype (R12)."""
        if not checks.is_torch(self.model):
            return map_arrays(thing, _to_numpy)
        thing = map_arrays(thing, lambda array: _to_torch(array).to(self.model.device))
        return (
            replace(thing, out=thing.out.to(self.model.dtype))
            if isinstance(thing, Output)
            else thing
        )


def map_arrays(thing: Any, change: Callable[[Array], Array]) -> Any:
    """Apply `change` to an array, or to every array in a form and in the forms inside it."""
    if hasattr(thing, "shape"):
        return change(thing)
    if not is_dataclass(thing) or isinstance(thing, type):
        return thing
    changed = {f.name: map_arrays(getattr(thing, f.name), change) for f in fields(thing)}
    return replace(thing, **changed)


def _to_numpy(array: Array) -> Any:
    if not checks.is_torch(array):
        return array
    if checks.dtype_name(array) in ("bfloat16", checks.EIGHT_BITS):
        array = array.float()  # NumPy has neither; float32 holds each value exactly
    return array.detach().cpu().numpy()


def _to_torch(array: Array) -> Any:
    if checks.is_torch(array):
        return array
    import torch

    return torch.from_numpy(np.array(array))
