"""Sequences that grow in pages: the pool against plain lists, and decoding against prefill."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch.utils._python_dispatch import TorchDispatchMode

import msa

BLOCK, BATCH, PAGES, WIDTH = 4, 3, 6, 3
CONFIG = msa.MSAConfig(block_size=BLOCK, top_k=2)
SHAPES = {"k": (2, 3), "v": (2, 2), "k_idx": (3,), "q": (4, 3), "q_idx": (2, 3)}
CACHED = ("k", "v", "k_idx")
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
    return array.cpu().numpy() if isinstance(array, torch.Tensor) else array


def make_pool(place, pages=PAGES, **sizes):
    """Pages full of NaN."""
    empty = {name: np.full((pages, BLOCK, *SHAPES[name]), np.nan) for name in CACHED}
    sizes = {"batch": BATCH, "pages_per_sequence": WIDTH} | sizes
    return msa.PagePool(*put(empty, place).values(), **sizes)


def page_arrays(cache):
    return {name: getattr(cache, f"{name}_pages") for name in CACHED}


def attention(tokens, n):
    """What the spec says of the last n of some tokens."""
    queries = [tokens[name][len(tokens["k"]) - n :] for name in ("q", "q_idx")]
    q, q_idx = queries
    k, v, k_idx = (tokens[name] for name in CACHED)
    return msa.attention(q, k, v, q_idx, k_idx, config=CONFIG, backend="reference")


def close(found, want):
    np.testing.assert_allclose(read(found), want, rtol=1e-6, atol=1e-12)


class Pool(RuleBasedStateMachine):
    """A pool beside a plain list of tokens for each sequence.

    Wherever the lists have no token the pages hold NaN: at first, and again when a page comes back.
    """

    place = "reference"

    @initialize()
    def start(self):
        self.pool = make_pool(self.place)
        self.lists = [{name: np.zeros((0, *SHAPES[name])) for name in SHAPES} for _ in range(BATCH)]

    def length(self, s):
        return len(self.lists[s]["k"])

    def add(self, sequence, n, seed):
        """Append to one sequence or to several; too much of it must be refused."""
        ids = [sequence] if isinstance(sequence, int) else sequence
        new = drawn(seed, len(ids), n)
        given = new if sequence is ids else {name: x[0] for name, x in new.items()}
        blocks = [-(-(self.length(s) + n) // BLOCK) for s in ids]
        more = sum(blocks) - sum(-(-self.length(s) // BLOCK) for s in ids)
        arguments = [put(given, self.place)[name] for name in CACHED]
        if max(blocks, default=0) > WIDTH or more > self.pool.free_pages:
            wanted = "page_table must have" if max(blocks) > WIDTH else "free pages"
            with pytest.raises(ValueError, match=wanted):
                self.pool.append(sequence, *arguments)
            return
        self.pool.append(sequence, *arguments)
        for i, s in enumerate(ids):
            self.lists[s] = {
                name: np.concatenate([x, new[name][i]]) for name, x in self.lists[s].items()
            }

    @rule(s=st.integers(0, BATCH - 1), n=st.integers(0, 3), seed=st.integers(0, 999))
    def append_to_one(self, s, n, seed):
        self.add(s, n, seed)

    @rule(ids=st.permutations(range(BATCH)), count=st.integers(0, BATCH), n=st.integers(1, 3),
          seed=st.integers(0, 999))  # fmt: skip
    def append_to_several(self, ids, count, n, seed):
        self.add(ids[:count], n, seed)

    @rule(s=st.integers(0, BATCH - 1))
    def free(self, s):
        own = read(self.pool.cache.page_table)[s, : -(-self.length(s) // BLOCK)].tolist()
        self.pool.free(s)
        self.lists[s] = {name: x[:0] for name, x in self.lists[s].items()}
        for array in page_arrays(self.pool.cache).values():
            array[own] = np.nan

    @precondition(lambda self: any(map(self.length, range(BATCH))))
    @rule(n=st.integers(1, 3))
    def decode(self, n):
        n = min([n, *filter(None, map(self.length, range(BATCH)))])
        self.check_decode(self.pool.cache, range(BATCH), n)

    @rule(s=st.integers(0, BATCH - 1), n=st.integers(1, 3))
    def decode_beside_poison(self, s, n):
        """Everything that is not this sequence's is NaN."""
        cache = self.pool.cache
        own = read(cache.page_table)[s, : -(-self.length(s) // BLOCK)].tolist()
        poisoned = {}
        for name, array in page_arrays(cache).items():
            poisoned[f"{name}_pages"] = array * np.nan
            poisoned[f"{name}_pages"][own] = array[own]
        lengths = cache.lengths * 0
        lengths[s] = self.length(s)
        lonely = replace(cache, **poisoned, lengths=lengths)
        self.check_decode(lonely, [s], min(n, self.length(s) or n))

    def check_decode(self, cache, ids, n):
        ids = [s for s in ids if self.length(s)]
        queries = {name: np.ones((BATCH, n, *SHAPES[name])) for name in ("q", "q_idx")}
        for s in ids:
            for name, x in queries.items():
                x[s] = self.lists[s][name][-n:]
        q, q_idx = put(queries, self.place).values()
        output = msa.decode(q, q_idx, cache, config=CONFIG, backend=backend_of(self.place))
        selected = read(output.selection.indices)
        assert len(selected) == n * len(ids)
        for i, s in enumerate(ids):
            want = attention(self.lists[s], n)
            close(output.out[s], want.out)
            close(output.lse[s], want.lse)
            np.testing.assert_array_equal(
                selected[i * n : (i + 1) * n], want.selection.indices, strict=True
            )
        for s in set(range(BATCH)) - set(ids):
            assert (read(output.out[s]) == 0).all() and (read(output.lse[s]) == -np.inf).all()

    @invariant()
    def memory_is_what_the_lists_say(self):
        """To the byte: each token in its place, NaN in all the others, no page with two owners."""
        table, pages = read(self.pool.cache.page_table), page_arrays(self.pool.cache)
        want = {name: np.full(array.shape, np.nan) for name, array in pages.items()}
        owned = []
        for s, tokens in enumerate(self.lists):
            blocks = -(-self.length(s) // BLOCK)
            owned += table[s, :blocks].tolist()
            assert (table[s, blocks:] == -1).all()
            for j in range(self.length(s)):
                for name in CACHED:
                    want[name][table[s, j // BLOCK], j % BLOCK] = tokens[name][j]
            for found, name in zip(self.pool.cache.flat(s), CACHED):
                np.testing.assert_array_equal(read(found), tokens[name], strict=True)
        for name, array in pages.items():
            np.testing.assert_array_equal(read(array), want[name], strict=True)
        assert len(set(owned)) == len(owned) and set(owned) <= set(range(PAGES))
        assert self.pool.free_pages == PAGES - len(owned)
        lengths = [self.length(s) for s in range(BATCH)]
        assert self.pool.lengths == lengths == read(self.pool.cache.lengths).tolist()


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


def test_many_queries_go_in_tiles(monkeypatch):
    tokens, pool = put(drawn(0, BATCH, 9), "torch"), make_pool("torch", pages=9)
    pool.append([0, 2], *(tokens[name][:2] for name in CACHED))
    arguments = tokens["q"], tokens["q_idx"], pool.cache
    whole = msa.decode(*arguments, config=CONFIG)
    monkeypatch.setattr(
        "msa.torch_impl.lowering.CPU_BUFFER", 400
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


@pytest.mark.parametrize("n", [1, 3])
def test_decoding_reads_all_index_keys_but_selected_keys_only(n):
    tokens, per_query = 64 * BLOCK, CONFIG.top_k * BLOCK
    empty = (torch.full((64, BLOCK, *SHAPES[name]), torch.nan) for name in CACHED)
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
