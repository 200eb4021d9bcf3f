"""Decoding on the triton backend, in addition to the properties: long rows, growth, graphs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pool_parts import CACHED, E4M3, read

import msa
from msa import reference
from msa.conformance.tolerances import HOPPER, PRECISIONS
from msa.ir import BlockScores, PagedKV, Sequences
from msa.triton_impl import decode, page_scores, tuning
from msa.triton_impl.page_attention import attend_pages

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [pytest.mark.gpu] * CUDA
BLOCK = 16
SHAPES = {"k": (2, 5), "v": (2, 3), "k_idx": (7,), "q": (6, 5), "q_idx": (2, 7)}
EIGHT = [(), ("k", "v"), ("k_idx",), CACHED]
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * CUDA


def drawn(seed, *lead, dtype=torch.float32):
    """Small integers: every score is exact, and there are many ties."""
    rng = np.random.default_rng(seed)
    return {
        name: torch.tensor(rng.integers(-2, 3, (*lead, *dims)), dtype=dtype, device=DEVICE)
        for name, dims in SHAPES.items()
    }


def make_pool(batch, pages, eight=(), dtype=torch.float32, **sizes):
    """Pages of NaN."""
    empty = (torch.full((pages, BLOCK, *SHAPES[name]), torch.nan, device=DEVICE) for name in CACHED)
    dtypes = (E4M3 if name in eight else dtype for name in CACHED)
    return msa.PagePool(*(x.to(d) for x, d in zip(empty, dtypes)), batch=batch, **sizes)


def spec(tokens, n, config):
    """The last n of some tokens, by the reference in float64."""
    q, q_idx = (read(tokens[name].double())[-n:] for name in ("q", "q_idx"))
    k, v, k_idx = (read(tokens[name].double()) for name in CACHED)
    return msa.attention(q, k, v, q_idx, k_idx, config=config, backend="reference")


def check(output, s, want, dtype=torch.float32):
    """Compare one sequence of a step with the spec."""
    tolerance = 8 * torch.finfo(dtype).eps
    np.testing.assert_allclose(read(output.out[s].double()), want.out, rtol=0, atol=tolerance)
    np.testing.assert_allclose(read(output.lse[s]), want.lse, rtol=1e-5, atol=1e-5)


# -- selection from rows of scores ----------------------------------------------------------------
def hard_scores(kind, blocks, rng):
    """Scores [2 queries, 1 group, blocks] from which selection is difficult."""
    shape = (2, 1, blocks)
    match kind:
        case "normal":
            return rng.standard_normal(shape)
        case "ties":
            return rng.integers(0, 3, shape) * 1.0
        case "equal":
            return np.zeros(shape)
        case "one piece":  # the best are 64 blocks apart: all of them in one piece
            return np.where(np.arange(blocks) % 64 == 5, 9.0, 0.0) + rng.random(shape)
        case "not finite":
            odd = rng.choice([np.nan, np.inf, -np.inf, 1.0, -0.0, 0.0], shape)
            return np.where(rng.random(shape) < 0.7, odd, rng.standard_normal(shape))
        case "nothing":  # equal all of them, by R4
            return rng.choice([np.nan, -np.inf], shape)
    raise AssertionError(kind)


KINDS = ["normal", "ties", "equal", "one piece", "not finite", "nothing"]


@settings(max_examples=40 if CUDA else 10)
@given(
    kind=st.sampled_from(KINDS), blocks=st.integers(1, 600), top_k=st.integers(1, 20),
    sink=st.integers(0, 2), local=st.integers(1, 2), seed=st.integers(0, 999),
)  # fmt: skip
@example(kind="one piece", blocks=1500, top_k=16, sink=0, local=1, seed=0)  # bisection
@example(kind="not finite", blocks=5000, top_k=18, sink=1, local=2, seed=0)
@example(kind="ties", blocks=20_000, top_k=8, sink=0, local=1, seed=0)  # pieces in two steps
@example(kind="nothing", blocks=3, top_k=2, sink=0, local=1, seed=2)
@example(kind="ties", blocks=64, top_k=64, sink=0, local=1, seed=0)
def test_selection_from_rows_of_scores(kind, blocks, top_k, sink, local, seed):
    """The selection equals that of the spec; every split of a row finds its part of it."""
    config = msa.MSAConfig(BLOCK, max(top_k, sink + local), sink_blocks=sink, local_blocks=local)
    length = blocks * BLOCK  # the queries are the last two tokens
    values = hard_scores(kind, blocks, np.random.default_rng(seed)).astype(np.float32)
    sequences = Sequences.one(2, length)
    known = np.where(np.isnan(values), -np.inf, values)  # NaN is what the kernel may find (R4)
    want = reference.select_blocks(BlockScores(known, sequences, BLOCK), config)

    zeros = torch.zeros(1, BLOCK, 1, 1, device=DEVICE)
    integers = {"dtype": torch.int32, "device": DEVICE}
    cache = PagedKV(zeros, zeros, zeros[..., 0], torch.zeros(1, blocks, **integers),
                    torch.tensor([length], **integers))  # fmt: skip
    q, scores = torch.zeros(1, 2, 3, 1, device=DEVICE), torch.tensor(values, device=DEVICE)
    width = 1 << max(5, (blocks - 1).bit_length())
    scores = torch.nn.functional.pad(scores, (0, width - blocks), value=torch.nan)[None]
    arrivals = torch.zeros_like(decode.counters(q, 1))
    ids = attend_pages(q, cache, config, scores, arrivals)[2]
    np.testing.assert_array_equal(read(ids)[0], want.indices)


# -- steps ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("programs", [1, 6, 40])
@pytest.mark.parametrize("n", [1, 3])
def test_any_number_of_splits(programs, n, monkeypatch):
    """One program for all selected blocks of a row, several, or one for each block; 40 programs
    score 60 blocks."""
    for kernel in ("paged", "pages"):
        tile = replace(tuning.DEFAULTS[kernel], programs=programs)
        monkeypatch.setitem(tuning.DEFAULTS, kernel, tile)
    monkeypatch.setattr(tuning, "TABLE", tuning.TABLE | {"paged": {}, "pages": {}})
    config, tokens = msa.MSAConfig(BLOCK, top_k=5), drawn(0, 2, 150)
    pool = make_pool(batch=3, pages=20)
    pool.append([2, 0], *(tokens[name] for name in CACHED))
    q, q_idx = (tokens[name][[1, 0, 0], -n:] for name in ("q", "q_idx"))
    output = msa.decode(q, q_idx, pool.cache, config=config, backend="triton")
    for s, i in ((0, 1), (2, 0)):
        want = spec({name: x[i] for name, x in tokens.items()}, n, config)
        check(output, s, want)
        selected = output.selection.indices[:n] if s == 0 else output.selection.indices[n:]
        np.testing.assert_array_equal(read(selected), want.selection.indices)


@pytest.mark.parametrize("eight", EIGHT, ids=lambda names: ",".join(names) or "none")
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=6)
@given(total=st.integers(1, 90), n=st.integers(1, 3), seed=st.integers(0, 999))
def test_small_integers_are_exact(dtype, eight, total, n, seed):
    """Ties included, since e4m3 holds integers up to 16. Another sequence's pages hold NaN."""
    n, config = min(n, total), msa.MSAConfig(BLOCK, top_k=2)
    tokens, pool = drawn(seed, total, dtype=dtype), make_pool(2, 7, eight, dtype)
    pool.append(1, *(tokens[name] for name in CACHED))
    q, q_idx = (tokens[name][-n:].expand(2, -1, -1, -1) for name in ("q", "q_idx"))
    output = msa.decode(q, q_idx, pool.cache, config=config, backend="triton")
    want = spec(tokens, n, config)
    np.testing.assert_array_equal(read(output.selection.indices), want.selection.indices)
    check(output, 1, want, dtype)
    assert not output.out[0].any() and (output.lse[0] == -torch.inf).all()


