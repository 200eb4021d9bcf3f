"""Functions of Triton's interpreter that make, move and join blocks: one call of NumPy each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from quick_plans import (
    NUMBERS,
    PLAIN,
    SEMANTIC,
    UNKNOWN,
    constant,
    fields_of,
    interpreted,
    same,
    tensor_of,
)
from triton.runtime import interpreter

FULL = slice(None)


def quick_functions() -> dict[Any, Callable[..., Any]]:
    """For functions of `triton.language`: what the interpreter shall call instead."""
    made = {
        tl.tensor.__getitem__: quick_index,
        tl.tensor.to: quick_cast,
        tl.load: quick_load,
        tl.store: quick_store,
        tl.where: quick_where,
        tl.dot: quick_dot,
        tl.arange: quick_arange,
    }
    return {member: make(interpreted(member)) for member, make in made.items()}


def quick_cast(slow: Callable[..., Any]) -> Callable[..., Any]:
    """`tensor.to(dtype)`."""
    plans: dict[Any, Any] = {}

    def call(self, dtype, **options):
        if type(dtype) is not tl.dtype or options:
            return slow(self, dtype, **options)
        key = self.type.name, dtype.name
        plan = plans.get(key, UNKNOWN)
        if plan is UNKNOWN:
            result = slow(self, dtype)
            plain = {self.dtype.name, dtype.name} <= PLAIN and dtype != tl.int1
            if result is self:
                plans[key] = ()
            else:
                plans[key] = (
                    (interpreter._get_np_dtype(dtype), fields_of(result)) if plain else None
                )
            return result
        if plan is None:
            return slow(self, dtype)
        if not plan:
            return self
        to, fields = plan
        return tensor_of(self.handle.data.astype(to), dtype, fields)

    return call


def quick_index(slow: Callable[..., Any]) -> Callable[..., Any]:
    """`tensor[:, None]` and the like: a view with more axes."""
    plans: dict[Any, Any] = {}

    def call(self, slices):
        if type(slices) is not tuple or not all([s is None or s == FULL for s in slices]):
            return slow(self, slices)
        key = self.type.name, tuple([s is None for s in slices])
        plan = plans.get(key)
        if plan is None:
            result = slow(self, slices)
            if self.type.is_block():
                plans[key] = fields_of(result), result.handle.data.shape
            return result
        fields, shape = plan
        return tensor_of(self.handle.data.reshape(shape), self.handle.dtype.scalar, fields)

    return call


def quick_load(slow: Callable[..., Any]) -> Callable[..., Any]:
    """`tl.load` of a block of pointers, where what is masked becomes a number."""
    plans: dict[Any, Any] = {}
    read = interpreter._interpreter.load

    def call(pointer, mask=None, other=None, **options):
        if type(other) is tl.core.constexpr:
            other = other.value
        if other is not None and type(other) not in NUMBERS:
            return slow(pointer, mask, other, **options)
        kind = None if mask is None else mask.type.name
        key = (pointer.type.name, kind, type(other), repr(other), *options.items())
        plan = plans.get(key, UNKNOWN)
        if plan is UNKNOWN:
            result = slow(pointer, mask, other, **options)
            plans[key] = load_plan(pointer, mask, other, result)
            return result
        if plan is None:
            return slow(pointer, mask, other, **options)
        fields, of, dtype, everywhere, filled = plan
        where = everywhere if mask is None else mask.handle.data
        if where.shape != filled.shape:
            where = np.broadcast_to(where, filled.shape)
        return tensor_of(read(pointer.handle.data, where, filled, dtype), of, fields)

    return call


def load_plan(pointer: Any, mask: Any, other: Any, result: Any) -> Any:
    """The type of what is loaded and the arrays that are the same at each load; None if unusual."""
    dtype, data = pointer.dtype.element_ty, result.handle.data
    if dtype.name not in PLAIN or dtype == tl.int1 or pointer.handle.data.shape != data.shape:
        return None
    filled = np.zeros(data.shape, data.dtype)
    if other is not None:
        filled[...] = SEMANTIC.cast(SEMANTIC.to_tensor(other), dtype).handle.data
    return fields_of(result), result.handle.dtype, data.dtype, np.ones(data.shape, bool), filled


def quick_where(slow: Callable[..., Any]) -> Callable[..., Any]:
    """`tl.where` of a condition and two operands, each a tensor or a number."""
    plans: dict[Any, Any] = {}

    def call(condition, x, y):
        x, y = (side.value if type(side) is tl.core.constexpr else side for side in (x, y))
        kinds = [
            side.type.name if type(side) is tl.tensor else (type(side), repr(side))
            for side in (condition, x, y)
        ]
        plan = plans.get(key := tuple(kinds), UNKNOWN)
        if plan is UNKNOWN:
            result = slow(condition, x, y)
            plans[key] = where_plan(condition, x, y, result)
            return result
        if plan is None:
            return slow(condition, x, y)
        x_number, y_number, fields, dtype, of, mixed = plan
        arrays = (
            condition.handle.data,
            x.handle.data if x_number is None else x_number,
            y.handle.data if y_number is None else y_number,
        )
        if mixed and not all([array.flags.c_contiguous for array in arrays]):
            return slow(condition, x, y)
        data = np.where(*arrays)
        if data.dtype is not dtype:
            return slow(condition, x, y)
        return tensor_of(data, of or y.handle.dtype.scalar, fields)

    return call


def where_plan(condition: Any, x: Any, y: Any, result: Any) -> Any:
    """The numbers as arrays, and the type of the result; None if an operand is converted."""
    if type(condition) is not tl.tensor or condition.dtype != tl.int1:
        return None
    given = SEMANTIC.binary_op_type_checking_impl(x, y, True, True)
    numbers: list[Any] = []
    for side, converted in zip((x, y), given):
        if type(side) is tl.tensor:
            if side.dtype != converted.dtype:
                return None
            numbers.append(None)
        elif type(side) in NUMBERS:
            numbers.append(constant(converted.handle.data))
        else:
            return None
    arrays = [side.handle.data if number is None else number
              for side, number in zip((x, y), numbers)]  # fmt: skip
    data = np.where(condition.handle.data, *arrays)
    if not same(data, result.handle.data):
        return None
    blocks = {side.type.is_block() for side in (condition, *given)}
    blocks |= {side.type.is_block() for side in (x, y) if type(side) is tl.tensor}
    of = None if numbers[1] is None else given[1].handle.dtype.scalar
    return *numbers, fields_of(result), data.dtype, of, len(blocks) > 1


def quick_store(slow: Callable[..., Any]) -> Callable[..., Any]:
    """`tl.store` of a tensor at a block of pointers."""
    plans: dict[Any, Any] = {}
    write = interpreter._interpreter.store

    def call(pointer, value, mask=None, **options):
        if type(value) is not tl.tensor or options:
            return slow(pointer, value, mask, **options)
        key = pointer.type.name, value.type.name, None if mask is None else mask.type.name
        plan = plans.get(key, UNKNOWN)
        if plan is UNKNOWN:
            result = slow(pointer, value, mask)
            plans[key] = store_plan(pointer, value)
            return result
        if plan is None:
            return slow(pointer, value, mask)
        everywhere, to = plan
        data, where = value.handle.data, everywhere if mask is None else mask.handle.data
        data = data if to is None else data.astype(to)
        if data.shape != everywhere.shape:
            data = np.broadcast_to(data, everywhere.shape)
        if where.shape != everywhere.shape:
            where = np.broadcast_to(where, everywhere.shape)
        write(pointer.handle.data, data, where)
        return None

    return call


def store_plan(pointer: Any, value: Any) -> Any:
    """A mask of every place, and the dtype to convert to, if any; None if it is unusual."""
    dtype = pointer.dtype.element_ty
    if not {dtype.name, value.dtype.name} <= PLAIN or tl.int1 in (dtype, value.dtype):
        return None
    to = None if dtype == value.dtype else interpreter._get_np_dtype(dtype)
    return constant(np.ones(pointer.handle.data.shape, bool)), to


def quick_dot(slow: Callable[..., Any]) -> Callable[..., Any]:
    """`tl.dot` of two blocks; what is added to is None or a third one."""
    plans: dict[Any, Any] = {}

    def call(a, b, acc=None, **options):
        kind = None if acc is None else acc.type.name
        key = (a.type.name, b.type.name, kind, *options.items())
        plan = plans.get(key, UNKNOWN)
        if plan is UNKNOWN:
            result = slow(a, b, acc, **options)
            plans[key] = dot_plan(a, b, acc, result)
            return result
        if plan is None:
            return slow(a, b, acc, **options)
        fields, of, zeros = plan
        d = zeros if acc is None else acc.handle.data
        product = np.matmul(a.handle.data, b.handle.data, dtype=d.dtype)
        return tensor_of(product + d, of, fields)

    return call


def dot_plan(a: Any, b: Any, acc: Any, result: Any) -> Any:
    """The type of the product and what is added to it; None if operands are converted."""
    data = result.handle.data
    if not {a.dtype.name, b.dtype.name} <= PLAIN or (acc is not None and acc.dtype != result.dtype):
        return None
    zeros = constant(np.zeros(data.shape, data.dtype))
    d = zeros if acc is None else acc.handle.data
    agree = same(np.matmul(a.handle.data, b.handle.data, dtype=d.dtype) + d, data)
    return (fields_of(result), result.handle.dtype, zeros) if agree else None


def quick_arange(slow: Callable[..., Any]) -> Callable[..., Any]:
    """`tl.arange`: one array for all calls, which nobody can write to."""
    kept: dict[Any, Any] = {}

    def call(start, end):
        start, end = (x.value if type(x) is tl.core.constexpr else x for x in (start, end))
        if (start, end) not in kept:
            made = slow(start, end)
            kept[start, end] = constant(made.handle.data), made.handle.dtype, fields_of(made)
        return tensor_of(*kept[start, end])

    return call
