"""Sequences that grow in pages: the pool against plain lists, and decoding against prefill."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pool_machine import Pool
from pool_parts import (
    BATCH,
    BLOCK,
    CACHED,
    CONFIG,
    E4M3,
    PAGES,
    PLACES,
    SHAPES,
    attention,
    backend_of,
    close,
    drawn,
    make_pool,
    page_arrays,
    put,
    read,
    two_sequences,
)
from torch.utils._python_dispatch import TorchDispatchMode

import msa


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
    """What a CUDA graph has captured is what the pool goes on to fill."""
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


# -- tokens that others write ----------------------------------------------------------------------
def test_what_was_reserved_must_be_written_or_given_up():
    pool = two_sequences("reference")
    pool.reserve(1, 2)
    new = [drawn(3, 1)[name] for name in CACHED]
    for call in (lambda: pool.append(1, *new), lambda: pool.fork(1), lambda: pool.export(1)):
        with pytest.raises(ValueError, match=r"sequence 1 must have the 7 tokens .* got 5 .*"):
            call()
    with pytest.raises(ValueError, match="at most the 5 tokens of sequence 1, got 6"):
        pool.truncate(1, 6)
    pool.append(0, *new)  # of another sequence there is nothing to wait for
    pool.truncate(1, 5)
    pool.append(1, *new)
    assert pool.lengths == pool.cache.lengths.tolist() == [6, 6, 0]
    pool.reserve(1, 1)
    pool.cache.lengths[1] += 2  # by one who wrote too many
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
    """How many numbers operations read of each page array: all of them, unless they index it."""

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
