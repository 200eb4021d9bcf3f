"""Kernels at the limits of float32, with NaN and infinities, and the calls that are refused."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import msa
from msa import ops, reference
from msa.ir import PagedKV, Selection, Sequences
from msa.triton_impl import attention

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [pytest.mark.gpu] * CUDA
BLOCK, TOKENS = 16, 37
CONFIG = msa.MSAConfig(BLOCK, top_k=2, softmax_scale=1.0)
ORDERS = ["auto", "kv_outer", "union"]
LARGEST = float(np.finfo(np.float32).max)
inf, nan = float("inf"), float("nan")


def on_device(*arrays):
    return [torch.tensor(np.asarray(x), dtype=torch.float32, device=DEVICE) for x in arrays]


def inputs(q, k):
    """Head size 1, so that a product is one number; all index scores are equal."""
    v = np.linspace(-1, 1, TOKENS)[:, None, None]
    return q, k, v, np.ones((TOKENS, 1, 1)), np.zeros((TOKENS, 1))


def every_way(q, k):
    """name -> (out, lse) of each kernel that attends, and the loss."""
    tensors, found = on_device(*inputs(q, k)), {}
    for order in ORDERS:
        output = msa.attention(*tensors, config=CONFIG, backend="triton", loop_order=order)
        found[order] = output.out, output.lse
    q, k, v, q_idx, k_idx = tensors
    missing = -TOKENS % BLOCK
    pages = [torch.cat([x, x.new_full((missing, *x.shape[1:]), nan)]) for x in (k, v, k_idx)]
    pages = [x.unflatten(0, (-1, BLOCK)) for x in pages]
    table = torch.arange(len(pages[0]), device=DEVICE)[None].repeat(TOKENS, 1)
    lengths = torch.arange(1, TOKENS + 1, device=DEVICE)  # each token as the last of a sequence
    cache = PagedKV(*pages, table, lengths)
    step = msa.decode(q[:, None], q_idx[:, None], cache, config=CONFIG, backend="triton")
    found["decode"] = step.out[:, 0], step.lse[:, 0]
    loss = msa.align_index(q, k, q_idx, k_idx, output.selection, config=CONFIG, backend="triton")
    return {n: [x.double().cpu().numpy() for x in pair] for n, pair in found.items()}, float(loss)


def spec(q, k):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        q, k = (np.float32(x).astype(np.float64) for x in (q, k))
        output = msa.attention(*inputs(q, k), config=CONFIG, backend="reference", align=True)
    return output.out, output.lse, float(output.kl)


# -- slots keep their highest score and their sum apart -------------------------------------------
SIZES = [1e3, 4e4, 1e6, 1e8, 1e12, 1e30]


@pytest.mark.parametrize("size", SIZES)
def test_blocks_weigh_as_many_tokens_as_they_have(size):
    """Equal logits of any size: the output is the mean of the values, in every order."""
    ones = np.ones((TOKENS, 1, 1))
    want, _, _ = spec(0 * ones, ones)  # logits of 0 have the same means
    found, _ = every_way(size * ones, ones)
    for name, (out, _) in found.items():
        np.testing.assert_allclose(out, want, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("size", SIZES)
def test_folded_blocks_weigh_as_many_tokens_as_they_have(size, monkeypatch):
    """The split part of auto: 16 queries, each with one block that no other query selected."""
    monkeypatch.setattr(attention, "choose_order", lambda *args: "split")
    monkeypatch.setattr(attention, "limits", lambda *_: (0, TOKENS))
    n, n_keys = BLOCK, BLOCK * BLOCK
    ids = np.stack([np.arange(n), np.full(n, n - 1)], 1)[:, None].astype(np.int32)
    ids[-1] = 0, n - 1
    chosen = Selection(ids, Sequences.one(n, n_keys), BLOCK)
    v = np.random.default_rng(0).standard_normal((n_keys, 1, 16))
    q, k = np.ones((n, 1, 1)), np.ones((n_keys, 1, 1))
    want = reference.attend_selection(0 * q, k, v, chosen, 1.0).out
    tensors = on_device(size * q, k, v)
    chosen = replace(chosen, indices=torch.tensor(ids, device=DEVICE))
    found = attention.attend_selection(*tensors, chosen, 1.0, "auto")
    np.testing.assert_allclose(found.out.cpu(), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_the_lowering_keeps_the_sums_of_large_logits(size):
    """The LSEs of partials are float64, which keeps the weights of logits up to 1e8 (R15, R16)."""
    ones = np.ones((TOKENS, 1, 1))
    want, _, _ = spec(0 * ones, ones)
    trace = msa.lower(*on_device(*inputs(size * ones, ones)), config=CONFIG, backend="triton")
    assert trace.partials.lse.dtype == torch.float64
    if size <= 1e8:
        np.testing.assert_allclose(trace.output.out.cpu(), want, rtol=0, atol=1e-6)


# -- far from zero --------------------------------------------------------------------------------
@settings(max_examples=30 if CUDA else 4)
@given(
    size=st.floats(1e17, 1e19), share=st.floats(0.0, 1.0), order=st.permutations(range(TOKENS)),
    sign=st.sampled_from([1.0, -1.0]),
)  # fmt: skip
@example(size=1e17, share=0.5, order=tuple(range(TOKENS)), sign=-1.0)
@example(size=LARGEST, share=0.0, order=tuple(reversed(range(TOKENS))), sign=-1.0)
@example(size=4.6112053944070963e18, share=1.0, order=tuple(range(TOKENS)), sign=1.0)
def test_products_of_any_size(size, share, order, sign):
    """Logits far below or above zero and far apart, so that one token has all the weight."""
    q = np.full((TOKENS, 1, 1), size)
    most = LARGEST * (1 - 2**-20) / size  # the product of the rounded numbers is finite, too
    k = sign * most**share * (1.0 - np.array(order)[:, None, None] / (2 * TOKENS))
    want_out, want_lse, want_loss = spec(q, k)
    found, loss = every_way(q, k)
    for name, (out, lse) in found.items():
        np.testing.assert_allclose(out, want_out, rtol=0, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(lse, want_lse, rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [-1e8, 1e8, -1e34, -LARGEST])
def test_equal_products_of_any_size(size):
    """All visible tokens of the selected blocks have equal weights, in every order."""
    q, k = np.full((TOKENS, 1, 1), size), np.ones((TOKENS, 1, 1))
    want_out, want_lse, want_loss = spec(q, k)
    found, loss = every_way(q, k)
    for name, (out, lse) in found.items():
        np.testing.assert_allclose(out, want_out, rtol=0, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(lse, want_lse, rtol=1e-6, err_msg=name)
    assert loss == pytest.approx(want_loss, abs=1e-6)


def test_products_beyond_float32():
    """-inf has the weight 0 if there is another product, in each kernel and each block."""
    q, k = np.full((TOKENS, 1, 1), 3e38), np.full((TOKENS, 1, 1), -2.0)
    k[[3, 20]] = -1.0
    want_out, want_lse, _ = spec(q, k)
    ones = np.isfinite(np.float32(want_lse[:, 0]))
    assert 0 < ones.sum() < TOKENS
    found, loss = every_way(q, k)
    for name, (out, lse) in found.items():
        np.testing.assert_allclose(out[ones], want_out[ones], rtol=0, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(lse[ones], want_lse[ones], rtol=1e-6, err_msg=name)
        assert np.isnan(out[~ones]).all() and np.isneginf(lse[~ones]).all(), name
    assert np.isnan(loss)


def test_products_beyond_float32_in_all_rows():
    found, loss = every_way(np.full((TOKENS, 1, 1), 3e38), np.full((TOKENS, 1, 1), 2.0))
    for out, lse in found.values():
        assert np.isnan(out).all() and np.isnan(lse).all()
    assert np.isnan(loss)


# -- not a number ---------------------------------------------------------------------------------
def taught(q, k, selection, lse, backend):
    rng = np.random.default_rng(0)
    arrays = [q, k, rng.standard_normal((TOKENS, 1, 4)), rng.standard_normal((TOKENS, 4))]
    if backend == "triton":
        arrays, lse = on_device(*arrays), None if lse is None else on_device(lse)[0]
        if selection is not None:
            selection = replace(selection, indices=torch.tensor(selection.indices, device=DEVICE))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(msa.align_index(*arrays, selection, lse=lse, config=CONFIG, backend=backend))


BAD = {
    "nothing": ("q", 5, 0.0), "NaN in q": ("q", 5, nan), "inf in q": ("q", 20, inf),
    "-inf in q": ("q", 36, -inf), "NaN in k": ("k", 5, nan), "inf in k": ("k", 20, inf),
    "NaN in lse": ("lse", 5, nan), "inf in lse": ("lse", 5, inf), "-inf in lse": ("lse", 5, -inf),
}  # fmt: skip


@pytest.mark.parametrize("dense", [False, True], ids=["selected", "all tokens"])
@pytest.mark.parametrize("name", BAD)
def test_the_loss_tells_of_what_is_not_a_number(name, dense):
    """Check that NaN is where the spec has NaN, and that other numbers are equal."""
    where, place, value = BAD[name]
    rng = np.random.default_rng(1)
    q, k = rng.standard_normal((2, TOKENS, 2, 3)).astype(np.float32).astype(np.float64)
    lse, k = np.full((TOKENS, 2), 3.0), k[:, :1]
    {"q": q, "k": k, "lse": lse}[where][place] = value
    chosen = None
    if not dense:  # the own block and the first one
        own = np.arange(TOKENS)[:, None, None] // BLOCK
        ids = np.concatenate([np.zeros_like(own), np.where(own, own, -1)], -1).astype(np.int32)
        chosen = Selection(ids, Sequences.one(TOKENS, TOKENS), BLOCK)
    known = lse if where == "lse" else None
    want, got = (taught(q, k, chosen, known, backend) for backend in ("reference", "triton"))
    assert np.isfinite(want) == (name in ("nothing", "inf in lse"))
    if name == "-inf in lse":  # a probability of +inf, where the spec has NaN
        assert not np.isfinite(got)
    else:
        np.testing.assert_allclose(got, want, rtol=1e-4)


@pytest.mark.parametrize("given", [None, 3.0], ids=["lse unknown", "lse known"])
def test_the_loss_does_not_look_at_other_tokens(given):
    """The queries of the last block read only this block; tokens of other blocks are NaN."""
    first = TOKENS // BLOCK * BLOCK
    n = TOKENS - first
    rng = np.random.default_rng(2)
    q, k = rng.standard_normal((n, 1, 3)), rng.standard_normal((TOKENS, 1, 3))
    q_idx, k_idx = rng.standard_normal((n, 1, 4)), rng.standard_normal((TOKENS, 4))
    k[[0, BLOCK]] = nan
    own = np.full((n, 1, 1), TOKENS // BLOCK, np.int32)
    chosen = Selection(own, Sequences.one(n, TOKENS), BLOCK)
    lse = None if given is None else np.full((n, 1), given)
    want = msa.align_index(q, k, q_idx, k_idx, chosen, lse=lse, config=CONFIG, backend="reference")
    chosen = replace(chosen, indices=torch.tensor(own, device=DEVICE))
    known = None if lse is None else on_device(lse)[0]
    arrays = on_device(q, k, q_idx, k_idx)
    got = msa.align_index(*arrays, chosen, lse=known, config=CONFIG, backend="triton")
    assert np.isfinite(want)
    assert float(got) == pytest.approx(float(want), rel=1e-4)


# -- 8 bits ---------------------------------------------------------------------------------------
def eight_bit_cache():
    pages = torch.ones(3, BLOCK, 1, 16, device=DEVICE).to(torch.float8_e4m3fn)
    table, lengths = torch.tensor([[2, 1]], device=DEVICE), torch.tensor([20], device=DEVICE)
    scales = torch.ones(3, 1, device=DEVICE)
    return PagedKV(pages, pages.clone(), pages[:, :, 0].clone(), table, lengths, scales,
                   scales.clone(), scales[:, 0].clone())  # fmt: skip


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", ["k_scales", "v_scales", "k_idx_scales"])
@pytest.mark.parametrize("value", [0.0, -1.0, inf, nan])
def test_scales_of_pages_in_use_are_finite_and_positive(backend, name, value):
    q, q_idx = (torch.ones(1, 1, 1, 16, device=DEVICE) for _ in range(2))
    cache = eight_bit_cache()
    scales = getattr(cache, name).clone()
    scales[0] = value  # a free page
    cache = replace(cache, **{name: scales})
    assert torch.isfinite(msa.decode(q, q_idx, cache, config=CONFIG, backend=backend).out).all()
    scales[1] = value
    wanted = rf"cache\.{name} must be finite and positive, got {value} in page 1,"
    with pytest.raises(ValueError, match=wanted):
        msa.decode(q, q_idx, cache, config=CONFIG, backend=backend)


@pytest.mark.skipif(not CUDA, reason="the interpreter rounds to e4m3 wrongly")
def test_scales_that_are_no_powers_of_two_stay():
    """Older tokens of a page keep their values when new tokens are added."""
    cache = eight_bit_cache()
    for scales in (cache.k_scales, cache.k_idx_scales):
        scales.fill_(1.5)
    new = torch.full((1, 2, 1, 16), 3.0, device=DEVICE)
    msa.append_tokens(cache, new, new, new[:, :, 0])
    assert cache.k_scales[1].item() == cache.k_idx_scales[1].item() == 1.5
    assert (cache.k_pages[1, 4:6].float() == 2.0).all()
    assert (cache.k_pages[1, :4].float() == 1.0).all()


# -- the interpreter ------------------------------------------------------------------------------
@pytest.mark.skipif(CUDA, reason="kernels are compiled where there is a GPU")
def test_the_interpreter_refuses_bfloat16():
    """bfloat16 is refused, since the interpreter multiplies it wrongly; the message says so."""
    q, k, v, q_idx, k_idx = (x.bfloat16() for x in on_device(*inputs(*np.ones((2, TOKENS, 1, 1)))))
    wide = [x.float() for x in (q, k, v, q_idx, k_idx)]
    chosen = msa.select(*wide[3:], config=CONFIG)
    cache = PagedKV(
        *(torch.ones(2, BLOCK, *dims).bfloat16() for dims in ((1, 1), (1, 1), (1,))),
        torch.tensor([[0, 1]]), torch.tensor([20]),
    )  # fmt: skip
    options = {"config": CONFIG, "backend": "triton"}
    calls = {
        "q": lambda: msa.attention(q, k, v, *wide[3:], **options),
        "q_idx": lambda: msa.attention(*wide[:3], q_idx, k_idx, **options),
        "q_idx ": lambda: msa.select(q_idx, k_idx, **options),
        "q ": lambda: msa.sparse_attention(q, k, v, chosen, backend="triton"),
        "q  ": lambda: msa.align_index(q, k, *wide[3:], **options),
        "q_idx  ": lambda: msa.align_index(*wide[:2], q_idx, k_idx, **options),
        "q   ": lambda: msa.lower(q, k, v, *wide[3:], **options),
        "q    ": lambda: msa.decode(q[:1, None], q_idx[:1, None], cache, **options),
        "k": lambda: msa.append_tokens(cache, q[:1, None], q[:1, None], k_idx[:1, None]),
    }
    for name, call in calls.items():
        wanted = (
            rf"^{name.strip()} must have dtype float16 or float32 for backend='triton' under "
            r"TRITON_INTERPRET=1.*got torch.bfloat16: use backend='torch'"
        )
        with pytest.raises(TypeError, match=wanted):
            call()
    assert ops.attention(q, k, v, q_idx, k_idx, config=CONFIG).out.dtype == torch.bfloat16  # torch


@pytest.mark.skipif(CUDA, reason="kernels are compiled where there is a GPU")
def test_the_interpreter_refuses_to_write_8_bits():
    new = torch.ones(1, 1, 1, 16)
    with pytest.raises(TypeError, match=r"cache\.k_pages must not be of 8 bits.*use PagePool"):
        msa.append_tokens(eight_bit_cache(), new, new, new[:, :, 0])
