"""What a plan is made of: the quick functions of Triton's interpreter keep one for each type.

At every operator the interpreter decides again which dtype the result has, which operand to convert
and how to broadcast. All of this follows from the types of the operands alone. So the first time
that a function sees these types, it goes the interpreter's way and keeps what came out: a plan.
From then on it follows the plan, which is one call of NumPy. A plan is kept only if it gives the
same bits, in the same layout, as the interpreter gave that first time; else the function goes the
interpreter's way each time.

Sums depend on the layout of an array in memory, so results must have the layout that they have in
the interpreter. NumPy broadcasts blocks as the interpreter does. Only one number beside a block can
end in another layout, if the block is transposed: then no plan is followed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

SEMANTIC = interpreter.interpreter_semantic
PLAIN = {"int1", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
         "fp16", "fp32", "fp64"}  # fmt: skip
"""Names of the dtypes that NumPy has; `astype` converts between them, except to int1."""
NUMBERS = {bool, int, float}
UNKNOWN = object()


def interpreted(member: Any) -> Callable[..., Any]:
    """The function of `triton.language` as the interpreter calls it."""
    return functools.partial(getattr(member, "__wrapped__", member), _semantic=SEMANTIC)


def fields_of(tensor: Any) -> Any:
    """What `tensor_of` needs to make a tensor of the same type."""
    return tensor.type, tensor.dtype, tensor.shape, tensor.numel


def tensor_of(data: Any, dtype: Any, fields: Any) -> Any:
    """An array of NumPy as a tensor of Triton, as both constructors would make it."""
    handle = object.__new__(interpreter.TensorHandle)
    handle.data, handle.dtype, handle.attr = data, dtype, {}
    made = object.__new__(tl.tensor)
    made.handle = handle
    made.type, made.dtype, made.shape, made.numel = fields
    return made


def same(left: Any, right: Any) -> bool:
    """Whether two arrays have the same bits and the same layout."""
    alike = left.dtype is right.dtype and left.shape == right.shape
    return alike and left.strides == right.strides and left.tobytes() == right.tobytes()


def constant(array: Any) -> Any:
    """A copy that nobody can write to."""
    array = array.copy()
    array.flags.writeable = False
    return array


def number_of(thing: Any) -> Any:
    """The number in a constexpr; anything else as it is."""
    return thing.value if type(thing) is tl.core.constexpr else thing


def planned(
    slow: Callable[..., Any], key_of: Callable[..., Any], plan_of: Callable[..., Any],
    follow: Callable[..., Any],
) -> Callable[..., Any]:  # fmt: skip
    """A function that follows a plan for each key.

    Args:
        slow: the interpreter's way; all functions take its arguments.
        key_of: what decides the plan; None where there cannot be one.
        plan_of: makes a plan from the result of the first call and its arguments, or gives None.
        follow: the result by a plan and the arguments, or UNKNOWN.
    """
    plans: dict[Any, Any] = {}

    def call(*args, **options):
        key = key_of(*args, **options)
        plan = plans.get(key, UNKNOWN) if key is not None else None
        if plan is UNKNOWN:
            result = slow(*args, **options)
            plans[key] = plan_of(result, *args, **options)
            return result
        result = UNKNOWN if plan is None else follow(plan, *args, **options)
        return slow(*args, **options) if result is UNKNOWN else result

    return call
