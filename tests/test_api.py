"""The public functions: every layout, both kinds of array, the choice of a backend."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_calls import BACKENDS, CONFIG, arrays

import msa
from msa.dispatch import resolve


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batched_is_packed(backend, rng):
    given = arrays(rng, 3, 10, lead_k=(3, 17))
    batched = msa.attention(**given, config=CONFIG, backend=backend)
    packed = msa.attention(
        **{name: x.reshape(-1, *x.shape[2:]) for name, x in given.items()},
        cu_seqlens_q=[0, 10, 20, 30], cu_seqlens_k=[0, 17, 34, 51],
        config=CONFIG, backend=backend,
    )  # fmt: skip
    assert batched.out.shape == (3, 10, 4, 5) and batched.lse.shape == (3, 10, 4)
    assert (batched.out.reshape(30, 4, 5) == packed.out).all()
    assert (batched.selection.indices == packed.selection.indices).all()
    assert batched.selection.sequences == msa.Sequences.uniform(3, 10, 17)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "kind", [list, tuple, np.array, lambda b: torch.tensor(b, dtype=torch.int32)]
)
def test_borders_may_come_as_any_sequence(kind, backend, rng):
    given = arrays(rng, 9)
    borders = {"cu_seqlens_q": kind([0, 2, 2, 9]), "cu_seqlens_k": kind([0, 2, 2, 9])}
    apart = msa.attention(**given, **borders, config=CONFIG, backend=backend)
    for qs in (slice(0, 2), slice(2, 9)):
        alone = {name: x[qs] for name, x in given.items()}
        expected = msa.attention(**alone, config=CONFIG, backend=backend)
        np.testing.assert_allclose(apart.out[qs], expected.out, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_numpy_in_numpy_out(backend, rng):
    for dtype in (np.float16, np.float32, np.float64):
        output = msa.attention(**arrays(rng, 9, dtype=dtype), config=CONFIG, backend=backend)
        assert type(output.out) is np.ndarray and output.out.dtype == dtype
        assert type(output.lse) is np.ndarray and output.lse.dtype == np.float32
        assert type(output.selection.indices) is np.ndarray
        assert output.selection.indices.dtype == np.int32


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_call_gives_the_loss_too(backend, rng):
    given = arrays(rng, 2, 9)
    plain = msa.attention(**given, config=CONFIG, backend=backend)
    output = msa.attention(**given, config=CONFIG, align=True, backend=backend)
    assert plain.kl is None and output.kl.shape == () and output.kl.dtype == np.float32
    assert (output.out == plain.out).all() and (output.lse == plain.lse).all()
    branches = [given[n] for n in ("q", "k", "q_idx", "k_idx")]
    for lse in (None, plain.lse, plain.lse.astype(np.float64)):
        loss = msa.align_index(*branches, plain.selection, lse=lse, config=CONFIG, backend=backend)
        np.testing.assert_allclose(loss, output.kl, rtol=1e-5)
    wide = {n: x.astype(np.float64) for n, x in given.items()}
    assert msa.attention(**wide, config=CONFIG, align=True, backend=backend).kl.dtype == np.float64


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_torch_in_torch_out(dtype, backend, rng):
    given = {name: torch.tensor(x).to(dtype) for name, x in arrays(rng, 2, 9).items()}
    output = msa.attention(**given, config=CONFIG, backend=backend)
    assert output.out.dtype == dtype and output.lse.dtype == torch.float32
    assert output.selection.indices.dtype == torch.int32
    loss = msa.align_index(
        *(given[n] for n in ("q", "k", "q_idx", "k_idx")), config=CONFIG, backend=backend
    )
    assert isinstance(loss, torch.Tensor) and loss.shape == ()


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_with_a_contiguous_last_dim(backend, rng):
    given = {name: torch.tensor(x) for name, x in arrays(rng, 2, 9).items()}
    # [B, H, T, D] in memory, seen as [B, T, H, D]; and a slice of a wider tensor
    moved = {
        name: x.transpose(1, 2).contiguous().transpose(1, 2) if x.ndim == 4 else x
        for name, x in given.items()
    }
    moved["k"] = torch.cat([moved["k"], torch.full_like(moved["k"], torch.nan)], -1)[..., :6]
    assert not moved["q"].is_contiguous() and not moved["k"].is_contiguous()
    expected = msa.attention(**given, config=CONFIG, backend=backend)
    output = msa.attention(**moved, config=CONFIG, backend=backend)
    assert torch.equal(output.out, expected.out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_parts_make_the_whole(backend, rng):
    given = arrays(rng, 2, 9)
    whole = msa.attention(**given, config=CONFIG, backend=backend)
    selection = msa.select(given["q_idx"], given["k_idx"], config=CONFIG, backend=backend)
    assert (selection.indices == whole.selection.indices).all()
    parts = msa.sparse_attention(*(given[n] for n in "qkv"), selection, backend=backend)
    assert (parts.out == whole.out).all() and parts.out.shape == (2, 9, 4, 5)
    assert parts.selection.indices is not None
    trace = msa.lower(**given, config=CONFIG, backend=backend, chunk_size=3, tile_size=4)
    np.testing.assert_allclose(trace.output.out.reshape(whole.out.shape), whole.out, atol=1e-6)
    np.testing.assert_allclose(trace.union_output.out, trace.output.out, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_decode_is_the_end_of_a_prefill(backend, rng):
    given = arrays(rng, 11)
    pages = rng.permutation(5)[:3]  # three pages of four tokens, anywhere in a pool of five
    pool = {}
    for name in ("k", "v", "k_idx"):
        padded = np.full((12, *given[name].shape[1:]), np.nan, np.float32)
        padded[:11] = given[name]
        pool[name] = np.full((5, 4, *given[name].shape[1:]), np.nan, np.float32)
        pool[name][pages] = padded.reshape(3, 4, *given[name].shape[1:])
    table = np.array([[0, 0, 0], pages])
    cache = msa.PagedKV(pool["k"], pool["v"], pool["k_idx"], table, np.array([0, 11]))
    new = {n: np.stack([given[n][-2:], given[n][-2:]]) for n in ("q", "q_idx")}
    output = msa.decode(new["q"], new["q_idx"], cache, config=CONFIG, backend=backend)
    prefill = msa.attention(**given, config=CONFIG, backend=backend)
    np.testing.assert_allclose(output.out[1], prefill.out[-2:], atol=1e-6)
    np.testing.assert_allclose(output.lse[1], prefill.lse[-2:], atol=1e-6)
    assert (output.out[0] == 0).all() and (output.lse[0] == -np.inf).all()
    assert (output.selection.indices == prefill.selection.indices[-2:]).all()


def test_auto_goes_by_the_kind_of_array():
    assert resolve("auto", np.zeros(1)) == "reference"
    assert resolve("auto", torch.zeros(1)) == "torch"
    assert resolve("torch", np.zeros(1)) == "torch"


def test_gradients_reach_what_they_should(rng):
    given = {n: torch.tensor(x, requires_grad=True) for n, x in arrays(rng, 9).items()}
    output = msa.attention(**given, config=CONFIG)
    output.out.sum().backward()
    assert all(given[n].grad is not None for n in "qkv")
    assert given["q_idx"].grad is None and given["k_idx"].grad is None


def test_the_reference_does_not_drop_gradients_silently(rng):
    given = {n: torch.tensor(x, requires_grad=True) for n, x in arrays(rng, 9).items()}
    with pytest.raises(ValueError, match="q must not require a gradient"):
        msa.attention(**given, config=CONFIG, backend="reference")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_selection_brings_its_own_block_size_to_the_loss(backend, rng):
    """What the configuration says of blocks is for the warm-up form."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    given = arrays(rng, 40, dim=16)
    q, k, q_idx, k_idx = (torch.tensor(given[n]).to(device) for n in ("q", "k", "q_idx", "k_idx"))
    config = msa.MSAConfig(block_size=16, top_k=2)
    chosen = msa.select(q_idx, k_idx, config=config, backend=backend)
    wanted = msa.align_index(q, k, q_idx, k_idx, chosen, config=config, backend=backend)
    assert msa.align_index(q, k, q_idx, k_idx, chosen, backend=backend) == wanted


def test_autocast_changes_nothing(rng):
    """Also not on the way back."""
    made, found = arrays(rng, 9), []
    for on in (False, True):
        given = {n: torch.tensor(x, requires_grad=True) for n, x in made.items()}
        q, k, v, q_idx, k_idx = given.values()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            output = msa.attention(**given, config=CONFIG, align=True)
            sparse = msa.sparse_attention(q, k, v, msa.select(q_idx, k_idx, config=CONFIG))
            warm = msa.align_index(q, k, q_idx, k_idx, config=CONFIG)
            trace = msa.lower(**{n: x.detach() for n, x in given.items()}, config=CONFIG)
        (output.out.sum() + sparse.out.sum() + output.kl + warm).backward()
        grads = (x.grad for x in given.values())
        found.append([output.out, sparse.out, output.kl, warm, trace.union_output.out, *grads])
    for plain, cast in zip(*found):
        assert torch.equal(plain, cast)
