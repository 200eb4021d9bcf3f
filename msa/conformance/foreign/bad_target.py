"""The errors of `msa verify --target`: a function that cannot be tested, or a wrong result."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable
from typing import Any

from msa import checks


class BadTarget(ValueError):
    """The target cannot be tested: not found, not callable, or against its convention."""


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise BadTarget unless the value is one of the choices.

    >>> check_choice("convention", "jax", ["msa", "vllm"])
    Traceback (most recent call last):
    msa.conformance.foreign.bad_target.BadTarget: convention must be one of msa, vllm, got 'jax'
    """
    if value not in choices:
        raise BadTarget(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def find_target(target: str) -> Callable[..., Any]:
    """The function that "package.module:function" names. The current folder is searched too.

    Raises:
        BadTarget: the name has another form, the module or attribute does not exist, the attribute
            is not callable, or the module needs a library that is not installed.

    >>> find_target("math:gcd")(12, 18)
    6
    """
    name, colon, attribute = target.partition(":")
    if not (name and colon and attribute):
        raise BadTarget(f"target must be package.module:function, got {target!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")  # `python -m` adds the current folder, a console script does not
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name == missing or name.startswith(f"{missing}."):
            raise BadTarget(
                f"target must name a module that can be imported, got {name!r}: {error}"
            ) from error
        raise BadTarget(f"target {target} needs {missing}, which is not installed") from error
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise BadTarget(f"target must name an attribute of {name}, got {attribute!r}")
        found = getattr(found, part)
    if not callable(found):
        raise BadTarget(f"target must name something callable, got {target} = {checks.kind(found)}")
    return found


def check_result(name: str, array: Any, dims: str, shape: tuple[int, ...], kind: str) -> None:
    """Check the shape and kind of an array or tensor.

    Args:
        dims: the names of the dims, for the message.
        shape: the wanted shape; a dim of -1 may have any size.
        kind: "integer" or "floating".

    >>> import numpy as np
    >>> check_result("indices", np.zeros((2, 3)), "Hkv Tq", (2, 3), "integer")
    Traceback (most recent call last):
    msa.conformance.foreign.bad_target.BadTarget: indices must be integer, got float64
    >>> check_result("out", np.zeros((2, 3), complex), "Hkv Tq", (2, 3), "floating")
    Traceback (most recent call last):
    msa.conformance.foreign.bad_target.BadTarget: out must be floating, got complex128
    """
    names = dims.split()
    wanted = f"[{', '.join(names)}]"
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        raise BadTarget(f"{name} must be an array of shape {wanted}, got {checks.kind(array)}")
    got = tuple(array.shape)
    sizes = [n if n >= 0 else dim for n, dim in zip(shape, names)]
    agree = len(got) == len(shape) and all(n in (-1, g) for n, g in zip(shape, got))
    if not agree:
        listed = ", ".join(str(n) for n in sizes)
        raise BadTarget(f"{name} must have shape {wanted} = [{listed}], got {list(got)}")
    dtype = checks.dtype_name(array)
    if dtype not in (checks.INTEGER_DTYPES if kind == "integer" else checks.FLOAT_DTYPES):
        raise BadTarget(f"{name} must be {kind}, got {dtype}")


def failed_call(signature: str, error: Exception) -> BadTarget:
    """The error for a target whose first call raised an error."""
    return BadTarget(f"target must take the call {signature}, got {type(error).__name__}: {error}")