@settings(max_examples=10)
@given(chunks=st.lists(st.integers(1, 20), min_size=1, max_size=4), seed=st.integers(0, 999))
@pytest.mark.parametrize("eight", EIGHT if CUDA else [()])  # the interpreter rounds e4m3 wrongly
def test_what_the_device_appends_is_what_the_pool_appends(eight, chunks, seed):
    """The bits of pages, scales and lengths are right; an empty slot of the batch stays empty."""
    rng = np.random.default_rng(seed)
    host, device = (make_pool(3, 15, eight, pages_per_sequence=6) for _ in range(2))
    for n in chunks:
        new = {
            name: torch.tensor(rng.standard_normal((3, n, *SHAPES[name])) * 2.0 ** rng.integers(9),
                               dtype=torch.float32, device=DEVICE)
            for name in CACHED
        }  # fmt: skip
        host.append([2, 0], *(new[name][[2, 0]] for name in CACHED))
        device.reserve([2, 0], n)
        msa.append_tokens(device.cache, *(new[name] for name in CACHED))
        assert device.lengths == device.cache.lengths.tolist()
    for name, want in vars(host.cache).items():
        if want is not None:
            np.testing.assert_array_equal(read(getattr(device.cache, name)), read(want), name)


def test_a_sequence_without_room_is_left_alone():
    """Without a page for the second block no token is written, not even to the first block."""
    pool, tokens = make_pool(1, 3), drawn(0, 1, 30)
    pool.append(0, *(tokens[name][0, :14] for name in CACHED))
    before = {name: read(x).copy() for name, x in vars(pool.cache).items() if x is not None}
    msa.append_tokens(pool.cache, *(tokens[name][:, :3] for name in CACHED))
    for name, want in before.items():
        np.testing.assert_array_equal(read(getattr(pool.cache, name)), want, name)


