"""A pool, and changes made by the device: appending kernels, captured graphs, streams."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pool_parts import CACHED, read
from test_triton_decode import BLOCK, CUDA, EIGHT, check, drawn, make_pool, spec

import msa

pytestmark = [pytest.mark.gpu] * CUDA
CONFIG = msa.MSAConfig(BLOCK, top_k=2)
SLOTS = [0, 1, 3]


def keys(tokens):
    return [tokens[name] for name in CACHED]


def contents(pool):
    """The bits of all arrays of the cache, except for the sign of NaN."""
    return {name: read(x).copy() for name, x in vars(pool.cache).items() if x is not None}


class Beams:
    """Three sequences that begin with the same tokens, in slots 0, 1 and 3 of four, and a list of
    the tokens of each."""

    def __init__(self, length, eight=()):
        self.pool = make_pool(4, 16, eight, pages_per_sequence=6)
        first = drawn(length, length)
        self.pool.append(0, *keys(first))
        self.pool.fork(0), self.pool.fork(0, into=3)
        self.lists = {s: first for s in SLOTS}

    def step(self, new):
        """A step that a graph can capture."""
        msa.append_tokens(self.pool.cache, *keys(new))
        return msa.decode(new["q"], new["q_idx"], self.pool.cache, config=CONFIG, backend="triton")

    def go_on(self, new, cuts, step):
        """Add tokens [4, n] to all lists; then remove some of the last tokens of each list."""
        n = new["k"].shape[1]
        self.pool.reserve(SLOTS, n)
        output = step(new)
        for s, cut in zip(SLOTS, cuts):
            tokens = {name: torch.cat([x, new[name][s]]) for name, x in self.lists[s].items()}
            check(output, s, spec(tokens, n, CONFIG))
            kept = max(n, len(tokens["k"]) - cut)
            self.lists[s] = {name: x[:kept] for name, x in tokens.items()}
        assert not output.out[2].any() and (output.lse[2] == -torch.inf).all()
        self.pool.truncate(SLOTS, [len(self.lists[s]["k"]) for s in SLOTS])
        assert self.pool.cache.lengths.tolist() == self.pool.lengths
        for s in SLOTS:
            for found, want in zip(self.pool.cache.flat(s), keys(self.lists[s])):
                assert torch.equal(found, want)


STEPS = st.lists(st.tuples(st.integers(1, 3), *[st.integers(0, 20)] * 3), min_size=1, max_size=3)


@pytest.mark.parametrize("eight", EIGHT if CUDA else [()])  # the interpreter rounds e4m3 wrongly
@settings(max_examples=20 if CUDA else 1)
@given(length=st.integers(14, 18), steps=STEPS, seed=st.integers(0, 999))
@example(length=14, steps=[(3, 0, 2, 5), (1, 1, 0, 9)], seed=0)
def test_beams_grow_apart_on_the_device(eight, length, steps, seed):
    beams = Beams(length, eight)
    for i, (n, *cuts) in enumerate(steps):
        beams.go_on(drawn(seed + i, 4, n), cuts, beams.step)


@pytest.mark.parametrize("eight", EIGHT if CUDA else [()])
@pytest.mark.parametrize("n", [1, 13])  # within the page, and on to a page that does not exist
def test_a_shared_page_is_not_written_without_a_reserve(eight, n):
    beams = Beams(2 * BLOCK + 4, eight)
    before = contents(beams.pool)
    msa.append_tokens(beams.pool.cache, *keys(drawn(1, 4, n)))
    for name, found in contents(beams.pool).items():
        np.testing.assert_array_equal(found, before[name], name)


def test_a_page_that_was_cut_is_not_written_without_a_reserve():
    """The page was full when it was shared, and one of the two sequences was truncated since."""
    pool = make_pool(2, 4)
    pool.append(0, *keys(drawn(0, BLOCK)))
    pool.fork(0)
    pool.truncate(1, 3)
    before = contents(pool)
    msa.append_tokens(pool.cache, *keys(drawn(1, 2, 1)))
    for name, found in contents(pool).items():
        np.testing.assert_array_equal(found, before[name], name)
    pool.reserve(1, 1)
    msa.append_tokens(pool.cache, *keys(drawn(1, 2, 1)))
    assert pool.cache.lengths.tolist() == pool.lengths == [BLOCK, 4]
    assert torch.equal(pool.cache.flat(0)[0], drawn(0, BLOCK)["k"])


@pytest.mark.gpu
@pytest.mark.parametrize("eight", EIGHT)
@pytest.mark.parametrize("n", [1, 3])
def test_beams_in_a_captured_graph(eight, n):
    """One graph is replayed, while pages are copied, truncated and reused in between."""
    beams, rng = Beams(21, eight), np.random.default_rng(n)
    still = drawn(0, 4, n)
    beams.go_on(still, [0, 0, 0], beams.step)  # this also compiles the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = beams.step(still)

    def replay(new):
        for name, x in still.items():
            x.copy_(new[name])
        output.out.fill_(torch.nan)
        graph.replay()
        return output

    for t in range(20):
        beams.go_on(drawn(t, 4, n), rng.integers(0, 3 + n, 3).tolist(), replay)
        if t % 5 == 4:  # the first takes the slot of the last
            beams.pool.free(3)
            assert beams.pool.fork(0, into=3) == 3
            beams.lists[3] = beams.lists[0]


@pytest.mark.gpu
def test_a_pool_is_not_changed_in_a_capture():
    beams = Beams(5)
    pool, new, pages = beams.pool, keys(drawn(0, 1)), beams.pool.export(0)
    calls = (lambda: pool.append(0, *new), lambda: pool.reserve(0, 1), lambda: pool.truncate(0, 1),
             lambda: pool.fork(0), lambda: pool.import_(pages), lambda: pool.free(0))  # fmt: skip
    before = contents(pool), pool.lengths, pool.free_pages
    for call in calls:
        with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(ValueError, match="captured"):
            call()
    assert before[1:] == (pool.lengths, pool.free_pages)
    for name, found in contents(pool).items():
        np.testing.assert_array_equal(found, before[0][name], name)


class LateReader:
    """Decodes the last token after half a second of other work; the host does not wait."""

    def __init__(self, pool):
        self.still = {name: x[None] for name, x in drawn(0, 1).items() if name in ("q", "q_idx")}
        arguments = *self.still.values(), pool.cache
        options = {"config": CONFIG, "backend": "triton"}
        msa.decode(*arguments, **options)  # compiles the kernels
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = msa.decode(*arguments, **options)

    def __call__(self, tokens):
        for name, x in self.still.items():
            x.copy_(tokens[name][None, -1:])
        torch.cuda._sleep(10**9)
        self.graph.replay()
        return msa.Output(self.output.out.clone(), self.output.lse.clone(), None)


def give_away(pool, tokens):
    """Give the pages of sequence 0 to other tokens."""
    pool.free(0)
    pool.append(0, *keys(tokens))
    assert pool.free_pages == 0


@pytest.mark.gpu
@pytest.mark.parametrize("side", [False, True])
def test_on_one_stream_a_page_is_read_before_it_is_given_away(side):
    """This holds on any stream, and without a wait of the host for the reader."""
    pool, tokens, others = make_pool(1, 3), drawn(0, 3 * BLOCK), drawn(1, 3 * BLOCK)
    pool.append(0, *keys(tokens))
    read_late = LateReader(pool)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream() if side else torch.cuda.current_stream()):
        output = read_late(tokens)
        give_away(pool, others)
        late = read_late(others)
    torch.cuda.synchronize()
    check(output, 0, spec(tokens, 1, CONFIG))
    check(late, 0, spec(others, 1, CONFIG))


@pytest.mark.gpu
def test_readers_on_other_streams_are_waited_for_by_the_caller():
    pool, tokens, others = make_pool(1, 3), drawn(0, 3 * BLOCK), drawn(1, 3 * BLOCK)
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    pool.append(0, *keys(tokens))
    read_late = LateReader(pool)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        output = read_late(tokens)
    main.wait_stream(side)
    give_away(pool, others)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        late = read_late(others)
    torch.cuda.synchronize()
    check(output, 0, spec(tokens, 1, CONFIG))
    check(late, 0, spec(others, 1, CONFIG))
