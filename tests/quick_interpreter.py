"""Makes Triton's interpreter several times as fast: it keeps what it would compute again.

It runs the same operations on the same numbers, with less work around them. Without this file, the
interpreter searches all of `triton.language` for functions to replace at every launch, and at every
call of one kernel function by another. It checks and wraps the shape of every tensor again. Every
operator looks up the dtypes of its operands again, and makes an array of each number. Every sum and
product of integers is computed a second time in 64 bits, for a check that only `debug` enables. The
names used here are internal to Triton, so other releases of Triton are left unchanged.
"""

from __future__ import annotations

import functools
import inspect

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

READ_IN = ("3.7.1",)
POINTER = np.dtype(np.uint64)


def quicken() -> bool:
    """Change the interpreter for the rest of the process; False if the release is unknown."""
    if triton.__version__ not in READ_IN:
        return False
    replace_functions_once()
    keep_shapes()
    keep_dtypes()
    keep_operands()
    options = interpreter.interpreter_builder.options
    if not options.debug:  # the overflow check asserts nothing then
        object.__setattr__(options, "sanitize_overflow", False)
    return True


def replace_functions_once() -> None:
    """The functions to replace are listed once; within a launch, each module is done once."""
    owners = (tl, tl.core, tl.tensor, tl.math, tl.core.tensor_descriptor_base)
    builtins = {
        owner: [name for name, member in inspect.getmembers(owner) if tl.core.is_builtin(member)]
        for owner in owners
    }

    from quick_functions import quick_functions  # these read names of this release, too
    from quick_operators import quick_operators

    semantic = interpreter.interpreter_semantic
    replacements = quick_operators() | quick_functions()

    def replacement_of(member):
        if member not in replacements:
            function = getattr(member, "__wrapped__", member)

            def call(*args, **kwargs):
                kwargs["_semantic"] = semantic
                return function(*args, **kwargs)

            replacements[member] = call
        return replacements[member]

    def replace_builtins(owner, builder, scope):
        for name in builtins[owner]:
            member = getattr(owner, name)
            if tl.core.is_builtin(member):  # it may have been replaced already
                scope.set_attr(owner, name, replacement_of(member))

    replace_all, PlainScope = interpreter._patch_lang, interpreter._LangPatchScope
    languages, uses, done = {id(tl), id(tl.core)}, {}, set()
    changes = {}  # the first launch with these modules lists them; later ones repeat the list

    class Scope(PlainScope):
        def restore(self):
            for owner, name, original, _ in self.repeated:
                if original is interpreter._MISSING:
                    delattr(owner, name)
                else:
                    setattr(owner, name, original)
            super().restore()
            done.clear()

        repeated = ()

    def replace_what_is_left(fn):
        if fn not in uses:
            uses[fn] = frozenset(languages.intersection(map(id, fn.__globals__.values())))
        used = uses[fn]
        if used and used <= done:
            return PlainScope()  # with nothing to put back
        is_first = not done
        done.update(used)
        if is_first and used in changes:
            scope = Scope()
            scope.repeated = changes[used]
            for owner, name, _, new in scope.repeated[::-1]:
                setattr(owner, name, new)
            return scope
        scope = replace_all(fn)
        if is_first and used:
            made = {}
            for owner, name, original in scope._changes:
                made.setdefault((owner, name), original)
            changes[used] = [
                (owner, name, original, vars(owner)[name])
                for (owner, name), original in made.items()
            ]
        return scope

    interpreter._patch_builtin = replace_builtins
    interpreter._LangPatchScope = Scope
    interpreter._patch_lang = replace_what_is_left


