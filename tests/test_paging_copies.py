"""Pages that sequences share: drafts that are rejected, forks, copies into another pool."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pool_parts import (
    BATCH,
    BLOCK,
    CACHED,
    CONFIG,
    PAGES,
    PLACES,
    SHAPES,
    append_number,
    attention,
    backend_of,
    close,
    drawn,
    make_pool,
    put,
    read,
)

import msa


# -- drafts, forks, copies -------------------------------------------------------------------------
@pytest.mark.parametrize("place", PLACES)
@settings(max_examples=15)
@given(drafts=st.lists(st.integers(0, 5), min_size=1, max_size=8), seed=st.integers(0, 999))
def test_rejected_drafts_leave_no_trace(place, drafts, seed):
    """Of NaN, so that any of them that is read again would show."""
    tokens, pool = drawn(seed, len(drafts)), make_pool(place, batch=2, pages_per_sequence=PAGES)
    whole = attention(tokens, len(drafts))
    for t, rejected in enumerate(drafts):
        new = {name: np.full((1 + rejected, *dims), np.nan) for name, dims in SHAPES.items()}
        for name, x in new.items():
            x[0] = tokens[name][t]
        new = put(new, place)
        pool.append(1, *(new[name] for name in CACHED))
        pool.truncate(1, t + 1)
        q, q_idx = (new[name][[0, 0]][:, None] for name in ("q", "q_idx"))
        output = msa.decode(q, q_idx, pool.cache, config=CONFIG, backend=backend_of(place))
        close(output.out[1, 0], whole.out[t])
        close(output.lse[1, 0], whole.lse[t])
        assert (read(output.selection.indices) == whole.selection.indices[t]).all()


def first_keys(pool, s):
    return pool.cache.flat(s)[0][:, 0, 0].tolist()


@pytest.mark.parametrize("first", [0, 1])
def test_the_first_to_append_copies_the_last_page(first):
    pool, second = make_pool("reference"), 1 - first
    append_number(pool, 0, 1.0, 5)
    assert pool.fork(0) == 1 and pool.free_pages == PAGES - 2
    assert pool.cache.page_table.tolist() == [[0, 1, -1], [0, 1, -1], [-1, -1, -1]]
    append_number(pool, first, 2.0, 0)
    assert pool.free_pages == PAGES - 2, "no token, no copy"
    append_number(pool, first, 2.0)
    append_number(pool, second, 3.0)
    assert pool.cache.page_table[[first, second]].tolist() == [[0, 2, -1], [0, 1, -1]]
    assert first_keys(pool, first) == [1.0] * 5 + [2.0]
    assert first_keys(pool, second) == [1.0] * 5 + [3.0]
    assert pool.cache.shared.tolist() == [1, 0, 0, 0, 0, 0]


def test_one_call_for_all_that_share_a_page_leaves_it_to_the_last():
    pool = make_pool("reference")
    append_number(pool, 0, 1.0, 6)
    assert [pool.fork(0), pool.fork(1)] == [1, 2]
    pool.append([2, 0, 1], *(np.full((3, 1, *SHAPES[name]), 2.0) for name in CACHED))
    assert pool.cache.page_table[:, 1].tolist() == [3, 1, 2] and pool.free_pages == PAGES - 4


def test_full_pages_are_never_copied():
    pool = make_pool("reference")
    append_number(pool, 0, 1.0, 2 * BLOCK)
    pool.fork(0)
    append_number(pool, 1, 2.0)
    assert pool.cache.page_table.tolist() == [[0, 1, -1], [0, 1, 2], [-1, -1, -1]]
    pool.truncate(1, BLOCK + 1)  # now its last page is not full, and not its own
    append_number(pool, 1, 3.0)
    assert pool.cache.page_table[:2].tolist() == [[0, 1, -1], [0, 2, -1]]
    assert first_keys(pool, 0) == [1.0] * 2 * BLOCK


def test_a_page_comes_back_with_the_last_that_holds_it():
    pool = make_pool("reference")
    append_number(pool, 0, 1.0, 2 * BLOCK)
    pool.fork(0), pool.fork(0)
    for s, free in ((0, 4), (2, 4), (2, 4), (1, 6), (0, 6)):  # one of them twice, and an empty slot
        pool.free(s)
        assert pool.free_pages == free
    assert not pool.cache.shared.any()


def test_a_pool_that_is_full_has_no_page_for_a_copy():
    pool = make_pool("reference", pages=2)
    append_number(pool, 0, 1.0, 5)
    pool.fork(0)
    state = pool.lengths, pool.cache.page_table.copy(), pool.cache.k_pages.copy()
    for call in (lambda: append_number(pool, 1, 2.0), lambda: pool.reserve([0, 1], 1)):
        with pytest.raises(ValueError, match=r"1 free pages .* got 0"):
            call()
    for found, want in zip((pool.lengths, pool.cache.page_table, pool.cache.k_pages), state):
        np.testing.assert_array_equal(found, want)
    pool.truncate(1, 3)
    append_number(pool, 0, 2.0)  # page 1 is its own now
    assert first_keys(pool, 0) == [1.0] * 5 + [2.0] and first_keys(pool, 1) == [1.0] * 3


@pytest.mark.parametrize("there", PLACES)
@pytest.mark.parametrize("place", PLACES)
def test_another_pool_takes_in_what_one_has_exported(place, there):
    tokens = drawn(7, 10)
    pool, other = make_pool(place), make_pool(there, pages=9, batch=2, pages_per_sequence=7)
    pool.append(2, *put({name: tokens[name] for name in CACHED}, place).values())
    pages = pool.export(2)
    pool.free(2)
    assert other.import_(pages, into=1) == 1 and other.lengths == [0, 10]
    for name, found in zip(CACHED, other.cache.flat(1)):
        np.testing.assert_array_equal(read(found), tokens[name], strict=True)


def test_an_export_has_memory_of_its_own():
    pool = make_pool("torch")
    pool.append(0, *put({name: drawn(0, 5)[name] for name in CACHED}, "torch").values())
    pages = pool.export(0)
    pool.cache.k_pages.fill_(torch.nan)
    assert not pages.k.isnan().any() and not pages.k.flatten(0, 1)[5:].any()


@pytest.mark.parametrize("name", CACHED)
def test_pages_of_any_layout_are_exported_whole(name):
    """Head-major pages, and halves of wider ones: the copy is contiguous all the same."""
    dims = SHAPES[name]
    for kind in (np, torch):
        pages = {n: kind.zeros((PAGES, BLOCK, *SHAPES[n])) for n in CACHED}
        wide = kind.full((*dims[:-1], PAGES, BLOCK, 2 * dims[-1]), np.nan)
        pages[name] = np.moveaxis(wide, 0, 2) if kind is np else wide.movedim(0, 2)
        if len(dims) == 1:
            pages[name] = wide
        pages[name] = pages[name][..., : dims[-1]]
        pool = msa.PagePool(*pages.values(), batch=2)
        tokens = {n: kind.ones((BLOCK + 1, *SHAPES[n])) for n in CACHED}
        pool.append(0, **tokens)
        pages = getattr(pool.export(0), name)
        flat = pages.reshape(-1, *dims)
        assert (flat[: BLOCK + 1] == 1).all() and (flat[BLOCK + 1 :] == 0).all()
        pool.import_(pool.export(0))
        assert (pool.cache.flat(1)[CACHED.index(name)] == 1).all()


@pytest.mark.parametrize("place", PLACES)
def test_no_pages_no_sequences(place):
    pool = make_pool(place, pages=0)
    with pytest.raises(ValueError, match="1 free pages"):
        pool.reserve(0, 1)
    pool.truncate([0, 2], 0)
    pool.truncate([], [])
    pool.reserve([], 5)
    assert (pool.lengths, pool.free_pages) == ([0] * BATCH, 0)
