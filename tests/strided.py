"""Other strides for the same numbers: what tests of the strides of kernels have in common."""

from __future__ import annotations

import tempfile

import pytest
import torch

import msa

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32  # the interpreter multiplies bfloat16 wrongly
BLOCK, DIM = (128, 128) if CUDA else (16, 16)  # on a GPU the measured tiles, copied in bulk
TOKENS, HEADS, GROUPS = (520, 32, 4) if CUDA else (23, 6, 3)
CONFIG = msa.MSAConfig(BLOCK, top_k=2)
E4M3 = torch.float8_e4m3fn


# -- layouts --------------------------------------------------------------------------------------
def rubbish(x):
    return 77 if not x.is_floating_point() else float("nan")


def full(x, *shape):
    return torch.full(shape, rubbish(x), device=x.device).to(x.dtype)


def spaced(x):
    """Every second entry of every dim but the last, which is a part of a wider one."""
    *lead, last = x.shape
    wide = full(x, *(2 * n for n in lead), last + 16)
    view = wide[(*[slice(None, None, 2)] * len(lead), slice(last))]
    return fill(view, x)


def turned(x):
    """All dims but the last in the opposite order in memory: heads, then tokens."""
    *lead, last = range(x.dim())
    view = full(x, *(x.shape[d] for d in reversed(lead)), x.shape[-1])
    return fill(view.permute(*reversed(lead), last), x)


def columns(x):
    """Every second entry of every dim, the last one too."""
    wide = full(x, *(2 * n for n in x.shape))
    return fill(wide[(slice(None, None, 2),) * x.dim()], x)


def transposed(x):
    return fill(full(x, *reversed(x.shape)).permute(*reversed(range(x.dim()))), x)


def expanded(x):
    """The first entry of the first dim in the place of all others: stride 0."""
    return x[:1].expand(x.shape)


def fill(view, x):
    with torch.no_grad():
        bits = torch.uint8 if x.dtype == E4M3 else x.dtype  # not every release copies 8-bit floats
        view.view(bits).copy_(x.view(bits))
    return view


def far(x, dim, folder):
    """The same numbers, those of one dim so far apart that the last one lies beyond 2^31.

    Before the first one there is room as well, where an offset that has become negative ends.
    """
    step = -(-(2**31) // (x.shape[dim] - 1) // 16) * 16
    step = step if step * (x.shape[dim] - 1) >= 2**31 else step + 16
    others = [n for d, n in enumerate(x.shape) if d != dim]
    inner = list(torch.empty(others, device="meta").stride())
    size, start = 2**32 + 2**26, 2**31
    assert step < 2**31 <= step * (x.shape[dim] - 1) <= size - start - x.numel()
    if CUDA:
        memory = torch.zeros(size, dtype=x.dtype, device="cuda")
    else:
        path = tempfile.mktemp(dir=folder)
        memory = torch.from_file(path, shared=True, size=size, dtype=x.dtype)
    strides = (*inner[:dim], step, *inner[dim:])
    return fill(memory.as_strided(x.shape, strides, start), x)


@pytest.fixture
def folder():
    with tempfile.TemporaryDirectory() as path:
        yield path


def same(got, want):
    for place, (one, other) in enumerate(zip(got, want, strict=True)):
        assert one.dtype == other.dtype
        bits = torch.uint8 if one.dtype == E4M3 else one.dtype
        one, other = one.contiguous().view(bits), other.contiguous().view(bits)
        assert not one.is_floating_point() or not one.isnan().any(), place
        assert torch.equal(one, other), place


# -- prefill and training -------------------------------------------------------------------------
def normal(seed, *shape):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random).to(DTYPE).to(DEVICE)
