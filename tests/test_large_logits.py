"""Logits of any size on the torch backend: probabilities sum to 1, and NaN stays, as in the spec.

For a logit of 1e8, an LSE in float32 has steps of 8, so probabilities must not be computed from it.
Each row is divided by its sum instead.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import msa
import msa.ops
from msa import reference

SIZES = [1e3, 1e4, 1e6, 1e8, 1e12, 1e30]
CONFIG = msa.MSAConfig(block_size=4, top_k=3, softmax_scale=1.0, index_scale=1.0)
TOKENS = 21


def equal_logits(size):
    """q, k, q_idx, k_idx: every logit is `size`, every score 0; one sequence, Hq = 4, Hkv = 2."""
    q, k = torch.full((TOKENS, 4, 1), size), torch.ones(TOKENS, 2, 1)
    return q, k, torch.zeros(TOKENS, 2, 1), torch.zeros(TOKENS, 1)


def every_way(q, k, v, index):
    """Attention over the same blocks: in one call, over a selection, and by both loop orders."""
    trace = msa.lower(q, k, v, *index, config=CONFIG)
    return {
        "attention": msa.attention(q, k, v, *index, config=CONFIG).out,
        "sparse": msa.sparse_attention(q, k, v, trace.selection, softmax_scale=1.0).out,
        "combined": trace.output.out,
        "union": trace.union_output.out,
    }


@pytest.mark.parametrize("size", SIZES)
def test_the_mean_of_ones_is_one(size):
    q, k, *index = equal_logits(size)
    v = torch.ones(TOKENS, 2, 3)
    for out in every_way(q, k, v, index).values():
        torch.testing.assert_close(out, torch.ones(TOKENS, 4, 3), rtol=0, atol=1e-6)
    pages = [torch.ones(2, 16, *x.shape[1:]) for x in (k, v, index[1])]
    cache = msa.PagedKV(*pages, torch.tensor([[1, 0]]), torch.tensor([TOKENS]))
    out = msa.decode(q[None, -2:], index[0][None, -2:], cache,
                     config=msa.MSAConfig(16, 2, softmax_scale=1.0)).out  # fmt: skip
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_blocks_weigh_as_many_tokens_as_they_have(size):
    """A query sees a part of its own block, so the blocks have different weights in the mean."""
    q, k, *index = equal_logits(size)
    v = torch.randn(TOKENS, 2, 3, generator=torch.Generator().manual_seed(0))
    found = msa.select(*index, config=CONFIG)
    wide = (x.double().numpy() for x in (0 * q, k, v))  # logits of 0 have the same means
    chosen = msa.Selection(found.indices.numpy(), found.sequences, 4)
    wanted = reference.attend_selection(*wide, chosen, 1.0).out
    ways = every_way(q, k, v, index)
    if size > 1e8:
        del ways["combined"]  # an LSE alone, even in float64, has lost the sum (R15)
    for out in ways.values():
        np.testing.assert_allclose(out, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("through", ["functions", "operators"])
@pytest.mark.parametrize("size", SIZES)
def test_gradients_are_those_of_small_logits(size, through):
    """dv holds each row's probabilities; dq and dk are sums of P (dP - delta) times k and q."""
    grads = []
    for scale in (1.0, 1 / size):  # the same product with q of 1: the logits are 1
        q, k, *index = equal_logits(size)
        v = torch.randn(TOKENS, 2, 3, generator=torch.Generator().manual_seed(1))
        given = [x.requires_grad_() for x in (q, k, v)]
        chosen = msa.select(*index, config=CONFIG)
        if through == "functions":
            out = msa.sparse_attention(*given, chosen, softmax_scale=scale).out
        else:
            out, _ = msa.ops.sparse_attention(
                *given, chosen.indices, block_size=4, softmax_scale=scale
            )
        out.backward(torch.ones_like(out).cumsum(0))
        d_q, d_k, d_v = (x.grad for x in given)
        grads.append((d_q / scale, d_k / (scale * size), d_v))
    for large, small in zip(*grads):
        torch.testing.assert_close(large, small, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_the_divergence_of_equal_distributions_is_nothing(size):
    tensors = equal_logits(size)
    q, k, *index = tensors
    output = msa.attention(q, k, torch.ones(TOKENS, 2, 1), *index, config=CONFIG, align=True)
    known = msa.align_index(*tensors, output.selection, lse=output.lse, config=CONFIG)
    warm_up = msa.align_index(*tensors, config=CONFIG)
    for loss in (output.kl, known, warm_up):
        assert abs(loss.item()) < 1e-6


@pytest.mark.parametrize("size", SIZES[:4])
def test_two_tokens_apart(size):
    """One of two logits is lower by 1, so its probability is 1 / (1 + e), up to rounding."""
    gap = max(1.0, float(np.spacing(np.float32(size))))
    q, k = torch.ones(2, 1, 1), torch.tensor([size, size - gap]).view(2, 1, 1)
    v = torch.tensor([0.0, 1.0]).view(2, 1, 1)
    config = msa.MSAConfig(1, 2, softmax_scale=1.0)
    out = msa.attention(q, k, v, q, k[:, 0], config=config).out[1].item()
    assert out == pytest.approx(1 / (1 + np.exp(gap)), abs=1e-6)


SPOILED = [np.nan, np.inf, -np.inf]


@pytest.mark.parametrize("name", ["q", "lse"])
@pytest.mark.parametrize("value", SPOILED)
@pytest.mark.parametrize("warm_up", [False, True])
def test_what_is_not_finite_is_seen_in_the_loss(name, value, warm_up):
    """The loss is NaN where that of the spec is, and else the same number."""
    rng = np.random.default_rng(0)
    shapes = {"q": (6, 2, 3), "k": (6, 1, 3), "q_idx": (6, 1, 2), "k_idx": (6, 2)}
    given = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    config = msa.MSAConfig(2, 2)
    chosen = None
    v = given["k"]
    output = msa.attention(given["q"], given["k"], v, given["q_idx"], given["k_idx"], config=config)
    if not warm_up:
        chosen = output.selection
    given["lse"] = output.lse.copy()
    given[name][4, 1] = value
    found = [
        float(msa.align_index(**given, selection=chosen, config=config, backend=backend))
        for backend in ("reference", "torch")
    ]
    assert np.isnan(found[0]) == np.isnan(found[1])
    np.testing.assert_allclose(*found, rtol=1e-5)
    if value != np.inf or name == "q":
        assert np.isnan(found[0])


@pytest.mark.parametrize("scale", [2.0**-126, 1e-30, 1e30, 1e38, 2.0**127])
@pytest.mark.parametrize("backend", ["torch"])
def test_scales_at_the_ends_of_their_range(scale, backend):
    """Products that overflow float32 select the same blocks and give the same attention."""
    rng = np.random.default_rng(1)
    shapes = ((40, 2, 4), (40, 1, 4), (40, 1, 4), (40, 1, 3), (40, 3))
    given = [(rng.integers(-9, 10, s) * 8.0).astype(np.float32) for s in shapes]
    config = msa.MSAConfig(2, 3, softmax_scale=scale, index_scale=scale)
    wanted, found = (
        msa.attention(*given, config=config, align=True, backend=b) for b in ("reference", backend)
    )
    np.testing.assert_array_equal(found.selection.indices, wanted.selection.indices)
    np.testing.assert_allclose(found.out, wanted.out, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.kl, wanted.kl, rtol=1e-5, atol=1e-6)
    for name in ("output", "union_output"):
        trace = msa.lower(*given, config=config, backend=backend)
        np.testing.assert_allclose(getattr(trace, name).out, wanted.out, rtol=0, atol=1e-5)
