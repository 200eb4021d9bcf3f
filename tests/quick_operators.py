"""Operators of Triton's interpreter as one call of NumPy each.

At every operator the interpreter decides again which dtype the result has, which operand to convert
and how to broadcast. All of this follows from the types of the operands alone. So the first time
that an operator sees two types, it goes the interpreter's way and keeps what came out: a plan. From
then on it follows the plan. A plan is kept only if it gives the same bits, in the same layout, as
the interpreter gave that first time; else the operator goes the interpreter's way each time.

Sums depend on the layout of an array in memory, so results must have the layout that they have in
the interpreter. NumPy broadcasts blocks as the interpreter does. Only a single number beside a block
can end in another layout, if the block is transposed: then no plan is followed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

SEMANTIC = interpreter.interpreter_semantic
PLAIN = {"int1", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
         "fp16", "fp32", "fp64"}  # fmt: skip
"""Names of the dtypes that NumPy has; `astype` converts between them, except to int1."""
NUMBERS = {bool, int, float}
FULL = slice(None)
UNKNOWN = object()

ARITHMETIC = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
BITWISE = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
COMPARISONS = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
               "eq": np.equal, "ne": np.not_equal}  # fmt: skip


def quick_members() -> dict[Any, Callable[..., Any]]:
    """For functions of `triton.language`: what the interpreter shall call instead."""
    made = {}
    for ufuncs in (ARITHMETIC, BITWISE, COMPARISONS):
        for name, ufunc in ufuncs.items():
            made[f"__{name}__"] = functools.partial(quick_operator, name=name, ufunc=ufunc)
    operators = {getattr(tl.tensor, name): make for name, make in made.items()}
    operators |= {
        tl.tensor.__getitem__: quick_index,
        tl.tensor.to: quick_cast,
        tl.load: quick_load,
        tl.where: quick_where,
        tl.store: quick_store,
        tl.dot: quick_dot,
        tl.arange: quick_arange,
    }
    return {member: make(interpreted(member)) for member, make in operators.items()}


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


# -- operators with two operands ------------------------------------------------------------------
def quick_operator(slow: Callable[..., Any], name: str, ufunc: Any) -> Callable[..., Any]:
    """`tensor.__NAME__`: a ufunc on the arrays of both operands."""
    plans: dict[Any, Any] = {}

    def call(self, other):
        if type(other) is tl.core.constexpr:
            other = other.value
        if type(other) is tl.tensor:
            key, right = (self.type.name, other.type.name), other.handle.data
        elif type(other) in NUMBERS:  # 0.0 equals -0.0, but has other bits
            key, right = (self.type.name, type(other), other or repr(other)), None
        else:
            return slow(self, other)
        plan = plans.get(key, UNKNOWN)
        if plan is UNKNOWN:
            result = slow(self, other)
            plans[key] = plan_of(name, ufunc, self, other, result)
            return result
        if plan is None:
            return slow(self, other)
        compute, fields, dtype, of = plan
        handle = self.handle
        data = compute(handle.data, right)
        if data is None or data.dtype is not dtype:
            return slow(self, other)
        return tensor_of(data, of or handle.dtype.scalar, fields)

    return call


def plan_of(name: str, ufunc: Any, left: Any, right: Any, result: Any) -> Any:
    """How to compute `result` from the arrays of two operands; None if other bits come out."""
    if left.dtype.is_ptr():
        compute, of = pointer_sum(name, left, right), None
    else:
        compute, of = arithmetic_of(name, ufunc, left, right)
    if compute is None:
        return None
    data = compute(left.handle.data, right.handle.data if type(right) is tl.tensor else None)
    if left.dtype.is_ptr():  # the layout of addresses decides nothing
        agree = np.array_equal(data, result.handle.data)
    else:
        agree = data is not None and same(data, result.handle.data)
    return (compute, fields_of(result), data.dtype, of) if agree else None


def arithmetic_of(name: str, ufunc: Any, left: Any, right: Any) -> Any:
    """The function of both arrays, and the dtype that the left operand is converted to, if any."""
    is_number, bitwise = type(right) in NUMBERS, name in BITWISE
    as_tensor = SEMANTIC.to_tensor(right) if is_number and name in COMPARISONS else right
    lhs, rhs = SEMANTIC.binary_op_type_checking_impl(left, as_tensor, False, False, not bitwise)
    if bitwise and lhs.dtype != rhs.dtype:
        both = SEMANTIC.integer_promote_impl(lhs.dtype, rhs.dtype)
        lhs, rhs = SEMANTIC.cast(lhs, both), SEMANTIC.cast(rhs, both)
    if lhs.dtype != rhs.dtype or not {lhs.dtype.name, left.dtype.name} <= PLAIN:
        return None, None
    if is_number:
        number = constant(rhs.handle.data)
        return (lambda a, _: ufunc(a, number), None) if lhs is left else (None, None)
    if right.dtype.name not in PLAIN:
        return None, None
    to = interpreter._get_np_dtype(lhs.dtype)
    converts_left, converts_right = lhs.dtype != left.dtype, rhs.dtype != right.dtype
    if not (converts_left or converts_right):
        return in_order(ufunc, left, right), None
    if lhs.dtype == tl.int1:
        return None, None

    def compute(a, b):
        return ufunc(a.astype(to) if converts_left else a, b.astype(to) if converts_right else b)

    return in_order(compute, left, right), lhs.dtype if converts_left else None


def pointer_sum(name: str, pointer: Any, offset: Any) -> Any:
    """Addresses and signed offsets, which are given in elements."""
    size = max(1, pointer.dtype.element_ty.primitive_bitwidth // 8)
    if type(offset) is int and name in ("add", "sub"):
        step = np.uint64((size if name == "add" else -size) * offset % 2**64)
        return lambda a, _: a + step
    if name == "add" and type(offset) is tl.tensor and offset.dtype in (tl.int32, tl.int64):
        return lambda a, b: a + size * b.astype(np.uint64)
    return None


def in_order(compute: Any, left: Any, right: Any) -> Any:
    """The same function; None in place of a number and a block that is not in C order."""
    if left.type.is_block() == right.type.is_block():
        return compute
    if left.type.is_block():
        return lambda a, b: compute(a, b) if a.flags.c_contiguous else None
    return lambda a, b: compute(a, b) if b.flags.c_contiguous else None


# -- others ---------------------------------------------------------------------------------------
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
