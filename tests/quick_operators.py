"""Operators with two operands in Triton's interpreter: one ufunc of NumPy each."""

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

ARITHMETIC = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
BITWISE = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
COMPARISONS = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
               "eq": np.equal, "ne": np.not_equal}  # fmt: skip


def quick_operators() -> dict[Any, Callable[..., Any]]:
    """For operators of `tl.tensor`: what the interpreter shall call instead."""
    made = {}
    for ufuncs in (ARITHMETIC, BITWISE, COMPARISONS):
        for name, ufunc in ufuncs.items():
            member = getattr(tl.tensor, f"__{name}__")
            made[member] = quick_operator(interpreted(member), name, ufunc)
    return made


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
