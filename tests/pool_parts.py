"""Pages, tokens, and what the spec says of them: what tests of the paged cache have in common."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import msa

BLOCK, BATCH, PAGES, WIDTH = 4, 3, 6, 3
CONFIG = msa.MSAConfig(block_size=BLOCK, top_k=2)
SHAPES = {"k": (2, 3), "v": (2, 2), "k_idx": (3,), "q": (4, 3), "q_idx": (2, 3)}
CACHED = ("k", "v", "k_idx")
E4M3 = torch.float8_e4m3fn
LEAST_SCALE = 2.0**-126
PLACES = ["reference", "torch", pytest.param("cuda", marks=pytest.mark.gpu)]


def backend_of(place):
    return "torch" if place == "cuda" else place


def drawn(seed, *lead):
    """Integers so small that every score is exact, with many ties."""
    rng = np.random.default_rng(seed)
    return {name: rng.integers(-2, 3, (*lead, *dims)) * 1.0 for name, dims in SHAPES.items()}


def put(arrays, place):
    """To the library and the device under test."""
    if place == "reference":
        return arrays
    device = "cuda" if place == "cuda" else "cpu"
    return {name: torch.tensor(x, device=device) for name, x in arrays.items()}


def read(array):
    if not isinstance(array, torch.Tensor):
        return array
    return (array.double() if array.dtype == E4M3 else array).cpu().numpy()


def make_pool(place, pages=PAGES, eight=(), **sizes):
    """Pages full of NaN, those of the names in `eight` of 8 bits, with NaN for scales."""
    empty = put({name: np.full((pages, BLOCK, *SHAPES[name]), np.nan) for name in CACHED}, place)
    empty |= {name: empty[name].to(E4M3) for name in eight}
    sizes = {"batch": BATCH, "pages_per_sequence": WIDTH} | sizes
    pool = msa.PagePool(*empty.values(), **sizes)
    for name, scales in scale_arrays(pool.cache).items():
        assert (scales is not None) == (name in eight)
        if scales is not None:
            scales.fill_(torch.nan)
    return pool


def page_arrays(cache):
    return {name: getattr(cache, f"{name}_pages") for name in CACHED}


def scale_arrays(cache):
    return {name: getattr(cache, f"{name}_scales") for name in CACHED}


def attention(tokens, n):
    """What the spec says of the last n of some tokens."""
    queries = [tokens[name][len(tokens["k"]) - n :] for name in ("q", "q_idx")]
    q, q_idx = queries
    k, v, k_idx = (tokens[name] for name in CACHED)
    return msa.attention(q, k, v, q_idx, k_idx, config=CONFIG, backend="reference")


def close(found, want):
    np.testing.assert_allclose(read(found), want, rtol=1e-6, atol=1e-12)


def append_number(pool, s, number, n=1):
    new = (np.full((n, *SHAPES[name]), number) for name in CACHED)
    pool.append(s, *new)


def some_tokens(pool, n):
    """Of the kind that its pages take."""
    new = {name: drawn(n, n)[name] for name in CACHED}
    if not isinstance(pool.cache.k_pages, torch.Tensor):
        return new
    return {name: x.float() if page_arrays(pool.cache)[name].dtype == E4M3 else x
            for name, x in put(new, "torch").items()}  # fmt: skip


def two_sequences(place, eight=()):
    pool = make_pool(place, eight=eight)
    pool.append(0, **some_tokens(pool, 5))
    pool.fork(0)
    return pool


# -- eight bits, by the letter of the rule ---------------------------------------------------------
def to_e4m3(x):
    """Four significant bits from 2^-6 on, below it steps of 2^-9; 448 at most; ties to even."""
    x = np.clip(x, -448.0, 448.0)
    step = np.ldexp(1.0, np.maximum(np.frexp(x)[1] - 1, -6) - 3)
    return np.rint(x / step) * step


def scale_of(x):
    """1 / the greatest power of two, at most 2^126, that takes no finite number beyond 448."""
    largest, scale = np.max(np.abs(x), where=np.isfinite(x), initial=0.0), LEAST_SCALE
    while largest / scale > 448.0:
        scale *= 2.0
    return scale


def append_8(numbers, scales, new, block=BLOCK):
    """Numbers that pages of 8 bits stand for [t, *heads, dim], their scales [pages, *heads], after
    one append of `new`."""
    before, numbers = len(numbers), np.concatenate([numbers, new])
    old, pages = scales, -(-len(numbers) // block)
    scales = np.full((pages, *new.shape[1:-1]), LEAST_SCALE)
    scales[: len(old)] = old
    for b in range(before // block, pages):
        first, stop = b * block, min((b + 1) * block, len(numbers))
        for head in np.ndindex(new.shape[1:-1]):
            fresh = numbers[(slice(max(before, first), stop), *head)]
            scale = scales[(b, *head)] = max(scales[(b, *head)], scale_of(fresh))
            page = numbers[(slice(first, stop), *head)]
            page[:] = to_e4m3(page / scale) * scale
    return numbers, scales
