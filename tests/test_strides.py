"""More tests of R21: strides of tensors that a call writes, and calls of torch alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pool_parts import CACHED, E4M3, SHAPES

import msa
from msa import recall
from msa.conformance.strides import KINDS, Stride, strides
from msa.ir import PagedKV

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
BLOCK, PAGES, BATCH, N = 16, 6, 2, 3
WRITABLE = tuple(kind for kind in KINDS if kind != "expanded")
EIGHT = [(), ("k", "v"), ("k_idx",), CACHED]
on_the_device = pytest.mark.gpu if CUDA else lambda test: test


def drawn(seed, *lead, names=CACHED):
    rng = np.random.default_rng(seed)
    return {name: rng.integers(-2, 3, (*lead, *SHAPES[name])).astype(np.float32) for name in names}


def empty_pages(kind, eight=()):
    """Pages of NaN, in the library of `kind`."""
    made = {
        name: kind(np.full((PAGES, BLOCK, *SHAPES[name]), np.nan, np.float32)) for name in CACHED
    }
    return made | {name: made[name].to(E4M3) for name in eight}


def laid(arrays, ways):
    """Each array with its layout."""
    return {name: way.lay(x, floats=True) for (name, x), way in zip(arrays.items(), ways)}


def same(found, wanted):
    """Check that the bits are equal; NaN equals NaN."""
    for name, want in vars(wanted).items():
        got = getattr(found, name)
        assert (got is None) == (want is None), name
        if want is not None:
            got, want = (
                np.asarray(x.double().cpu() if torch.is_tensor(x) else x) for x in (got, want)
            )
            assert np.array_equal(got, want, equal_nan=True), name


@given(
    st.sampled_from([np.array, torch.tensor]),
    st.sampled_from(EIGHT),
    st.lists(strides(WRITABLE), min_size=3, max_size=3),
    st.lists(strides(), min_size=3, max_size=3),
    st.integers(0, 9999),
)
def test_a_pool_writes_into_pages_of_any_strides(kind, eight, page_ways, token_ways, seed):
    if kind is np.array:
        eight = ()
    cast = {"copy": True} if kind is np.array else {}
    pages = empty_pages(lambda x: kind(x, **cast), eight)
    strided = laid(pages, page_ways)
    plain = msa.PagePool(*pages.values(), batch=BATCH)
    pool = msa.PagePool(*strided.values(), batch=BATCH)
    for part in range(2):
        tokens = {
            name: kind(way.values(x))
            for (name, x), way in zip(drawn(seed + part, BATCH, 9).items(), token_ways)
        }
        plain.append([0, 1], *tokens.values())
        pool.append([0, 1], *laid(tokens, token_ways).values())
    same(pool.cache, plain.cache)
    assert all(getattr(pool.cache, f"{name}_pages") is x for name, x in strided.items())


PARTS = ("k_pages", "v_pages", "k_idx_pages", "page_table", "lengths",
         "k_scales", "v_scales", "k_idx_scales")  # fmt: skip


@on_the_device
@given(
    st.sampled_from(EIGHT if CUDA else [()]),
    st.lists(strides(WRITABLE), min_size=len(PARTS), max_size=len(PARTS)),
    st.lists(strides(), min_size=3, max_size=3),
    st.sampled_from([torch.int32, torch.int64]),
    st.integers(0, 9999),
)
def test_the_kernel_appends_to_a_cache_of_any_strides(eight, ways, token_ways, integers, seed):
    def cache(laid_out):
        pages = empty_pages(lambda x: torch.tensor(x, device=DEVICE), eight)
        pool = msa.PagePool(*pages.values(), batch=BATCH)
        first = {
            n: torch.tensor(x, device=DEVICE) for n, x in drawn(seed, BATCH, BLOCK - 1).items()
        }
        pool.append([0, 1], *first.values())
        pool.reserve([0, 1], N)  # over the border of a page
        parts = {name: getattr(pool.cache, name) for name in PARTS}
        for name in ("page_table", "lengths"):
            parts[name] = parts[name].to(integers)
        if laid_out:
            for (name, x), way in zip(parts.items(), ways):
                parts[name] = x if x is None else way.lay(x, floats=x.dtype.is_floating_point)
        return PagedKV(**parts)

    tokens = {
        name: torch.tensor(way.values(x), device=DEVICE)
        for (name, x), way in zip(drawn(seed + 1, BATCH, N).items(), token_ways)
    }
    plain, strided = cache(False), cache(True)
    msa.append_tokens(plain, *tokens.values())
    msa.append_tokens(strided, *laid(tokens, token_ways).values())
    assert plain.lengths.tolist() == [BLOCK - 1 + N] * BATCH
    same(strided, plain)


NAMES = ("q", "k", "v", "q_idx", "k_idx")


@given(st.lists(strides(), min_size=5, max_size=5), st.integers(0, 9999))
def test_quality_of_tensors_of_any_strides(ways, seed):
    arrays = drawn(seed, 40, names=NAMES)
    tensors = {n: torch.tensor(way.values(x)) for (n, x), way in zip(arrays.items(), ways)}
    config = msa.MSAConfig(block_size=4, top_k=2)
    strided = laid(tensors, ways)
    assert msa.cache_quality(**strided, config=config) == msa.cache_quality(
        **tensors, config=config
    )
    q, k = (strided[name] for name in "qk")
    selection = msa.select(tensors["q_idx"], tensors["k_idx"], config=config)
    turned = replace(selection, indices=ways[2].lay(selection.indices, floats=False))
    if ways[2].kind == "expanded":
        turned = selection
    want = recall.measure(tensors["q"], tensors["k"], selection, 0.5)
    assert recall.measure(q, k, turned, 0.5) == want


@pytest.mark.parametrize("eight", EIGHT, ids=lambda names: ",".join(names) or "none")
def test_a_pool_does_not_ask_for_the_default_dtype(eight):
    def pool():
        made = msa.PagePool(*empty_pages(torch.tensor, eight).values(), batch=BATCH)
        made.append([0, 1], *(torch.tensor(x) for x in drawn(0, BATCH, 9).values()))
        return made.cache

    want = pool()
    torch.set_default_dtype(torch.float64)
    try:
        same(pool(), want)
    finally:
        torch.set_default_dtype(torch.float32)


def test_each_way_to_lie_keeps_the_numbers():
    x = np.arange(24.0).reshape(2, 3, 4)
    for kind in KINDS:
        for dim in range(3):
            way = Stride(kind, dim)
            for floats in (True, False):
                want = way.values(x, floats)
                assert np.array_equal(way.lay(want, floats), want)
                found = way.lay(torch.tensor(want), floats)
                assert np.array_equal(found.numpy(), want)
                assert not floats or found.stride(-1) == 1


LAST = {
    "attention": ("q", "k", "v", "q_idx", "k_idx"),
    "select": ("q_idx", "k_idx"),
    "sparse_attention": ("q", "k", "v"),
    "align_index": ("q", "k", "q_idx", "k_idx"),
    "cache_quality": ("q", "k", "v", "q_idx", "k_idx"),
}


@pytest.mark.parametrize(("function", "name"), [(f, n) for f, names in LAST.items() for n in names])
def test_a_last_dim_that_is_not_contiguous_is_refused(function, name, as_users_run_it):
    arrays = {n: torch.tensor(x) for n, x in drawn(0, 12, names=LAST[function]).items()}
    arrays[name] = torch.repeat_interleave(arrays[name], 2, -1)[..., ::2]
    more = {}
    if function == "sparse_attention":
        index = (torch.zeros(12, 2, 1), torch.zeros(12, 1))
        more["selection"] = msa.select(*index, config=msa.MSAConfig(block_size=4, top_k=2))
    with pytest.raises(ValueError, match=rf"^{name} must be contiguous in its last dim, got strid"):
        getattr(msa, function)(**arrays, **more)


@pytest.mark.parametrize("name", ["q", "q_idx", *(f"cache.{n}_pages" for n in CACHED)])
def test_decoding_refuses_a_last_dim_that_is_not_contiguous(name, as_users_run_it):
    pool = msa.PagePool(*empty_pages(torch.tensor).values(), batch=BATCH)
    given = {n: torch.tensor(x) for n, x in drawn(0, BATCH, 1, names=("q", "q_idx")).items()}
    parts = given | {f"cache.{n}_pages": getattr(pool.cache, f"{n}_pages") for n in CACHED}
    parts[name] = torch.repeat_interleave(parts[name], 2, -1)[..., ::2]
    cache = replace(pool.cache, **{f"{n}_pages": parts[f"cache.{n}_pages"] for n in CACHED})
    with pytest.raises(ValueError, match=rf"^{name} must be contiguous in its last dim, got strid"):
        msa.decode(parts["q"], parts["q_idx"], cache, config=msa.MSAConfig(BLOCK, 2))
