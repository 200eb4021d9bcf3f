"""Functions of Triton's interpreter that make, move and join blocks: one call of NumPy each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import quick_plans
import triton.language as tl
from quick_plans import NUMBERS, PLAIN, SEMANTIC, constant, fields_of, number_of, tensor_of
from triton.runtime import interpreter

FULL = slice(None)


def quick_functions() -> dict[Any, Callable[..., Any]]:
    """For functions of `triton.language`: what the interpreter shall call instead."""
    made = {
        tl.tensor.__getitem__: (index_key, index_plan, index),
        tl.tensor.to: (cast_key, cast_plan, cast),
        tl.load: (load_key, load_plan, load),
        tl.store: (store_key, store_plan, store),
        tl.where: (where_key, where_plan, where),
        tl.dot: (dot_key, dot_plan, dot),
        tl.arange: (arange_key, arange_plan, arange),
    }
    return {
        member: quick_plans.planned(quick_plans.interpreted(member), *parts)
        for member, parts in made.items()
    }


def spread(array: Any, shape: tuple[int, ...]) -> Any:
    """A view of the given shape."""
    return array if array.shape == shape else np.broadcast_to(array, shape)


# -- tensor.to(dtype) -----------------------------------------------------------------------------
def cast_key(tensor: Any, dtype: Any, **options: Any) -> Any:
    """Both dtypes; no other way of rounding is planned."""
    return None if options or type(dtype) is not tl.dtype else (tensor.type.name, dtype.name)


def cast_plan(result: Any, tensor: Any, dtype: Any) -> Any:
    """NumPy's dtype and the type of the result; nothing if the tensor stays as it is."""
    if result is tensor:
        return ()
    if not {tensor.dtype.name, dtype.name} <= PLAIN or dtype == tl.int1:
        return None
    return interpreter._get_np_dtype(dtype), fields_of(result)


def cast(plan: Any, tensor: Any, dtype: Any) -> Any:
    """The numbers converted by NumPy, as the interpreter does it."""
    return tensor_of(tensor.handle.data.astype(plan[0]), dtype, plan[1]) if plan else tensor


# -- tensor[:, None] ------------------------------------------------------------------------------
def index_key(tensor: Any, slices: Any) -> Any:
    """The type and where the new axes are."""
    if type(slices) is not tuple or not all([s is None or s == FULL for s in slices]):
        return None
    return tensor.type.name, tuple([s is None for s in slices])


def index_plan(result: Any, tensor: Any, slices: Any) -> Any:
    """The type of the result and its shape; a single number is copied, not viewed."""
    return (fields_of(result), result.handle.data.shape) if tensor.type.is_block() else None


def index(plan: Any, tensor: Any, slices: Any) -> Any:
    """A view with more axes."""
    fields, shape = plan
    return tensor_of(tensor.handle.data.reshape(shape), tensor.handle.dtype.scalar, fields)


# -- tl.load --------------------------------------------------------------------------------------
def load_key(pointer: Any, mask: Any = None, other: Any = None, **options: Any) -> Any:
    """The types, and the number that stands for what is masked."""
    other = number_of(other)
    if other is not None and type(other) not in NUMBERS:
        return None
    kind = None if mask is None else mask.type.name
    return (pointer.type.name, kind, type(other), repr(other), *options.items())


def load_plan(result: Any, pointer: Any, mask: Any = None, other: Any = None, **_: Any) -> Any:
    """The type of what is loaded, and the arrays that are the same at each load."""
    dtype, data = pointer.dtype.element_ty, result.handle.data
    if dtype.name not in PLAIN or dtype == tl.int1 or pointer.handle.data.shape != data.shape:
        return None
    filled = np.zeros(data.shape, data.dtype)
    if other is not None:
        filled[...] = SEMANTIC.cast(SEMANTIC.to_tensor(other), dtype).handle.data
    everywhere = np.ones(data.shape, bool)
    return fields_of(result), result.handle.dtype, data.dtype, everywhere, filled


def load(plan: Any, pointer: Any, mask: Any = None, other: Any = None, **_: Any) -> Any:
    """What the interpreter reads at these addresses."""
    fields, of, dtype, everywhere, filled = plan
    places = everywhere if mask is None else spread(mask.handle.data, filled.shape)
    data = interpreter._interpreter.load(pointer.handle.data, places, filled, dtype)
    return tensor_of(data, of, fields)


# -- tl.store -------------------------------------------------------------------------------------
def store_key(pointer: Any, value: Any, mask: Any = None, **options: Any) -> Any:
    """The types."""
    if type(value) is not tl.tensor or options:
        return None
    return pointer.type.name, value.type.name, None if mask is None else mask.type.name