def test_appended_and_decoded_step_by_step():
    """One, two or three tokens at a time are the rows of one prefill."""
    config, tokens = msa.MSAConfig(BLOCK, top_k=2), drawn(1, 100)
    whole, pool, stop = spec(tokens, 100, config), make_pool(2, 7), 0
    for n in [30, 1, 1, 2, 3, 1, 20, 3, 2, 1, 1, 30]:
        stop += n
        new = {
            name: x[None, stop - n : stop].expand(2, *[-1] * x.dim()) for name, x in tokens.items()
        }
        pool.reserve(0, n)
        msa.append_tokens(pool.cache, *(new[name] for name in CACHED))
        last = min(n, 3)
        q, q_idx = (new[name][:, -last:] for name in ("q", "q_idx"))
        output = msa.decode(q, q_idx, pool.cache, config=config, backend="triton")
        rows = slice(stop - last, stop)
        np.testing.assert_allclose(read(output.out[0]), whole.out[rows], rtol=0, atol=1e-6)
        np.testing.assert_array_equal(read(output.selection.indices), whole.selection.indices[rows])


@pytest.mark.parametrize("eight", [(), CACHED], ids=["wide", "8 bits"])
def test_prefill_in_chunks_over_pages_is_prefill(eight):
    """The kernels of the forward over `flat`, chunk by chunk: the rows of one prefill."""
    config, tokens = msa.MSAConfig(BLOCK, top_k=2), drawn(2, 90)
    whole, pool, stop = spec(tokens, 90, config), make_pool(1, 6, eight), 0
    for n in (33, 1, 40, 16):
        stop += n
        new = {name: x[stop - n : stop] for name, x in tokens.items()}
        pool.append(0, *(new[name] for name in CACHED))
        k, v, k_idx = pool.cache.flat(0)
        output = msa.attention(new["q"], k, v, new["q_idx"], k_idx, config=config, backend="triton")
        rows = slice(stop - n, stop)
        np.testing.assert_allclose(read(output.out), whole.out[rows], rtol=0, atol=1e-6)
        np.testing.assert_array_equal(read(output.selection.indices), whole.selection.indices[rows])


# -- on a GPU -------------------------------------------------------------------------------------
@pytest.mark.gpu
@pytest.mark.parametrize("eight", EIGHT, ids=lambda names: ",".join(names) or "none")
def test_one_graph_serves_growing_lengths(eight):
    """Append and decode, captured once at 48 tokens, replayed to 84, over three pages' borders."""
    config, n = msa.MSAConfig(BLOCK, top_k=2), 1
    tokens = drawn(3, 3, 84)
    pool = make_pool(4, 18, eight, pages_per_sequence=6)
    slots = [3, 0, 1]  # place 2 of the batch is empty
    pool.append(slots, *(tokens[name][:, :48] for name in CACHED))
    still = {name: torch.zeros(4, n, *SHAPES[name], device=DEVICE) for name in SHAPES}

    def step():
        msa.append_tokens(pool.cache, *(still[name] for name in CACHED))
        return msa.decode(still["q"], still["q_idx"], pool.cache, config=config, backend="triton")

    step()  # compiles; no sequence has a page for token 49 yet, so nothing is written
    assert pool.cache.lengths.tolist() == [48, 48, 0, 48]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    assert output.selection is None
    for t in range(48, 84):
        pool.reserve(slots, n)
        for name, x in still.items():
            x[slots] = tokens[name][:, t : t + n]
        output.out.fill_(torch.nan)
        graph.replay()
        for i, s in enumerate(slots):
            want = spec({name: x[i, : t + n] for name, x in tokens.items()}, n, config)
            check(output, s, want)
        assert not output.out[2].any() and (output.lse[2] == -torch.inf).all()
    assert pool.lengths == pool.cache.lengths.tolist() == [84, 84, 0, 84]