def keep_shapes() -> None:
    """Check and wrap the shape of a block once for each shape."""
    make_block, broadcast = tl.block_type.__init__, tl.semantic.TritonSemantic.broadcast_impl_value
    shapes, names, broadcasts = {}, {}, {}
    scalar = tl.core.tuple([]), tl.core.constexpr(1)

    def init_block(self, element_ty, shape):
        sizes = tuple([getattr(size, "value", size) for size in shape])
        if (element_ty.name, sizes) not in names:
            make_block(self, element_ty, shape)
            names[element_ty.name, sizes] = self.name
            wrapped = tl.core.tuple([tl.core.constexpr(size) for size in sizes])
            of_tensor = wrapped, tl.core.constexpr(self.numel)
            shapes.setdefault(sizes, (self.shape, self.numel, of_tensor))
        self.element_ty, self.name = element_ty, names[element_ty.name, sizes]
        self.shape, self.numel, self.of_tensor = shapes[sizes]

    def init_tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = type.of_tensor if type.is_block() else scalar

    def broadcast_unlike(self, lhs, rhs):
        if lhs.shape is rhs.shape:
            return lhs, rhs
        key = lhs.type.name, rhs.type.name
        if key not in broadcasts:
            pair = broadcast(self, lhs, rhs)
            broadcasts[key] = [
                None if new is old else (new.type, new.handle.data.shape, old.type.is_block())
                for old, new in zip((lhs, rhs), pair)
            ]
            return pair
        return [
            tensor if new is None else spread(tensor.handle, *new)
            for tensor, new in zip((lhs, rhs), broadcasts[key])
        ]

    def spread(handle, type, shape, is_block):
        # a single number becomes an array in C order, which decides the order of results
        data = handle.data
        data = np.broadcast_to(data, shape) if is_block else np.full(shape, data, data.dtype)
        return tl.tensor(interpreter.TensorHandle(data, handle.dtype.scalar), type)

    tl.block_type.__init__ = init_block
    tl.tensor.__init__ = init_tensor
    tl.semantic.TritonSemantic.broadcast_impl_value = broadcast_unlike


def keep_dtypes() -> None:
    """Look up NumPy's dtype for a dtype of Triton in a table that is made once."""
    of_scalar = functools.cache(interpreter._get_np_dtype)

    def of_any(dtype):
        if isinstance(dtype, tl.block_type):
            dtype = dtype.element_ty
        return POINTER if isinstance(dtype, tl.pointer_type) else of_scalar(dtype)

    interpreter._get_np_dtype = of_any


def keep_operands() -> None:
    """Use operands of equal dtype and shape as they are, and share arrays of equal numbers.

    The shared arrays cannot be written to, so a kernel that changed one would fail.
    """
    Semantic = tl.semantic.TritonSemantic
    check = Semantic.binary_op_type_checking_impl
    numbers, kept = (int, float, bool), {}

    def check_quickly(self, lhs, rhs, lhs_ptr=False, rhs_ptr=False, arithmetic=True, div=False):
        left, right = type(lhs), type(rhs)
        if left is tl.tensor and right is tl.tensor:
            is_pointer = lhs.dtype.is_ptr()
            same = lhs.dtype.name == rhs.dtype.name and not is_pointer
            same = same and not (div and lhs.dtype.primitive_bitwidth == 16)
            if same or (is_pointer and lhs_ptr and rhs.dtype.is_int()):
                return self.broadcast_impl_value(lhs, rhs)
        elif arithmetic and left is tl.tensor and right in numbers and not lhs.dtype.is_ptr():
            key = rhs, right, lhs.type.name, div
            if key not in kept:
                kept[key] = keep(self, *check(self, lhs, rhs, lhs_ptr, rhs_ptr, True, div), lhs)
            if kept[key] is not None:
                return lhs, kept[key]
        return check(self, lhs, rhs, lhs_ptr, rhs_ptr, arithmetic, div)

    def keep(self, tensor, number, given):
        """The number as a tensor, if the other operand keeps its dtype; else None."""
        if tensor is not given:
            return None
        number.handle.data = number.handle.data.copy()
        number.handle.data.flags.writeable = False
        return number

    Semantic.binary_op_type_checking_impl = check_quickly

    to_tensor = Semantic.to_tensor

    def as_it_is(self, x, check_type=True):
        return x if type(x) is tl.tensor else to_tensor(self, x, check_type)

    Semantic.to_tensor = as_it_is

    def init_handle(self, data, dtype, attr=None):
        self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr

    interpreter.TensorHandle.__init__ = init_handle