def store_plan(result: Any, pointer: Any, value: Any, mask: Any = None) -> Any:
    """A mask of every place, and the dtype to convert to, if any."""
    dtype = pointer.dtype.element_ty
    if not {dtype.name, value.dtype.name} <= PLAIN or tl.int1 in (dtype, value.dtype):
        return None
    to = None if dtype == value.dtype else interpreter._get_np_dtype(dtype)
    return constant(np.ones(pointer.handle.data.shape, bool)), to


def store(plan: Any, pointer: Any, value: Any, mask: Any = None) -> None:
    """The interpreter writes to these addresses."""
    everywhere, to = plan
    data = value.handle.data if to is None else value.handle.data.astype(to)
    places = everywhere if mask is None else spread(mask.handle.data, everywhere.shape)
    interpreter._interpreter.store(pointer.handle.data, spread(data, everywhere.shape), places)


# -- tl.where -------------------------------------------------------------------------------------
def where_key(condition: Any, x: Any, y: Any) -> Any:
    """The types, and the numbers among the operands."""
    sides = condition, number_of(x), number_of(y)
    return tuple([s.type.name if type(s) is tl.tensor else (type(s), repr(s)) for s in sides])


def where_plan(result: Any, condition: Any, x: Any, y: Any) -> Any:
    """The numbers as arrays and the type of the result; None if an operand is converted."""
    if type(condition) is not tl.tensor or condition.dtype != tl.int1:
        return None
    sides, numbers = (number_of(x), number_of(y)), []
    converted = SEMANTIC.binary_op_type_checking_impl(*sides, True, True)
    for side, made in zip(sides, converted):
        if type(side) in NUMBERS:
            numbers.append(constant(made.handle.data))
        elif type(side) is tl.tensor and side.dtype == made.dtype:
            numbers.append(None)
        else:
            return None
    tensors = [condition, *(side for side in sides if type(side) is tl.tensor), *converted]
    mixed = len({side.type.is_block() for side in tensors}) > 1
    of = None if numbers[1] is None else converted[1].handle.dtype.scalar
    plan = *numbers, fields_of(result), result.handle.data.dtype, of, mixed
    found = where(plan, condition, *sides)
    agree = found is not quick_plans.UNKNOWN and quick_plans.same(
        found.handle.data, result.handle.data
    )
    return plan if agree else None


def where(plan: Any, condition: Any, x: Any, y: Any) -> Any:
    """One of two numbers at each place; UNKNOWN for a number and a block that is not in C order."""
    x_number, y_number, fields, dtype, of, mixed = plan
    arrays = (
        condition.handle.data,
        x.handle.data if x_number is None else x_number,
        y.handle.data if y_number is None else y_number,
    )
    if mixed and not all([array.flags.c_contiguous for array in arrays]):
        return quick_plans.UNKNOWN
    data = np.where(*arrays)
    if data.dtype is not dtype:
        return quick_plans.UNKNOWN
    return tensor_of(data, of or y.handle.dtype.scalar, fields)


# -- tl.dot ---------------------------------------------------------------------------------------
def dot_key(a: Any, b: Any, acc: Any = None, **options: Any) -> Any:
    """The types."""
    return a.type.name, b.type.name, None if acc is None else acc.type.name, *options.items()


def dot_plan(result: Any, a: Any, b: Any, acc: Any = None, **_: Any) -> Any:
    """The type of the product and what is added to it; None if operands are converted."""
    data = result.handle.data
    if not {a.dtype.name, b.dtype.name} <= PLAIN or (acc is not None and acc.dtype != result.dtype):
        return None
    plan = fields_of(result), result.handle.dtype, constant(np.zeros(data.shape, data.dtype))
    return plan if quick_plans.same(dot(plan, a, b, acc).handle.data, data) else None


def dot(plan: Any, a: Any, b: Any, acc: Any = None, **_: Any) -> Any:
    """The product of two blocks, plus a third one or zero."""
    fields, of, zeros = plan
    d = zeros if acc is None else acc.handle.data
    return tensor_of(np.matmul(a.handle.data, b.handle.data, dtype=d.dtype) + d, of, fields)


# -- tl.arange ------------------------------------------------------------------------------------
def arange_key(start: Any, end: Any) -> Any:
    """Both ends."""
    return number_of(start), number_of(end)


def arange_plan(result: Any, start: Any, end: Any) -> Any:
    """One array for all calls."""
    return constant(result.handle.data), result.handle.dtype, fields_of(result)


def arange(plan: Any, start: Any, end: Any) -> Any:
    """The same numbers again."""
    return tensor_of(*plan)
