"""Pages of 8 bits: their scales, rounding, and decoding from the numbers that they mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pool_machine import Pool
from pool_parts import (
    BLOCK,
    CACHED,
    CONFIG,
    E4M3,
    LEAST_SCALE,
    SHAPES,
    append_8,
    attention,
    drawn,
    make_pool,
    read,
    scale_arrays,
    scale_of,
    to_e4m3,
)

import msa
from msa import checks

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
KINDS = [("k", "v"), ("k_idx",), CACHED]


@pytest.mark.parametrize("eight", KINDS, ids=",".join)
@pytest.mark.parametrize("device", DEVICES)
def test_a_pool_of_8_bits_is_a_list_of_lists(device, eight):
    place = "torch" if device == "cpu" else device
    machine = type("EightBitPool", (Pool,), {"place": place, "eight": eight})
    machine.TestCase.settings = settings(max_examples=25, stateful_step_count=25)
    machine.TestCase("runTest").runTest()


# -- the rounding ---------------------------------------------------------------------------------
def all_numbers():
    """The 253 numbers of e4m3 that are not NaN; one zero."""
    bits = torch.arange(256, dtype=torch.uint8).view(E4M3).double().numpy()
    return np.unique(bits[np.isfinite(bits)])


def index_pool(tokens, device="cpu", pages=1):
    """A pool for one sequence, with so many index numbers in each page; k and v are not used."""
    rest = (torch.zeros(pages, tokens, 1, 1, device=device) for _ in range(2))
    k_idx = torch.full((pages, tokens, 1), torch.nan, device=device).to(E4M3)
    return msa.PagePool(*rest, k_idx, batch=1)


def append_index(pool, numbers):
    nothing = torch.zeros(len(numbers), 1, 1, device=numbers.device)
    pool.append(0, nothing, nothing, numbers[:, None])


def stored(pool):
    """The stored numbers of the first page, and its scale."""
    length = pool.lengths[0]
    numbers = read(pool.cache.k_idx_pages)[0, :length, 0]
    return numbers, float(pool.cache.k_idx_scales[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("power", [-130, -20, -3, 0, 7, 118])
def test_rounding_bit_by_bit(device, dtype, power):
    """All numbers of e4m3, halfway points, their neighbours, and any others."""
    rng = np.random.default_rng(0)
    numbers = all_numbers()
    halves = (numbers[1:] + numbers[:-1]) / 2
    spread = rng.standard_normal(2000) * 2.0 ** rng.integers(-14, 9, 2000)
    beside = np.nextafter(halves.astype(np.float32), np.float32(1e9)).astype(float)
    x = np.concatenate([numbers, halves, beside, spread.clip(-448, 448)]) * 2.0**power
    tokens = torch.tensor(x).to(dtype)
    tokens = tokens[tokens.isfinite()].to(device)
    pool = index_pool(len(tokens), device)
    append_index(pool, tokens)
    want = tokens.double().cpu().numpy()
    y, scale = stored(pool)
    assert scale == scale_of(want)
    np.testing.assert_array_equal(y, to_e4m3(want / scale))
    assert set(y) <= set(numbers)


@settings(max_examples=200)
@given(st.lists(st.lists(st.floats(width=32, max_value=2.0**127), min_size=1, max_size=5),
                min_size=1, max_size=4))  # fmt: skip
def test_any_numbers_in_any_appends(chunks):
    """NaN and infinities change neither the scale nor other numbers."""
    pool, numbers, scales = index_pool(7, pages=3), np.zeros((0, 1)), np.zeros(0)
    for chunk in chunks:
        append_index(pool, torch.tensor(chunk))
        with np.errstate(over="ignore"):
            numbers, scales = append_8(numbers, scales, np.array(chunk)[:, None], block=7)
            found = pool.cache.flat(0)[2]
            np.testing.assert_array_equal(read(found), numbers.astype(np.float32), strict=True)
        own = read(pool.cache.page_table)[0, : len(scales)]
        np.testing.assert_array_equal(read(pool.cache.k_idx_scales)[own], scales)


def test_the_scale_is_the_power_of_two_that_just_fits():
    for number, scale in ((448, 1), (449, 2), (-224, 0.5), (1.75, 2**-8), (1.875, 2**-7)):
        for power in (-30, 0, 100):
            pool = index_pool(2)
            append_index(pool, torch.tensor([number * 2.0**power, 0.0]))
            assert stored(pool)[1] == scale * 2.0**power, (number, power)
    for number in (0.0, 2.0**-149, 2.0**-118, torch.nan, torch.inf):  # the largest possible stretch
        pool = index_pool(1)
        append_index(pool, torch.tensor([number]))
        assert stored(pool)[1] == LEAST_SCALE, number


def test_what_is_not_finite():
    pool = index_pool(6)
    append_index(pool, torch.tensor([1.0, torch.nan, torch.inf, -torch.inf]))
    np.testing.assert_array_equal(stored(pool)[0], [256, np.nan, 448, -448])
    append_index(pool, torch.tensor([2.0, torch.nan]))
    np.testing.assert_array_equal(stored(pool)[0], [128, np.nan, 224, -224, 256, np.nan])


def test_the_greatest_numbers_of_float32_come_back_as_infinities():
    pool = index_pool(4)
    greatest = torch.finfo(torch.float32).max
    append_index(pool, torch.tensor([greatest, 1.9375 * 2.0**127, 1.9 * 2.0**127, 2.0**127]))
    want = [np.inf, np.inf, 1.875 * 2.0**127, 2.0**127]
    assert pool.cache.flat(0)[2].flatten().tolist() == want


# -- older numbers --------------------------------------------------------------------------------
@settings(max_examples=100)
@given(seed=st.integers(0, 9999), counts=st.lists(st.integers(1, 4), min_size=2, max_size=8))
def test_older_numbers_stay_but_for_those_below_the_least_normal(seed, counts):
    rng, size = np.random.default_rng(seed), sum(counts)
    pool = index_pool(size)
    given, values, scale = np.zeros(0), np.zeros(0), LEAST_SCALE
    for count in counts:
        new = (rng.standard_normal(count) * 2.0 ** rng.integers(-9, 9)).astype(np.float32)
        append_index(pool, torch.tensor(new))
        given = np.append(given, new)
        y, grown = stored(pool)
        older = (y * grown)[: len(values)]
        normal = np.abs(values) >= 2.0**-6 * grown
        assert grown == scale_of(given) >= scale
        assert (older[normal] == values[normal]).all()
        assert (np.abs(older - values) <= 2.0**-10 * grown * (grown > scale)).all()
        values, scale = y * grown, grown


def test_an_older_number_is_rounded_again_ties_to_even():
    pool = index_pool(3)
    append_index(pool, torch.tensor([3.0, 5.0]) * 2.0**-10)  # exact, with a scale below 1
    append_index(pool, torch.tensor([448.0]))  # scale 1: steps of 2^-9, so 1.5 and 2.5 of them
    assert stored(pool) == (pytest.approx([2 * 2.0**-9, 2 * 2.0**-9, 448.0], rel=0, abs=0), 1.0)


def test_a_page_that_comes_back_starts_afresh():
    pool = index_pool(2)
    append_index(pool, torch.tensor([2.0**20]))
    pool.free(0)
    append_index(pool, torch.tensor([1.0]))
    assert stored(pool) == ([256.0], 2.0**-8)


def test_tokens_that_were_truncated_leave_the_scale_of_the_page():
    pool = index_pool(4)
    append_index(pool, torch.tensor([3.0]))
    append_index(pool, torch.tensor([896.0, 0.5]))  # a draft, which asks for a scale of 2
    pool.truncate(0, 1)
    assert stored(pool) == ([1.5], 2.0), "what stays stands for the number that it was"
    append_index(pool, torch.tensor([17.0 * 2.0**-9]))  # 8.5 steps of 2^-9 once it is divided by 2
    assert stored(pool) == (pytest.approx([1.5, 8 * 2.0**-9], rel=0, abs=0), 2.0)
    pool.truncate(0, 0)
    append_index(pool, torch.tensor([17.0 * 2.0**-9]))
    assert stored(pool)[1] == scale_of(np.array([17.0 * 2.0**-9])), "a first token starts afresh"


def test_a_copied_page_has_a_scale_of_its_own():
    rest = (torch.zeros(3, 4, 1, 1) for _ in range(2))
    pool = msa.PagePool(*rest, torch.zeros(3, 4, 1).to(E4M3), batch=2)
    append_index(pool, torch.tensor([1.75, 0.25]))
    pool.fork(0)
    assert pool.cache.k_idx_scales.tolist() == [2.0**-8, 1.0, 1.0]
    append_index(pool, torch.tensor([448.0]))  # the first sequence, which then has a copy of page 0
    assert pool.cache.page_table[:, 0].tolist() == [1, 0]
    assert pool.cache.k_idx_scales.tolist() == [2.0**-8, 1.0, 1.0]
    assert [pool.cache.flat(s)[2].flatten().tolist() for s in (0, 1)] == [
        [1.75, 0.25, 448.0], [1.75, 0.25],
    ]  # fmt: skip


def test_heads_and_pages_have_scales_of_their_own():
    pool = make_pool("torch", eight=CACHED, batch=1)
    tokens = {name: torch.ones(BLOCK + 1, *SHAPES[name]) for name in CACHED}
    tokens["k"][:, 1] *= 2.0**10
    tokens["v"][BLOCK:] *= 2.0**-10
    pool.append(0, **tokens)
    own = pool.cache.page_table[0, :2].long()
    k, v, k_idx = (x[own].log2().tolist() for x in scale_arrays(pool.cache).values())
    assert (k, v, k_idx) == ([[-8, 2]] * 2, [[-8, -8], [-18, -18]], [-8, -8])


@pytest.mark.parametrize("eight", [(), *KINDS], ids=",".join)
def test_writing_never_waits_for_the_device(eight, monkeypatch):
    """Tensors on "meta" have no numbers, so this fails if one is read. The checks accept them."""
    monkeypatch.setattr(checks.arrays, "check_plain", lambda name, array: None)
    shapes = {name: (6, BLOCK, *SHAPES[name]) for name in CACHED}
    pages = {n: torch.empty(s, device="meta").to(E4M3 if n in eight else torch.float32)
             for n, s in shapes.items()}  # fmt: skip
    pool = msa.PagePool(*pages.values(), batch=2)
    for n in (3, 1, 5):
        tokens = (torch.empty(2, n, *SHAPES[name], device="meta") for name in CACHED)
        pool.append([1, 0], *tokens)
    pool.reserve([1, 0], 2)
    pool.free(1)
    assert (pool.lengths, pool.free_pages) == ([11, 0], 3)
    pool.free(0)
    pool.append(1, *(torch.empty(6, *SHAPES[name], device="meta") for name in CACHED))
    pool.truncate(pool.fork(1), 5)
    pool.append(0, *(torch.empty(1, *SHAPES[name], device="meta") for name in CACHED))
    pages = pool.export(0)
    pool.free(0)
    assert (pool.import_(pages), pool.lengths, pool.free_pages) == (0, [6, 6], 2)


# -- decoding -------------------------------------------------------------------------------------
def pool_of(tokens, eight, dtype, device):
    """Two sequences; the first one is empty."""
    pages = {name: torch.full((6, BLOCK, *SHAPES[name]), torch.nan, device=device)
             for name in CACHED}  # fmt: skip
    pages = {name: x.to(E4M3 if name in eight else dtype) for name, x in pages.items()}
    pool = msa.PagePool(*pages.values(), batch=2)
    pool.append(1, *(tokens[name] for name in CACHED))
    return pool


def last(tokens, n):
    """The queries of the last n tokens of both sequences."""
    return [tokens[name][None, -n:].expand(2, -1, -1, -1) for name in ("q", "q_idx")]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("eight", KINDS, ids=",".join)
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=8)
@given(total=st.integers(1, 23), n=st.integers(1, 3), seed=st.integers(0, 999))
def test_decoding_small_integers_is_exact(device, backend, eight, dtype, total, n, seed):
    """e4m3 holds integers up to 16, so the selection equals that of the spec, ties included."""
    n, tokens = min(n, total), drawn(seed, total)
    given = {name: torch.tensor(x, dtype=dtype, device=device) for name, x in tokens.items()}
    pool = pool_of(given, eight, dtype, device)
    output = msa.decode(*last(given, n), pool.cache, config=CONFIG, backend=backend)
    want = attention(tokens, n)
    np.testing.assert_array_equal(read(output.selection.indices), want.selection.indices)
    tolerance = 4 * torch.finfo(dtype).eps
    assert output.out.dtype == dtype and output.lse.dtype == torch.float32
    np.testing.assert_allclose(output.out[1].double().cpu(), want.out, rtol=0, atol=tolerance)
    np.testing.assert_allclose(output.lse[1].double().cpu(), want.lse, rtol=1e-5, atol=1e-5)
    assert not output.out[0].any() and (output.lse[0] == -torch.inf).all()


@pytest.mark.parametrize("n", [1, 5])
def test_prefill_in_chunks_over_8_bits_is_decoding(n):
    """`flat` returns the numbers that `decode` uses."""
    torch.manual_seed(0)
    tokens = {name: torch.randn(19, *dims).bfloat16() for name, dims in SHAPES.items()}
    pool = pool_of(tokens, CACHED, torch.bfloat16, "cpu")
    decoded = msa.decode(*last(tokens, n), pool.cache, config=CONFIG)
    k, v, k_idx = (x.bfloat16() for x in pool.cache.flat(1))
    q, q_idx = tokens["q"][-n:], tokens["q_idx"][-n:]
    chunk = msa.attention(q, k, v, q_idx, k_idx, config=CONFIG)
    assert torch.equal(chunk.selection.indices, decoded.selection.indices)
    torch.testing.assert_close(chunk.out, decoded.out[1], rtol=0, atol=2.0**-7)
    assert not torch.equal(k, tokens["k"]), "rounding must matter here, or the test shows nothing"


def test_half_precision_queries_meet_keys_beyond_it():
    """Products of float16 with 8-bit numbers times their scale can exceed the range of float32."""
    tokens = {name: torch.ones(9, *dims) for name, dims in SHAPES.items()}
    tokens["k"][4], tokens["k_idx"][4], tokens["v"][4] = 2.0**120, 2.0**120, 3.0
    tokens["k"][8], tokens["k_idx"][8] = 2.0**119, 2.0**119
    pool = pool_of(tokens, CACHED, torch.float32, "cpu")
    q, q_idx = (1024 * x.half() for x in last(tokens, 1))
    output = msa.decode(q, q_idx, pool.cache, config=CONFIG)
    assert (output.out[1] == 3.0).all() and output.selection.indices[0, 0].tolist() == [1, 2]
