"""The layouts of other projects: conversion and back is the identity, and each layout is right."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import msa
from msa import reference
from msa.integrations import layouts, page_layouts
from msa.ir import Sequences

KINDS = {"numpy": lambda x: x, "torch": torch.from_numpy}


def is_view(new, old):
    """Whether both have the same memory."""
    if isinstance(new, torch.Tensor):
        return new.untyped_storage().data_ptr() == old.untyped_storage().data_ptr()
    return np.shares_memory(new, old)


@st.composite
def selections(draw, uniform=False):
    """A Selection of random scores, and the scores, in either kind of array."""
    sizes = st.integers(0, 3).flatmap(
        lambda n: st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), min_size=n, max_size=n)
    )
    if uniform:
        n_q, more, batch = draw(st.tuples(st.integers(1, 5), st.integers(0, 9), st.integers(1, 3)))
        pairs = [(n_q, more)] * batch
    else:
        pairs = draw(sizes)
    n_q, n_k = [a for a, _ in pairs], [a + b for a, b in pairs]
    borders = (tuple(int(x) for x in np.cumsum([0, *n])) for n in (n_q, n_k))
    sequences, seed = Sequences(*borders), draw(st.integers(0, 2**32 - 1))
    config = msa.MSAConfig(draw(st.integers(1, 4)), draw(st.integers(1, 5)))
    rng = np.random.default_rng(seed)
    q_idx = rng.integers(-2, 3, (sequences.total_q, 2, 2)).astype(np.float64)
    k_idx = rng.integers(-2, 3, (sequences.total_k, 2)).astype(np.float64)
    scores = reference.score_blocks(q_idx, k_idx, sequences, config)
    selection = reference.select_blocks(scores, config)
    kind = KINDS[draw(st.sampled_from(sorted(KINDS)))]
    return (
        msa.Selection(kind(selection.indices), sequences, config.block_size),
        msa.BlockScores(kind(scores.values), sequences, config.block_size),
    )


def check_falling(rows, selection, scores):
    """Own block first, the others by falling score and then rising id, -1 last; nothing lost."""
    own = np.array(selection.sequences.positions(), int) // selection.block_size
    for i, r in np.ndindex(*selection.indices.shape[:2]):
        ids = [x for x in np.asarray(rows[i, r]).tolist() if x >= 0]
        assert np.asarray(rows[i, r]).tolist()[: len(ids)] == ids
        assert ids[0] == own[i]
        keys = [(-float(scores.values[i, r, b]), b) for b in ids[1:]]
        assert keys == sorted(keys)
        kept = np.asarray(selection.indices[i, r])
        assert sorted(ids) == [x for x in kept.tolist() if x >= 0]


@given(selections(uniform=True))
def test_transformers(drawn):
    selection, scores = drawn
    sequences, top_k = selection.sequences, selection.top_k
    n_q, n_k = (t // sequences.batch for t in (sequences.total_q, sequences.total_k))
    blocks = sequences.max_blocks(selection.block_size)
    for known in (None, scores):
        ids = layouts.to_transformers(selection, known)
        groups = selection.indices.shape[1]
        assert ids.shape == (sequences.batch, groups, n_q, min(top_k, blocks))
        back = layouts.from_transformers(ids, selection.block_size, n_k, top_k)
        assert back.sequences == sequences
        assert back.indices.dtype == selection.indices.dtype
        assert bool((back.indices == selection.indices).all())
    check_falling(ids.swapaxes(1, 2).reshape(-1, groups, ids.shape[-1]), selection, scores)


@given(selections())
def test_vllm(drawn):
    selection, scores = drawn
    for known in (None, scores):
        ids = layouts.to_vllm(selection, known)
        back = layouts.from_vllm(ids, selection.sequences, selection.block_size)
        assert bool((back.indices == selection.indices).all())
    check_falling(ids.swapaxes(0, 1), selection, scores)


@given(selections(), st.integers(0, 2**32 - 1))
def test_official(drawn, seed):
    selection, _ = drawn
    ids = layouts.to_official(selection)
    own = np.array(selection.sequences.positions(), int) // selection.block_size
    for (r, i), count in np.ndenumerate(np.asarray((ids >= 0).sum(-1))):
        assert int(ids[r, i, count - 1]) == own[i]  # the local block last, behind it nothing
    shuffled = np.random.default_rng(seed).permuted(np.asarray(ids), axis=-1)
    for given_ids in (ids, shuffled):
        back = layouts.from_official(given_ids, selection.sequences, selection.block_size)
        assert (np.asarray(back.indices) == np.asarray(selection.indices)).all()


def test_what_is_no_selection():
    one = Sequences.one(2, 4)  # positions 2 and 3, blocks 1 and 1
    with pytest.raises(ValueError, match="hold each query's own block"):
        layouts.from_transformers(np.array([[[[0, -1], [1, 0]]]]), 2, n_k=4)
    with pytest.raises(ValueError, match="ascending and unique"):
        layouts.from_official(np.array([[[1, 1], [1, 0]]]), one, 2)
    with pytest.raises(ValueError, match="hold visible blocks only"):
        layouts.from_official(np.array([[[1, 2], [1, 0]]]), one, 2)
    with pytest.raises(ValueError, match=r"topk_indices must hold an id .* got -1 at query 1"):
        layouts.from_vllm(np.array([[[1, 0], [1, -1]]]), one, 2)
    with pytest.raises(ValueError, match=r"block_indices must have shape \[B, Hkv, T, k\], got"):
        layouts.from_transformers(np.zeros((2, 1, 2)), 2)
    with pytest.raises(ValueError, match="top_k must be at least the 2 ids"):
        layouts.from_transformers(np.array([[[[0, -1]]]]), 2, top_k=1)
    uneven = msa.Selection(np.zeros((3, 1, 1), np.int32), Sequences((0, 1, 3), (0, 1, 3)), 2)
    with pytest.raises(ValueError, match=r"one length for \[B, T, ...\], got .*\(1, 1\), \(2, 2\)"):
        layouts.to_transformers(uneven)


def test_vllm_ids_behind_the_visible_ones_mean_nothing():
    """Ids in unused places are dropped, because vLLM's attention counts ids by position."""
    ids = np.array([[[0, 7, 3], [1, 0, 9]]])
    selection = layouts.from_vllm(ids, Sequences.one(2, 2), block_size=1)
    assert selection.indices[:, 0].tolist() == [[0, -1, -1], [0, 1, -1]]


