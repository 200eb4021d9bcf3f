"""Sequences that grow in pages: the pool equals plain lists, and decoding equals prefill."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pool_machine import (
    BATCH,
    BLOCK,
    CACHED,
    CONFIG,
    E4M3,
    PAGES,
    SHAPES,
    Pool,
    attention,
    backend_of,
    close,
    drawn,
    make_pool,
    page_arrays,
    put,
    read,
)
from torch.utils._python_dispatch import TorchDispatchMode

import msa
from msa import checks, paging

PLACES = ["reference", "torch", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("place", PLACES)
def test_a_pool_is_a_list_of_lists(place):
    machine = type("PoolOn", (Pool,), {"place": place})
    machine.TestCase.settings = settings(max_examples=40, stateful_step_count=25)
    machine.TestCase("runTest").runTest()


@pytest.mark.parametrize("place", PLACES)
@settings(max_examples=15)
@given(total=st.integers(1, 23), seed=st.integers(0, 999))
def test_tokens_decoded_one_by_one_are_one_prefill(place, total, seed):
    tokens, pool = drawn(seed, total), make_pool(place, batch=2, pages_per_sequence=PAGES)
    whole = attention(tokens, total)
    for t in range(total):
        new = put({name: x[t : t + 1] for name, x in tokens.items()}, place)
        pool.append(1, *(new[name] for name in CACHED))
        q, q_idx = (new[name][[0, 0]][:, None] for name in ("q", "q_idx"))
        output = msa.decode(q, q_idx, pool.cache, config=CONFIG, backend=backend_of(place))
        close(output.out[1, 0], whole.out[t])
        close(output.lse[1, 0], whole.lse[t])
        assert (read(output.selection.indices) == whole.selection.indices[t]).all()


@pytest.mark.parametrize("place", PLACES)
@settings(max_examples=15)
@given(total=st.integers(2, 23), n=st.integers(2, 6), seed=st.integers(0, 999))
def test_several_queries_are_as_good_as_one_at_a_time(place, total, n, seed):
    n = min(n, total)
    these = put(drawn(seed, total), place)
    pool = make_pool(place, batch=1, pages_per_sequence=PAGES)
    pool.append(0, *(these[name] for name in CACHED))
    several = {"config": CONFIG, "backend": backend_of(place)}
    q, q_idx = (these[name][-n:][None] for name in ("q", "q_idx"))
    together = msa.decode(q, q_idx, pool.cache, **several)
    for i in range(n):
        shorter = replace(pool.cache, lengths=pool.cache.lengths - (n - 1 - i))
        alone = msa.decode(q[:, i : i + 1], q_idx[:, i : i + 1], shorter, **several)
        close(together.out[:, i], read(alone.out)[:, 0])
        close(together.lse[:, i], read(alone.lse)[:, 0])
        one, other = (read(o.selection.indices) for o in (together, alone))
        assert (one[i] == other[0]).all()


@pytest.mark.parametrize("place", PLACES)
@settings(max_examples=15)
@given(chunks=st.lists(st.integers(1, 7), min_size=1, max_size=3), seed=st.integers(0, 999))
def test_prefill_in_chunks_over_pages_is_prefill(place, chunks, seed):
    total = sum(chunks)
    tokens = drawn(seed, total)
    whole, pool = attention(tokens, total), make_pool(place, pages_per_sequence=PAGES)
    for stop, n in zip(np.cumsum(chunks).tolist(), chunks):
        new = put({name: x[stop - n : stop] for name, x in tokens.items()}, place)
        pool.append(2, *(new[name] for name in CACHED))
        k, v, k_idx = pool.cache.flat(2)
        output = msa.attention(
            new["q"], k, v, new["q_idx"], k_idx, config=CONFIG, backend=backend_of(place)
        )
        close(output.out, whole.out[stop - n : stop])
        close(output.lse, whole.lse[stop - n : stop])
        chosen = whole.selection.indices[stop - n : stop]
        assert (read(output.selection.indices) == chosen).all()


@pytest.mark.parametrize("place", PLACES)
def test_the_view_keeps_its_memory(place):
    """The arrays of the cache stay the same objects while the pool fills them."""
    pool = make_pool(place)
    before = pool.cache
    parts = [*page_arrays(before).values(), before.page_table, before.lengths]
    tokens = put(drawn(0, 3, 3), place)
    pool.append([0, 1, 2], *(tokens[name] for name in CACHED))
    pool.free(1)
    assert pool.cache is before and read(parts[-1]).tolist() == [3, 0, 3]
    for name, part in zip(("k_pages", "v_pages", "k_idx_pages", "page_table", "lengths"), parts):
        assert getattr(pool.cache, name) is part


def test_nothing_is_recorded_for_gradients():
    pool, tokens = make_pool("torch", batch=1), put(drawn(0, 1, 3), "torch")
    tokens = {name: x.requires_grad_() for name, x in tokens.items()}
    pool.append([0], *(tokens[name] for name in CACHED))
    assert not any(array.requires_grad for array in page_arrays(pool.cache).values())
    output = msa.decode(tokens["q"], tokens["q_idx"], pool.cache, config=CONFIG)
    assert not output.out.requires_grad and not output.lse.requires_grad


# -- drafts, forks, copies ------------------------------------------------------------------------
@pytest.mark.parametrize("place", PLACES)
@settings(max_examples=15)
@given(drafts=st.lists(st.integers(0, 5), min_size=1, max_size=8), seed=st.integers(0, 999))
def test_rejected_drafts_leave_no_trace(place, drafts, seed):
    """Write NaN, so that a number that is read again shows."""
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


def append_number(pool, s, number, n=1):
    new = (np.full((n, *SHAPES[name]), number) for name in CACHED)
    pool.append(s, *new)


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
    pool.truncate(1, BLOCK + 1)  # now its last page is not full, and is shared
    append_number(pool, 1, 3.0)
    assert pool.cache.page_table[:2].tolist() == [[0, 1, -1], [0, 2, -1]]
    assert first_keys(pool, 0) == [1.0] * 2 * BLOCK


def test_a_page_comes_back_with_the_last_that_holds_it():
    pool = make_pool("reference")
    append_number(pool, 0, 1.0, 2 * BLOCK)
    pool.fork(0), pool.fork(0)
    for s, free in ((0, 4), (2, 4), (2, 4), (1, 6), (0, 6)):  # one twice, and an empty slot
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
    append_number(pool, 0, 2.0)  # page 1 is not shared now
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
    """Head-major pages, or halves of wider pages: the copy is contiguous."""
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


# -- a call does all or nothing -------------------------------------------------------------------
def calls_on(pool):
    """Every method that changes a pool. Slots 0 and 1 share a page, and slot 2 is empty."""
    new, pages = some_tokens(pool, 2), pool.export(0)
    return {
        "append": lambda: pool.append(0, **new),
        "reserve": lambda: pool.reserve([2, 0], 2),
        "truncate": lambda: pool.truncate([0, 1], [1, 4]),
        "fork": lambda: pool.fork(0),
        "import_": lambda: pool.import_(pages),
        "free": lambda: pool.free(0),
    }


METHODS = ["append", "reserve", "truncate", "fork", "import_", "free"]


def some_tokens(pool, n):
    """Tokens of the kind of the pages."""
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


def snapshot(pool):
    """All that a caller can read from the cache and the pool."""
    flat = [read(x).copy() for s in range(BATCH) for x in pool.cache.flat(s)]
    tables = (pool.cache.page_table, pool.cache.lengths, pool.cache.shared)
    return flat + [read(x).copy() for x in tables] + [pool.lengths, pool.free_pages]


def spoil(array):
    """Make an array read-only; returns a function that undoes this."""
    if isinstance(array, torch.Tensor):
        array.requires_grad_()
        return lambda: array.requires_grad_(False)
    array.flags.writeable = False
    return lambda: setattr(array.flags, "writeable", True)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place, part", [
    ("reference", "k_pages"), ("reference", "page_table"), ("reference", "lengths"),
    ("torch", "v_pages"), ("torch", "k_idx_pages"),
])  # fmt: skip
def test_what_cannot_be_written_is_refused_before_it_counts(place, part, method):
    pool = two_sequences(place)
    call, before = calls_on(pool)[method], snapshot(pool)
    restore = spoil(getattr(pool.cache, part))
    with pytest.raises(ValueError, match=f"cache.{part} must"):
        call()
    restore()
    for found, want in zip(snapshot(pool), before):
        np.testing.assert_array_equal(found, want)
    call()


@pytest.mark.parametrize("method", METHODS)
def test_tensors_of_inference_mode_are_for_inference_mode(method):
    with torch.inference_mode():
        pool = two_sequences("torch")
        call, before = calls_on(pool)[method], snapshot(pool)
    with pytest.raises(ValueError, match=r"k_pages must not be a tensor of torch.inference_mode"):
        call()
    with torch.inference_mode():
        for found, want in zip(snapshot(pool), before):
            np.testing.assert_array_equal(found, want)
        call()


@pytest.mark.parametrize("eight", [(), CACHED], ids=",".join)
@pytest.mark.parametrize("step, method", [
    ("write_tokens", "append"), ("put_in", "import_"), ("copy_pages", "reserve"),
    *(("enter", method) for method in METHODS),
])  # fmt: skip
def test_what_breaks_off_is_not_counted(monkeypatch, eight, method, step):
    """A write fails, as if memory ran out. What was written before belongs to no sequence."""
    pool = two_sequences("torch", eight)
    call, before = calls_on(pool)[method], snapshot(pool)
    whole = getattr(msa.paging.page_arrays, step)

    def break_off(cache, *arguments):
        if step != "enter":
            whole(cache, *arguments)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(msa.paging.page_arrays, step, break_off)
    with pytest.raises(RuntimeError, match="out of memory"):
        call()
    for found, want in zip(snapshot(pool), before):
        np.testing.assert_array_equal(found, want)
    monkeypatch.undo()
    call()


def made_in_inference(x):
    with torch.inference_mode():
        return torch.tensor(x)


def read_only(x):
    x.flags.writeable = False
    return x


@pytest.mark.parametrize("spoiled, wanted", [
    (read_only, "read-only"),
    (lambda x: np.broadcast_to(x[:1], x.shape), "strides"),
    (lambda x: np.lib.stride_tricks.as_strided(x, x.shape, (0, *x.strides[1:])), "strides"),
    (lambda x: torch.tensor(x)[:1].expand(x.shape), "strides"),
    (lambda x: torch.tensor(x, requires_grad=True), "gradient"),
    (lambda x: torch.tensor(x, requires_grad=True) * 2, "gradient"),
    (made_in_inference, "inference_mode"),
])  # fmt: skip
@pytest.mark.parametrize("name", CACHED)
def test_pages_that_cannot_be_written_make_no_pool(name, spoiled, wanted):
    pages = {f"{n}_pages": np.zeros((PAGES, BLOCK, *SHAPES[n])) for n in CACHED}
    bad = spoiled(pages[f"{name}_pages"])
    if isinstance(bad, torch.Tensor):
        pages = {n: torch.tensor(x) for n, x in pages.items()}
    with pytest.raises(ValueError, match=f"{name}_pages must .*{wanted}"):
        msa.PagePool(**(pages | {f"{name}_pages": bad}), batch=1)


@pytest.mark.parametrize("make", [np.zeros, torch.zeros])
def test_keys_and_values_do_not_share_memory(make):
    """Arrays with the same memory are refused; halves of one array are not the same memory."""
    both, k_idx_pages = make((3, 4, 2, 1, 2)), make((3, 4, 2))
    k_pages, v_pages = both[:, :, 0], both[:, :, 1]
    pool = msa.PagePool(k_pages, v_pages, k_idx_pages, batch=1)
    assert pool.free_pages == 3
    with pytest.raises(ValueError, match="v_pages must have memory of its own, got that of k_p"):
        msa.PagePool(k_pages, k_pages[...], k_idx_pages, batch=1)
    with pytest.raises(ValueError, match="k_idx_pages must have memory of its own, got that of v"):
        msa.PagePool(make((3, 4, 1, 2)), k_pages, k_pages[:, :, 0], batch=1)


def test_counts_beyond_32_bits_are_refused(monkeypatch):
    """Tensors on "meta" take no memory. The checks accept them here."""
    monkeypatch.setattr(checks.arrays, "check_plain", lambda name, array: None)
    shapes = [(2, 2**30, 1, 1)] * 2 + [(2, 2**30, 1)]
    pool = msa.PagePool(*(torch.empty(shape, device="meta") for shape in shapes), batch=1)
    pool.reserve(0, 2**31 - 1)
    with pytest.raises(ValueError, match=r"n must leave sequence 0 with at most 2147483647 tokens"):
        pool.reserve(0, 1)
    assert pool.lengths == [2**31 - 1]
    small = make_pool("reference")
    for n in (2**31, 2**63, 2**70):
        with pytest.raises(ValueError, match="page_table must have"):
            small.reserve(0, n)
    many = (torch.empty(2**31, 1, *rest, device="meta") for rest in ((1, 1), (1, 1), (1,)))
    with pytest.raises(ValueError, match="k_pages must have at most 2147483647 pages"):
        msa.PagePool(*many, batch=1, pages_per_sequence=1)


def exported(**changes):
    pool = two_sequences("reference")
    return replace(pool.export(0), **changes)


@pytest.mark.parametrize("call, kind, words", [
    (lambda p: p.truncate(0, -1), ValueError, "length must be at least 0, got -1"),
    (lambda p: p.truncate(0, 1.0), TypeError, "length must be an integer"),
    (lambda p: p.truncate(0, True), TypeError, "length must be an integer"),
    (lambda p: p.truncate(0, 6), ValueError, "at most the 5 tokens of sequence 0, got 6"),
    (lambda p: p.truncate(2, 1), ValueError, "at most the 0 tokens of sequence 2, got 1"),
    (lambda p: p.truncate([0, 1], [2, 6]), ValueError, "at most the 5 tokens of sequence 1"),
    (lambda p: p.truncate([0, 1], [2]), ValueError, "one for each of the 2 sequences, got 1"),
    (lambda p: p.truncate([0, 0], 2), ValueError, "name each sequence once"),
    (lambda p: p.truncate(3, 0), ValueError, "sequence must be 0 to 2, got 3"),
    (lambda p: p.fork(3), ValueError, "sequence must be 0 to 2, got 3"),
    (lambda p: p.fork(-1), ValueError, "sequence must be at least 0, got -1"),
    (lambda p: p.fork([0]), TypeError, "sequence must be an integer"),
    (lambda p: p.fork(2), ValueError, "sequence must have tokens, got 2, an empty slot"),
    (lambda p: p.fork(0, 0), ValueError, "into must be an empty slot, got 0, which has 5"),
    (lambda p: p.fork(0, 3), ValueError, "into must be 0 to 2, got 3"),
    (lambda p: p.fork(0, -1), ValueError, "into must be at least 0, got -1"),
    (lambda p: p.fork(0, 2.0), TypeError, "into must be an integer"),
    (lambda p: (p.fork(0), p.fork(0)), ValueError, "into must be an empty slot, got none left"),
    (lambda p: p.export(2), ValueError, "sequence must have tokens, got 2"),
    (lambda p: p.export(7), ValueError, "sequence must be 0 to 2, got 7"),
    (lambda p: p.import_(p.cache), TypeError, "pages must be a msa.SequencePages"),
    (lambda p: p.import_(exported(), 1), ValueError, "into must be an empty slot, got 1"),
    (lambda p: p.import_(exported(length=0)), ValueError, "pages.length must be at least 1"),
    (lambda p: p.import_(exported(length=9)), ValueError, r"pages.k must .* \[3, 4, 2, 3\]"),
    (lambda p: p.import_(exported(length=5.0)), TypeError, "pages.length must be an integer"),
    (lambda p: p.import_(exported(k=exported().v)), ValueError,
     r"pages.k must .* got \[2, 4, 2, 2\]"),
    (lambda p: p.import_(exported(v=[1.0])), TypeError, "pages.v must be a NumPy array or"),
    (lambda p: p.import_(exported(k_idx=exported().k_idx.astype(np.float32))), TypeError,
     "pages.k_idx must have the dtype of the pool's .*float64, got float32"),
    (lambda p: p.import_(exported(k_scales=np.ones((2, 2), np.float32))), ValueError,
     "pages.k_scales must be None"),
])  # fmt: skip
def test_bad_input_is_named_and_changes_nothing(as_users_run_it, call, kind, words):
    pool = two_sequences("reference")
    before = snapshot(pool)
    with pytest.raises(kind, match=words):
        call(pool)
    if "none left" not in words:
        for found, want in zip(snapshot(pool), before):
            np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("shared, kind, words", [
    (np.zeros(PAGES), TypeError, "must have dtype uint8, got float64"),
    (np.zeros(PAGES + 1, np.uint8), ValueError, r"must have shape \[pages\] = \[6\], got \[7\]"),
    (np.zeros(2 * PAGES, np.uint8)[::2], ValueError, "must be contiguous in its last dim"),
    (torch.zeros(PAGES, dtype=torch.uint8), TypeError, "must be a numpy.ndarray"),
])  # fmt: skip
def test_which_pages_are_shared_is_checked(as_users_run_it, shared, kind, words):
    cache = replace(two_sequences("reference").cache, shared=shared)
    q, q_idx = (np.ones((BATCH, 1, *SHAPES[name])) for name in ("q", "q_idx"))
    with pytest.raises(kind, match=f"cache.shared {words}"):
        msa.decode(q, q_idx, cache, config=CONFIG)


def test_an_export_too_long_for_the_table_or_the_pool_is_refused():
    long = make_pool("reference", pages=9, pages_per_sequence=9)
    append_number(long, 0, 1.0, 4 * BLOCK)
    pages = long.export(0)
    with pytest.raises(ValueError, match="page_table must have 4 entries"):
        make_pool("reference").import_(pages)
    with pytest.raises(ValueError, match="4 free pages"):
        make_pool("reference", pages=3, pages_per_sequence=9).import_(pages)


# -- tokens that the caller's code writes ---------------------------------------------------------
def test_what_was_reserved_must_be_written_or_given_up():
    pool = two_sequences("reference")
    pool.reserve(1, 2)
    new = [drawn(3, 1)[name] for name in CACHED]
    for call in (lambda: pool.append(1, *new), lambda: pool.fork(1), lambda: pool.export(1)):
        with pytest.raises(ValueError, match=r"sequence 1 must have the 7 tokens .* got 5 .*"):
            call()
    with pytest.raises(ValueError, match="at most the 5 tokens of sequence 1, got 6"):
        pool.truncate(1, 6)
    pool.append(0, *new)  # other sequences have no reserved tokens
    pool.truncate(1, 5)
    pool.append(1, *new)
    assert pool.lengths == pool.cache.lengths.tolist() == [6, 6, 0]
    pool.reserve(1, 1)
    pool.cache.lengths[1] += 2  # as if too many tokens were written
    for call in (lambda: pool.append(1, *new), lambda: pool.fork(1), lambda: pool.export(1)):
        with pytest.raises(ValueError, match=r"sequence 1 must have the 7 tokens .* got 8 .*"):
            call()
    with pytest.raises(ValueError, match="at most the 7 tokens of sequence 1, got 8"):
        pool.truncate(1, 8)
    pool.truncate(1, 7)
    assert pool.fork(1) == 2


def test_many_queries_go_in_tiles(monkeypatch):
    tokens, pool = put(drawn(0, BATCH, 9), "torch"), make_pool("torch", pages=9)
    pool.append([0, 2], *(tokens[name][:2] for name in CACHED))
    arguments = tokens["q"], tokens["q_idx"], pool.cache
    whole = msa.decode(*arguments, config=CONFIG)
    monkeypatch.setattr(
        "msa.torch_impl.scheduled_tiles.CPU_BUFFER", 400
    )  # numbers, 80 a query: 18 = 5 + 5 + 5 + 3
    tiled = msa.decode(*arguments, config=CONFIG)
    close(tiled.out, whole.out)
    close(tiled.lse, whole.lse)


class Reads(TorchDispatchMode):
    """Counts the numbers that operations read of each page array: all, unless they index it."""

    def __init__(self, pool):
        super().__init__()
        arrays = page_arrays(pool.cache)
        self.names = {x.untyped_storage().data_ptr(): name for name, x in arrays.items()}
        self.found = dict.fromkeys(arrays, 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in args:
            name = isinstance(x, torch.Tensor) and self.names.get(x.untyped_storage().data_ptr())
            if name and not function.is_view:
                indexed = function is torch.ops.aten.index.Tensor
                self.found[name] += result.numel() if indexed else x.numel()
        return result


@pytest.mark.parametrize("dtype", [torch.float32, E4M3])
@pytest.mark.parametrize("n", [1, 3])
def test_decoding_reads_all_index_keys_but_selected_keys_only(n, dtype):
    tokens, per_query = 64 * BLOCK, CONFIG.top_k * BLOCK
    empty = (torch.full((64, BLOCK, *SHAPES[name]), torch.nan).to(dtype) for name in CACHED)
    pool = msa.PagePool(*empty, batch=1)
    these = {name: x.float() for name, x in put(drawn(0, tokens), "torch").items()}
    pool.append(0, *(these[name] for name in CACHED))
    q, q_idx = (these[name][-n:][None] for name in ("q", "q_idx"))
    with Reads(pool) as reads:
        msa.decode(q, q_idx, pool.cache, config=CONFIG)
    per_token = {name: int(np.prod(SHAPES[name])) for name in CACHED}
    assert reads.found == {
        "k": n * per_query * per_token["k"],
        "v": n * per_query * per_token["v"],
        "k_idx": tokens * per_token["k_idx"],
    }


# -- tokens that are views of the pool's pages, and unusual strides -------------------------------
@pytest.mark.parametrize("kind", [np, torch])
def test_tokens_may_be_views_of_the_pages(kind):
    """The new k are views of the pages of v and the reverse, while both are written to."""
    pages = [kind.zeros((4, 2, 1, 3)), kind.zeros((4, 2, 1, 3)), kind.zeros((4, 2, 3))]
    pool = msa.PagePool(*pages, batch=2)
    drawn = np.random.default_rng(0).standard_normal((3, 3, 1, 3))
    k, v, k_idx = drawn if kind is np else torch.from_numpy(drawn).float()
    pool.append(0, k, v, k_idx[:, 0])
    cache = pool.cache
    views = [x.reshape(8, *x.shape[2:])[:2] for x in pages]
    wanted = [read(views[i]).copy() for i in (1, 0, 2)]
    pool.append(0, views[1], views[0], views[2])  # the first token goes into the last page
    for found, want in zip(cache.flat(0), wanted):
        np.testing.assert_array_equal(read(found)[3:], want)


@pytest.mark.parametrize("kind", [np, torch])
def test_pages_of_the_pool_itself_are_taken_in(kind):
    pages = [kind.ones((4, 2, 1, 3)), kind.ones((4, 2, 1, 3)), kind.ones((4, 2, 3))]
    pool = msa.PagePool(*pages, batch=2)
    pool.append(0, *(x.reshape(8, *x.shape[2:])[:3] * 5 for x in pages))
    slot = pool.import_(msa.SequencePages(3, *(x[:2] for x in pages)))
    for found, want in zip(pool.cache.flat(slot), pool.cache.flat(0)):
        np.testing.assert_array_equal(read(found), read(want))


@pytest.mark.parametrize("like", [np, torch])
@pytest.mark.parametrize("kind", [np, torch])
def test_pages_of_one_number_may_have_any_last_stride(kind, like):
    """A last dim of size 1 is contiguous with any stride; others must have stride 1."""
    made = {
        n: one.ones((4, 2, 1, 6), dtype=one.float32) for n, one in (("pool", like), ("given", kind))
    }
    k_pages, v_pages = (made["pool"] * x for x in (1, 1))
    pool = msa.PagePool(k_pages, v_pages, made["pool"][..., 0, ::6], batch=1)
    given = made["given"] * 7
    pages = msa.SequencePages(4, given[:2], given[:2], given[:2, :, 0, ::6])
    pool.import_(pages)
    assert all((read(x) == 7).all() for x in pool.cache.flat(0))
    if kind is like:
        wide = kind.ones((2, 2, 1, 12), dtype=kind.float32)[..., ::2]
        with pytest.raises(ValueError, match="v must be contiguous in its last dim, got str"):
            pool.import_(replace(pages, v=wide))


@pytest.mark.parametrize("batch", [2**31 - 1, 10**18, 10**30])
def test_a_table_beyond_32_bits_is_refused(batch):
    k_pages, v_pages = np.zeros((2, 3, 2, 1, 1))
    with pytest.raises(ValueError, match="batch must leave the page table with at most 2147483647"):
        msa.PagePool(k_pages, v_pages, np.zeros((3, 2, 1)), batch=batch)


def test_a_table_without_memory_is_refused(monkeypatch):
    def no_memory(*_):
        raise MemoryError

    monkeypatch.setattr(paging, "PageBook", no_memory)
    with pytest.raises(ValueError, match="batch must leave the page table with a size that fits"):
        make_pool("reference")
