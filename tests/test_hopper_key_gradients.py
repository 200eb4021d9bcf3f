"""dK and dV by the hopper kernel on a GPU: within their bounds, the same bits always (R18, R19).

The bounds are those of the property that every backend is held to.
"""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch

import msa
from msa.conformance import all_properties
from msa.ir import Sequences
from msa.triton_impl import attend_selection, attention
from tests.test_hopper_walk import (
    BF16,
    CANNOT,
    CASES,
    FP16,
    SCALE,
    WALK,
    arguments,
    short_ragged,
)
from tests.test_sanitized import KEY_CASES

pytest.importorskip("triton", minversion="3.6")

from msa.triton_impl.hopper import key_gradients

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(CANNOT is not None, reason=str(CANNOT))]
PROPERTIES = {p.name: p.check for p in all_properties()}
LARGER = {
    "several items of a row": replace(
        KEY_CASES["one sequence"], sequences=Sequences.one(300, 300), config=msa.MSAConfig(128, 5)
    ),
    "one token": replace(KEY_CASES["one sequence"], sequences=Sequences.one(1, 1)),
    "32 heads": replace(KEY_CASES["one sequence"], group=32, dtype="float16"),
}
NAMES = ("ragged", "ragged, nothing alike", "one token")


@pytest.fixture
def filled(monkeypatch):
    """New tensors of numbers are NaN, so what is read before it is written shows."""
    real = torch.empty

    def empty(*args, **options):
        made = real(*args, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", empty)


def gradients(q, k, v, chosen, kernels="hopper", scale=SCALE, d_out=None):
    """dQ, dK, dV of <out, d_out> + sum(lse)."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    output = attend_selection(*leaves, chosen, scale, "union", kernels)
    if d_out is None:
        d_out = torch.randn(
            q.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda"
        )
    total = (output.out, output.lse), (d_out.to(q.dtype), torch.ones_like(output.lse))
    return torch.autograd.grad(total[0], leaves, total[1])


def assert_close(got, want):
    """Equal up to the rounding of P and dS to 16 bits, by norm over all keys."""
    for one, two in zip(got, want, strict=True):
        assert (one.double() - two.double()).norm() <= 0.01 * two.double().norm()


@pytest.mark.parametrize("label", KEY_CASES | LARGER)
@pytest.mark.parametrize("subject", WALK, ids=lambda subject: subject.name)
@pytest.mark.usefixtures("filled")
def test_the_gradients_lie_within_their_bounds(label, subject):
    with mock.patch.object(key_gradients, "key_gradients", wraps=key_gradients.key_gradients) as it:
        PROPERTIES["r18_gradients_in_every_dtype"](subject, (KEY_CASES | LARGER)[label])
    assert it.call_count == 1


@pytest.mark.parametrize("name", NAMES)
def test_two_hundred_repetitions_give_the_same_bits(name):
    given = arguments(*CASES[name])
    want = gradients(*given)
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(200):
        different += sum((a != b).sum() for a, b in zip(gradients(*given), want, strict=True))
    assert different.item() == 0


def test_a_hundred_short_ragged_shapes():
    """Without waiting in between: a wrong release would hang or mix up tiles."""
    found = []
    for seed, sequences in enumerate(short_ragged(100)):
        group, dtype = (8, 16, 32)[seed % 3], (BF16, FP16)[seed % 2]
        given = arguments(sequences, 2, group, dtype, 0.6, seed)
        found.append((gradients(*given), given))
    for got, given in found:
        assert_close(got, gradients(*given, "portable"))


def test_strides_of_every_kind():
    q, k, v, chosen = arguments(*CASES["ragged"])
    want = gradients(q, k, v, chosen)
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    padded = [torch.cat([x, x], 2)[:, :, :128] for x in (q, k, v)]
    beside = [torch.cat([x, x], 1)[:, : x.shape[1]] for x in (q, k, v)]
    for given in (turned, padded, beside):
        got = gradients(*given, chosen)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_what_is_not_finite_stays_in_its_sequence():
    q, k, v, chosen = arguments(*CASES["ragged"])
    d_out = torch.randn_like(q)
    clean = gradients(q, k, v, chosen, d_out=d_out)
    queries, keys = list(chosen.sequences.spans())[2]
    q[queries] = k[keys] = v[keys] = d_out[queries] = torch.nan
    got = gradients(q, k, v, chosen, d_out=d_out)
    other = torch.ones(len(k), dtype=torch.bool, device="cuda")
    other[keys] = False
    for one, two in zip(got[1:], clean[1:], strict=True):
        assert torch.equal(one[other], two[other])


@pytest.mark.parametrize("scale", [1e-10, 1.0])
def test_softmax_scales(scale):
    given = arguments(*CASES["one sequence"])
    assert_close(gradients(*given, scale=scale), gradients(*given, "portable", scale=scale))


def test_super_tiles_add_up(monkeypatch):
    given = arguments(*CASES["ragged"])
    want = gradients(*given)
    monkeypatch.setattr(attention, "gradient_tile", lambda *_: 100)
    assert_close(gradients(*given), want)


def test_the_replay_of_a_graph():
    q, k, v, chosen = arguments(*CASES["ragged"])
    want = gradients(q, k, v, chosen)
    output = attend_selection(q, k, v, chosen, SCALE, "union", "hopper")
    random = torch.Generator("cuda").manual_seed(1)
    d_out = torch.randn(q.shape, generator=random, device="cuda").to(q.dtype)
    given = (d_out, torch.ones_like(output.lse), q, k, v, output.out, output.lse, chosen, SCALE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = attention.gradients(*given, "hopper")
    for _ in range(20):
        for x in held:
            x.fill_(7)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(held, want, strict=True))


@pytest.mark.parametrize(("kernels", "group", "calls"), [
    ("auto", 16, 1), ("hopper", 16, 1), ("portable", 16, 0), ("auto", 5, 0), ("hopper", 5, 0),
])  # fmt: skip
def test_where_it_is_taken(kernels, group, calls):
    given = arguments(Sequences.one(300, 300), 2, group, BF16, 0.8)
    with mock.patch.object(key_gradients, "key_gradients", wraps=key_gradients.key_gradients) as it:
        gradients(*given, kernels)
    assert it.call_count == calls
