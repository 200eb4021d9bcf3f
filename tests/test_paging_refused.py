"""Calls on a pool that are refused or break off change nothing; tokens that lie oddly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from pool_parts import (
    BATCH,
    BLOCK,
    CACHED,
    CONFIG,
    PAGES,
    SHAPES,
    append_number,
    make_pool,
    read,
    some_tokens,
    two_sequences,
)

import msa
from msa import checks, paging


# -- nothing by halves -----------------------------------------------------------------------------
def calls_on(pool):
    """Every way to change a pool whose slots 0 and 1 share a page, and 2 is empty."""
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


def snapshot(pool):
    """All that a reader of the cache, or of the pool, can see."""
    flat = [read(x).copy() for s in range(BATCH) for x in pool.cache.flat(s)]
    tables = (pool.cache.page_table, pool.cache.lengths, pool.cache.shared)
    return flat + [read(x).copy() for x in tables] + [pool.lengths, pool.free_pages]


def spoil(array):
    """Make an array unwritable; returns what undoes it."""
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
    """A write fails, as where memory runs out: the tokens written before belong to no sequence."""
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
    """What is written to one would be read from the other; halves of one array lie apart."""
    both, k_idx_pages = make((3, 4, 2, 1, 2)), make((3, 4, 2))
    k_pages, v_pages = both[:, :, 0], both[:, :, 1]
    pool = msa.PagePool(k_pages, v_pages, k_idx_pages, batch=1)
    assert pool.free_pages == 3
    with pytest.raises(ValueError, match="v_pages must have memory of its own, got that of k_p"):
        msa.PagePool(k_pages, k_pages[...], k_idx_pages, batch=1)
    with pytest.raises(ValueError, match="k_idx_pages must have memory of its own, got that of v"):
        msa.PagePool(make((3, 4, 1, 2)), k_pages, k_pages[:, :, 0], batch=1)


def test_counts_beyond_32_bits_are_refused(monkeypatch):
    """Tensors on "meta" take no memory, so the door has to let them in."""
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


# -- tokens and pages that are the pool's own, or lie oddly ----------------------------------------
@pytest.mark.parametrize("kind", [np, torch])
def test_tokens_may_be_views_of_the_pages(kind):
    """k and v change places, while both are written to."""
    pages = [kind.zeros((4, 2, 1, 3)), kind.zeros((4, 2, 1, 3)), kind.zeros((4, 2, 3))]
    pool = msa.PagePool(*pages, batch=2)
    drawn = np.random.default_rng(0).standard_normal((3, 3, 1, 3))
    k, v, k_idx = drawn if kind is np else torch.from_numpy(drawn).float()
    pool.append(0, k, v, k_idx[:, 0])
    cache = pool.cache
    views = [x.reshape(8, *x.shape[2:])[:2] for x in pages]
    wanted = [read(views[i]).copy() for i in (1, 0, 2)]
    pool.append(0, views[1], views[0], views[2])  # the first of them into the last page
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
    """A dim of size 1 is contiguous whatever its stride is; others must be so."""
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
