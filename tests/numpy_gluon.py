"""Gluon kernels on NumPy: what they compute, without a GPU. Layouts are ignored.

Programs run one after another. Kernels that copy, multiply or wait asynchronously do not run here.
"""

from __future__ import annotations

from types import FunctionType, ModuleType, SimpleNamespace

import numpy as np
from triton.language import constexpr
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction


class Value(np.ndarray):
    """A tensor of a kernel."""

    def to(self, dtype):
        return self.astype(dtype)

    @property
    def type(self):
        return SimpleNamespace(layout=None)


def value(x):
    return np.asarray(x).view(Value)


class Pointer:
    """Places in a flat array; every access is checked."""

    def __init__(self, array, offset=0):
        self.array, self.offset = array, np.asarray(offset, np.int64)

    def __add__(self, offset):
        return Pointer(self.array, self.offset + np.asarray(offset, np.int64))

    def __getitem__(self, index):
        return Pointer(self.array, self.offset[index])

    @property
    def shape(self):
        return self.offset.shape


def load(p, mask=None, other=None, cache_modifier=None):
    if p.offset.ndim == 0:
        return value(p.array[int(p.offset)])
    mask = np.broadcast_to(True if mask is None else mask, p.offset.shape)
    assert ((p.offset >= 0) & (p.offset < p.array.size))[mask].all()
    found = p.array[np.where(mask, p.offset, 0)]
    return value(found if other is None else np.where(mask, found, other).astype(p.array.dtype))


def store(p, x, mask=None):
    shape = np.broadcast_shapes(
        p.offset.shape, np.shape(x), np.shape(True if mask is None else mask)
    )
    mask = np.broadcast_to(True if mask is None else mask, shape)
    where = np.broadcast_to(p.offset, shape)[mask]
    assert ((where >= 0) & (where < p.array.size)).all()
    assert len(np.unique(where)) == len(where), "two threads write one place"
    p.array[where] = np.broadcast_to(x, shape)[mask]


def language(program_id, num_programs):
    def scan(x, axis, combine):
        assert int(combine(2, 3)) == 5
        return value(np.cumsum(x, axis, dtype=x.dtype))

    def split(x):
        return value(x[..., 0]), value(x[..., 1])

    def full(shape, x, dtype, layout=None):
        return value(np.full(shape, x, dtype))

    def select(condition, a, b):
        found = np.where(condition, a, b)
        return value(found.astype(np.float32) if found.dtype == np.float64 else found)

    return SimpleNamespace(
        constexpr=None, int1=np.bool_, int32=np.int32, int64=np.int64, float32=np.float32,
        BlockedLayout=lambda *a: None, SliceLayout=lambda *a: None,
        program_id=lambda axis: value(program_id[axis]),
        num_programs=lambda axis: num_programs[axis],
        static_range=range, load=load, store=store, full=full, where=select, split=split,
        associative_scan=scan,
        arange=lambda a, b, layout=None: value(np.arange(a, b, dtype=np.int32)),
        zeros=lambda shape, dtype, layout=None: full(shape, 0, dtype),
        zeros_like=lambda x: value(np.zeros_like(x)),
        convert_layout=lambda x, layout, assert_trivial=False: x,
        reshape=lambda x, shape: value(x.reshape(shape)),
        permute=lambda x, order: value(x.transpose(order)),
        join=lambda a, b: value(np.stack([a, b], -1)),
        minimum=lambda a, b: value(np.fmin(a, b)), maximum=lambda a, b: value(np.fmax(a, b)),
        max=lambda x, axis: value(np.fmax.reduce(x, axis)),
        sum=lambda x, axis: value(np.sum(x, axis, dtype=x.dtype)),
    )  # fmt: skip


def functions(module: ModuleType, program_id=(0, 0), num_programs=(1, 1)) -> dict:
    """The names of a module, with the functions of its kernels as functions on NumPy."""
    names = dict(vars(module))
    names["gl"] = language(program_id, num_programs)
    names["tl"] = SimpleNamespace(cast=lambda x, dtype: np.asarray(x).astype(dtype), int64=np.int64)
    for key, member in vars(module).items():
        if isinstance(member, JITFunction | InterpretedFunction):
            plain = member.fn
            names[key] = FunctionType(plain.__code__, names, key, plain.__defaults__)
        elif isinstance(member, constexpr):
            names[key] = member.value
    return names


def run(module: ModuleType, name: str, grid: tuple[int, int], *args, **constants) -> None:
    """Run a kernel of a module for every program of a grid; arrays take the place of pointers."""
    for i in np.ndindex(*grid):
        pointers = [Pointer(x.reshape(-1)) for x in args]
        functions(module, i, grid)[name](*pointers, **constants)
