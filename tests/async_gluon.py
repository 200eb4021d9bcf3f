"""Asynchronous Gluon kernels on NumPy: groups of warps are threads, barriers make them wait.

It shows what a kernel computes, which places it reads and writes, and whether its groups wait for
one another without end. It cannot show what the hardware does: layouts are ignored, and a copy or a
product is done when it starts. Programs run one after another.
"""

from __future__ import annotations

import threading
from types import FunctionType, SimpleNamespace

import numpy as np
from numpy_gluon import Pointer, language, value
from triton.language import constexpr
from triton.runtime.jit import JITFunction

PATIENCE = 60.0
"""Seconds after which a group of warps that still waits is an error."""


class Barrier:
    """A barrier of shared memory: it completes a phase after all arrivals and all bytes."""

    def __init__(self):
        self.lock, self.phase = threading.Condition(), 0

    def init(self, count):
        self.count = self.pending = count
        self.bytes = 0

    def change(self, arrivals, size):
        with self.lock:
            self.pending -= arrivals
            self.bytes += size
            assert self.pending >= 0, "more arrivals than the barrier expects"
            if self.pending == 0 and self.bytes == 0:
                self.pending, self.phase = self.count, self.phase ^ 1
                self.lock.notify_all()

    def wait(self, phase):
        with self.lock:
            assert self.lock.wait_for(lambda: self.phase != int(phase), PATIENCE), "waits for ever"


class Barriers:
    def __init__(self, count):
        self.all = [Barrier() for _ in range(count)]

    def index(self, i):
        return self.all[int(i)]


class Shared:
    """Part of a tile in shared memory: a view of one flat buffer."""

    def __init__(self, flat, offset, shape, strides):
        self.flat, self.offset, self.strides = flat, offset, tuple(strides)
        self.shape, self.dtype = list(shape), flat.dtype.type

    @staticmethod
    def dense(flat, offset, shape):
        strides = [int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape))]
        return Shared(flat, offset, shape, strides)

    def view(self):
        size = self.flat.itemsize
        strides = [s * size for s in self.strides]
        return np.lib.stride_tricks.as_strided(self.flat[self.offset :], self.shape, strides)

    def index(self, i):
        assert 0 <= int(i) < self.shape[0]
        offset = self.offset + int(i) * self.strides[0]
        return Shared(self.flat, offset, self.shape[1:], self.strides[1:])

    def slice(self, start, length, dim=0):
        assert start >= 0 and start + length <= self.shape[dim]
        shape = [length if i == dim else n for i, n in enumerate(self.shape)]
        return Shared(self.flat, self.offset + start * self.strides[dim], shape, self.strides)

    def permute(self, order):
        shape, strides = ([x[i] for i in order] for x in (self.shape, self.strides))
        return Shared(self.flat, self.offset, shape, strides)

    def _reinterpret(self, dtype, shape, layout):
        assert dtype == self.dtype
        return Shared.dense(self.flat, self.offset, shape)

    def load(self, layout):
        return value(self.view().copy())

    def store(self, x):
        assert list(x.shape) == self.shape
        self.view()[...] = x


class Descriptor:
    """A matrix that is copied in tiles; zeros where a tile passes its end."""

    def __init__(self, matrix, shape):
        self.matrix, self.dtype, self.layout = matrix, matrix.dtype.type, None
        size = int(np.prod(shape)) * matrix.itemsize
        self.block_type = SimpleNamespace(shape=list(shape), nbytes=size)


def copy_tile(desc, place, barrier, tile):
    (rows, columns), (r, c) = desc.block_type.shape, (int(x) for x in place)
    found = np.zeros((rows, columns), desc.dtype)
    part = desc.matrix[r : r + rows, c : c + columns]
    found[: len(part), : part.shape[1]] = part
    tile.store(found)
    barrier.change(0, -desc.block_type.nbytes)


def operand(x):
    return (x.view() if isinstance(x, Shared) else np.asarray(x)).astype(np.float32)


def multiply(a, b, acc, use_acc=True, is_async=True):
    product = operand(a) @ operand(b)
    assert list(product.shape) == list(acc.shape)
    return value(product + np.asarray(acc) if use_acc else product)


def allocate(dtype, shape, layout):
    if layout == "barriers":
        return Barriers(shape[0])
    size = int(np.prod(shape))
    fresh = np.nan if np.issubdtype(dtype, np.floating) else -123456789
    return Shared.dense(np.full(size, fresh, dtype), 0, list(shape))


def specialize(parts, warps, registers):
    """Every group of warps is a thread; the first error of any of them is raised."""
    errors = []

    def run(function, args):
        try:
            with np.errstate(all="ignore"):
                function(*args)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=part, daemon=True) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "a group of warps does not end"


def expect(barrier, size):
    """Announce the bytes of copies, and arrive."""
    barrier.change(0, size)
    barrier.change(1, 0)


def names_of(modules, program_id, num_programs, **others):
    """One set of names for the functions of all modules."""
    names = {}
    for module in modules:
        names |= vars(module)
    gl = language(program_id, num_programs)
    more = {
        "allocate_shared_memory": allocate, "warp_specialize": specialize,
        "exp2": lambda x: value(np.exp2(x)), "DotOperandLayout": lambda *a: None,
        "NVMMASharedLayout": lambda *a: None, "SwizzledSharedLayout": lambda *a: None,
    }  # fmt: skip
    names["gl"] = SimpleNamespace(**vars(gl) | more)
    names["mbarrier"] = SimpleNamespace(
        MBarrierLayout=lambda: "barriers", init=lambda b, count: b.init(count),
        wait=lambda b, phase: b.wait(phase), arrive=lambda b, count: b.change(count, 0),
        expect=expect,
    )  # fmt: skip
    names["range"] = lambda *a: (value(np.int32(i)) for i in range(*(int(x) for x in a)))
    names |= {
        "copy_tile": copy_tile, "warpgroup_mma": multiply, "fence_async_shared": lambda: None,
        "warpgroup_mma_wait": lambda n, deps: deps[0] if len(deps) == 1 else tuple(deps),
    }  # fmt: skip
    for key, member in list(names.items()):
        if isinstance(member, JITFunction):
            plain = member.fn
            names[key] = FunctionType(plain.__code__, names, key, plain.__defaults__)
        elif isinstance(member, constexpr):
            names[key] = member.value
    names.update(others)
    return names


def launch(modules, name, grid, *args, **options):
    """Run a kernel for every program of a grid; arrays take the place of pointers."""
    others = options.pop("others", {})
    for i in range(grid):
        names = names_of(modules, (i,), (grid,), **others)
        given = [Pointer(x.reshape(-1)) if isinstance(x, np.ndarray) else x for x in args]
        names[name](*given, **options)