# -- pages ----------------------------------------------------------------------------------------
@st.composite
def caches(draw):
    """Pages in random order, tables with entries that are never read, in either kind of array."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    block, groups, dim, di = (draw(st.sampled_from(s)) for s in ((1, 2, 4), (1, 2), (1, 3), (2,)))
    lengths = np.array(draw(st.lists(st.integers(0, 3 * block), min_size=1, max_size=3)), np.int32)
    used = [-(-n // block) for n in lengths.tolist()]
    total = sum(used) + draw(st.integers(1, 2))
    free = rng.permutation(total).tolist()
    table = np.full((len(lengths), max(used) + 1), -1, np.int32)
    for s, n in enumerate(used):
        table[s, :n] = [free.pop() for _ in range(n)]
    k, v = rng.standard_normal((2, total, block, groups, dim))
    k_idx = rng.standard_normal((total, block, di))
    kind = KINDS[draw(st.sampled_from(sorted(KINDS)))]
    return msa.PagedKV(*(kind(x) for x in (k, v, k_idx, table, lengths)))


def assert_same(back, cache):
    """Both have the same pages, and the same tokens by their tables."""
    for name in ("k_pages", "v_pages", "k_idx_pages", "lengths"):
        assert bool((getattr(back, name) == getattr(cache, name)).all()), name
    for s in range(len(cache.lengths)):
        for mine, theirs in zip(back.flat(s), cache.flat(s)):
            assert bool((mine == theirs).all())


@given(caches())
def test_pages_of_official_and_vllm(cache):
    rest = cache.k_idx_pages, cache.page_table, cache.lengths
    k, v = page_layouts.to_official(cache)
    back = page_layouts.from_official(k, v, *rest)
    assert_same(back, cache)
    assert is_view(back.k_pages, cache.k_pages)
    assert bool((k[-1, -1, 0] == cache.k_pages[-1, 0, -1]).all())
    both = page_layouts.to_vllm(cache)
    back = page_layouts.from_vllm(both, *rest)
    assert_same(back, cache)
    assert is_view(back.v_pages, both)
    dim = k.shape[-1]
    assert bool((both[-1, -1, 0, :dim] == cache.k_pages[-1, 0, -1]).all())
    assert bool((both[-1, -1, 0, dim:] == cache.v_pages[-1, 0, -1]).all())


@given(caches(), st.sampled_from(["NHD", "HND"]))
def test_pages_of_flashinfer(cache, order):
    both = page_layouts.to_flashinfer(cache, order)
    rest = cache.k_idx_pages, cache.page_table, cache.lengths
    back = page_layouts.from_flashinfer(both, *rest, order)
    assert_same(back, cache)
    assert is_view(back.v_pages, both)
    token_head = (0, -1) if order == "NHD" else (-1, 0)
    assert bool((both[(-1, 1, *token_head)] == cache.v_pages[-1, 0, -1]).all())


@given(caches())
def test_slots_of_sglang(cache):
    k, v, k_idx, slots = page_layouts.to_sglang(cache)
    for s, n in enumerate(cache.lengths.tolist()):
        assert bool((k[slots[s, :n].tolist()] == cache.flat(s)[0]).all())
    block = cache.k_pages.shape[1]
    back = page_layouts.from_sglang(k, v, k_idx, slots, cache.lengths, block)
    assert_same(back, cache)
    assert is_view(back.k_pages, cache.k_pages)


@given(caches(), st.sampled_from([1, 2, 4]), st.sampled_from(["NHD", "HND"]))
def test_smaller_pages(cache, parts, order):
    block = cache.k_pages.shape[1]
    if block % parts:
        parts = 1
    k, v, table = page_layouts.to_smaller_pages(cache, block // parts, order)
    assert k.shape[1 if order == "NHD" else 2] == block // parts
    rest = cache.k_idx_pages, table, cache.lengths
    back = page_layouts.from_smaller_pages(k, v, *rest, order)
    assert_same(back, cache)
    if order == "NHD":
        assert is_view(back.k_pages, cache.k_pages)


def test_pages_that_cannot_be_taken():
    rng = np.random.default_rng(0)
    k, k_idx = rng.standard_normal((4, 2, 1, 3)), rng.standard_normal((4, 2, 2))
    cache = msa.PagedKV(k, k, k_idx, np.array([[3, 1]], np.int32), np.array([3], np.int32))
    *buffers, slots = page_layouts.to_sglang(cache)
    slots[0, 1] = 5  # the second token of a page elsewhere
    with pytest.raises(ValueError, match=r"req_to_token must .* at row 0, token 1"):
        page_layouts.from_sglang(*buffers, slots, cache.lengths, 2)
    with pytest.raises(ValueError, match="page_size must divide the block size 2, got 3"):
        page_layouts.to_smaller_pages(cache, 3)
    with pytest.raises(ValueError, match="order must be 'NHD' or 'HND', got 'DNH'"):
        page_layouts.to_flashinfer(cache, "DNH")
    wide = replace(cache, v_pages=rng.standard_normal((4, 2, 1, 5)))
    with pytest.raises(ValueError, match=r"cache.v_pages must have Dv = D = 3 here, got 5"):
        page_layouts.to_flashinfer(wide)
    scaled = replace(cache, k_scales=np.ones((4, 1), np.float32))
    for convert in ("official", "vllm", "flashinfer", "sglang", "smaller_pages"):
        with pytest.raises(ValueError, match=r"cache.k_scales must be None: each project"):
            getattr(page_layouts, f"to_{convert}")(scaled)
    with pytest.raises(ValueError, match="kv_pages must have shape"):
        page_layouts.from_vllm(k[0], k_idx, cache.page_table, cache.lengths)