@pytest.mark.gpu
def test_only_the_kernels_can_be_captured():
    pool, tokens = make_pool(1, 2), drawn(0, 1, 3)
    pool.append([0], *(tokens[name] for name in CACHED))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), pytest.raises(ValueError, match="backend must be 'triton'"):
        config = msa.MSAConfig(BLOCK, top_k=2)
        msa.decode(tokens["q"], tokens["q_idx"], pool.cache, config=config, backend="torch")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [0, 12])
def test_scores_over_8_bits_keep_their_budget(dtype, spread):
    """Queries as three e4m3 parts lose at most 2^-17 of their largest number."""
    torch.manual_seed(0)
    q = (
        torch.randn(1, 2, 4, 128, device="cuda")
        * 2.0 ** torch.randint(-spread, 1, (128,), device="cuda")
    ).to(dtype)
    pages = torch.randn(9, 128, 128, device="cuda").to(E4M3)
    scales = 2.0 ** torch.randint(-3, 3, (9,), device="cuda").float()
    kv = torch.zeros(9, 128, 4, 128, device="cuda", dtype=dtype)
    integers = {"dtype": torch.int32, "device": "cuda"}
    cache = PagedKV(kv, kv, pages, torch.randperm(9, **integers)[None],
                    torch.tensor([9 * 128], **integers), k_idx_scales=scales)  # fmt: skip
    heads = torch.empty(1, 2, 64, 128, device="cuda")
    config = msa.MSAConfig()
    found = page_scores.score_pages(q, cache, config, decode.counters(heads, 4))[0, ..., :8]
    k = (pages.double() * scales[:, None, None].double())[cache.page_table[0].long()[:8]]
    products = torch.einsum("nrd,btd->nrbt", q[0].double(), k)
    want = products.amax(-1) * 128**-0.5
    sizes = torch.einsum("nrd,btd->nrbt", q[0].double().abs(), k.abs()).amax(-1)
    exact = q[0].double().abs().amax(-1)[..., None] * k.abs().sum(-1).amax(-1)
    unit = replace(PRECISIONS["float8_e4m3fn"], unit=HOPPER["float8_e4m3fn"])
    largest = sizes.cpu().numpy()
    bound = 3 * unit.sum_error(128, largest, largest) + 2.0**-17 * exact.cpu().numpy()
    error = (found.double() - want).abs().cpu().numpy() / 128**-0.5
    print(f"error / bound {np.max(error / bound):.2f}")
    assert (error <= bound).all()


@pytest.mark.gpu
def test_pages_beyond_two_to_the_31():
    """Offsets of the last pages pass 2^31 elements in all three arrays."""
    torch.manual_seed(0)
    total, used = 2**31 // (128 * 128) + 40, 40
    like = {"dtype": torch.bfloat16, "device": "cuda"}
    config, tokens = msa.MSAConfig(), used * 128
    pages = {n: torch.zeros(total, 128, 1, 128, **like) for n in ("k", "v")}
    pages["k_idx"] = torch.zeros(total, 128, 128, **like)
    for x in pages.values():
        x[-used:] = torch.randint(-2, 3, x[-used:].shape, device="cuda").to(torch.bfloat16)
    table = torch.arange(total - 1, total - 1 - used, -1, dtype=torch.int32, device="cuda")
    cache = PagedKV(*pages.values(), table[None], torch.tensor([tokens], device="cuda"))
    q = torch.randint(-2, 3, (1, 2, 16, 128), device="cuda").to(torch.bfloat16) * 0.125
    q_idx = torch.randint(-2, 3, (1, 2, 1, 128), device="cuda").to(torch.bfloat16)
    output = msa.decode(q, q_idx, cache, config=config, backend="triton")
    arrays = [read(x.double()) for x in (q[0], *cache.flat(0)[:2], q_idx[0], cache.flat(0)[2])]
    want = msa.attention(*arrays, config=config, backend="reference")
    np.testing.assert_array_equal(read(output.selection.indices), want.selection.indices)
    check(output, 0, want, torch.bfloat16)
    pool_table = torch.cat([table, table.new_full((1,), total - used - 1)])
    wide = replace(cache, page_table=pool_table[None])
    new = [torch.full((1, 1, *x.shape[2:]), 3.0, **like) for x in pages.values()]
    msa.append_tokens(wide, *new)
    assert all((x[total - used - 1, 0] == 3.0).all() for x in pages.values())
    assert cache.lengths.tolist() == [tokens + 1]
