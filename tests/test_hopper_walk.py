"""The hopper walk on a GPU: the result of the portable walk, every time (R9, R16, R19).

The properties of the subject "triton-hopper-walk" compare it with the definition on small cases.
"""

from __future__ import annotations

from itertools import accumulate
from unittest import mock

import pytest
import torch

import msa
from benchmarks.cases import make_selection
from msa import kernel_choice
from msa.conformance import all_properties, subjects
from msa.ir import Sequences
from msa.triton_impl import attend_selection, attention

pytest.importorskip("triton", minversion="3.6")

from msa.triton_impl.hopper import union_walk

CANNOT = kernel_choice.obstacle(kernel_choice.usual_call())
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(CANNOT is not None, reason=str(CANNOT))]
BF16, FP16 = torch.bfloat16, torch.float16
SCALE = 128**-0.5
WALK = [s for s in subjects() if s.name == "triton-hopper-walk"]


def packed(*lengths):
    """Sequences from pairs of queries and keys."""
    return Sequences(*((0, *accumulate(n)) for n in zip(*lengths, strict=True)))


RAGGED = packed((54, 1042), (0, 300), (233, 3120), (1, 1), (700, 700), (12, 129), (3, 2999))
CASES = {  # sequences, groups, heads of a group, dtype, chance to keep a neighbour's block
    "one sequence": (Sequences.one(512, 512), 4, 16, BF16, 0.8),
    "one token": (Sequences.one(1, 1), 1, 16, BF16, 0.0),
    "ragged": (RAGGED, 4, 16, BF16, 0.8),
    "ragged, nothing alike": (RAGGED, 4, 16, BF16, 0.0),
    "float16": (RAGGED, 4, 16, FP16, 0.95),
    "five heads": (Sequences.one(700, 900), 2, 5, BF16, 0.8),
    "one head": (Sequences.one(300, 900), 3, 1, BF16, 0.5),
    "64 heads": (Sequences.one(300, 900), 1, 64, BF16, 0.8),
    "long rows": (Sequences.one(300, 40_000), 4, 16, BF16, 0.5),
}  # fmt: skip


def arguments(sequences, groups, group, dtype, keep, seed=0):
    """q, k, v and a selection."""
    random = torch.Generator("cuda").manual_seed(seed)
    q, k, v = (
        torch.randn(n, heads, 128, generator=random, device="cuda").to(dtype)
        for n, heads in (
            (sequences.total_q, groups * group), (sequences.total_k, groups),
            (sequences.total_k, groups),
        )
    )  # fmt: skip
    config = msa.MSAConfig()
    return q, k, v, make_selection(sequences, keep, config=config, groups=groups, seed=seed)


def assert_close(got, want):
    """Equal up to the rounding of out, and of 2^13 float32 additions for lse."""
    eps = torch.finfo(got.out.dtype).eps
    torch.testing.assert_close(got.out, want.out, rtol=4 * eps, atol=4 * eps)
    torch.testing.assert_close(got.lse, want.lse, rtol=1e-5, atol=1e-5)


@pytest.fixture(params=["walk all", "fold"])
def folding(request, monkeypatch):
    """Unions that are walked whole, and unions whose rare blocks are KV-outer and folded in."""
    if request.param == "fold":
        monkeypatch.setattr(kernel_choice, "LONGEST_WHOLE", 0)
        monkeypatch.setattr(attention, "choose_order", lambda selection, group: "split")
        monkeypatch.setattr(attention, "limits", lambda top_k: (2, 6))
    return request.param


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("folding")
def test_the_result_is_that_of_the_portable_walk(name):
    given = arguments(*CASES[name])
    want = attend_selection(*given, SCALE, "union", "portable")
    assert_close(attend_selection(*given, SCALE, kernels="hopper"), want)


@pytest.mark.parametrize("name", ["ragged", "ragged, nothing alike", "one token"])
@pytest.mark.usefixtures("folding")
def test_two_hundred_repetitions_give_the_same_bits(name):
    given = arguments(*CASES[name])
    want = attend_selection(*given, SCALE, kernels="hopper")
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(200):
        got = attend_selection(*given, SCALE, kernels="hopper")
        different += (got.out != want.out).sum() + (got.lse != want.lse).sum()
    assert different.item() == 0


def short_ragged(count):
    """Sequences of at most 59 queries, behind at most 1,999 keys; not all are without queries."""
    random = torch.Generator().manual_seed(0)
    for _ in range(count):
        n = torch.randint(0, 60, (int(torch.randint(1, 9, (), generator=random)),),
                          generator=random)  # fmt: skip
        n[0] += 1
        more = torch.randint(0, 2000, n.shape, generator=random)
        yield packed(*zip(n.tolist(), (n + more).tolist(), strict=True))


def test_a_hundred_short_ragged_shapes():
    """Without waiting in between: a wrong release would hang or mix up tiles."""
    found = []
    for seed, sequences in enumerate(short_ragged(100)):
        given = arguments(sequences, 4, 16, BF16, 0.6, seed)
        found.append((attend_selection(*given, SCALE, kernels="hopper"), given))
    for got, given in found:
        assert_close(got, attend_selection(*given, SCALE, "union", "portable"))


def test_without_queries_or_sequences():
    for sequences in (packed((0, 500), (0, 0)), Sequences((0,), (0,))):
        q, k = (
            torch.ones(0, 16, 128, dtype=BF16, device="cuda"),
            torch.ones(sequences.total_k, 1, 128, dtype=BF16, device="cuda"),
        )
        ids = torch.zeros(0, 1, 16, dtype=torch.int32, device="cuda")
        chosen = msa.Selection(ids, sequences, 128)
        assert attend_selection(q, k, k, chosen, SCALE, kernels="hopper").out.shape == q.shape


@pytest.mark.usefixtures("folding")
def test_what_is_not_finite_stays_in_its_sequence():
    q, k, v, chosen = arguments(*CASES["ragged"])
    clean = attend_selection(q, k, v, chosen, SCALE, kernels="hopper")
    queries, keys = list(chosen.sequences.spans())[2]
    k[keys] = v[keys] = torch.nan
    got = attend_selection(q, k, v, chosen, SCALE, kernels="hopper")
    other = torch.ones(len(q), dtype=torch.bool, device="cuda")
    other[queries] = False
    assert torch.equal(got.out[other], clean.out[other])
    assert torch.equal(got.lse[other], clean.lse[other])
    assert got.out[queries].isnan().all()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 2.0**24, 1e20])
def test_logits_of_every_size(scale):
    q, k, v, chosen = arguments(*CASES["one sequence"])
    want = attend_selection(q, k, v, chosen, scale, "union", "portable")
    assert_close(attend_selection(q, k, v, chosen, scale, kernels="hopper"), want)


def test_strides_of_every_kind():
    q, k, v, chosen = arguments(*CASES["ragged"])
    want = attend_selection(q, k, v, chosen, SCALE, kernels="hopper")
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    padded = [torch.cat([x, x], 2)[:, :, :128] for x in (q, k, v)]
    for given in (turned, padded):
        got = attend_selection(*given, chosen, SCALE, kernels="hopper")
        assert torch.equal(got.out, want.out) and torch.equal(got.lse, want.lse)


def test_the_gradients_are_those_of_the_portable_walk():
    *tensors, chosen = arguments(*CASES["ragged"])
    found = []
    for kernels in ("portable", "hopper"):
        leaves = [x.clone().requires_grad_() for x in tensors]
        output = attend_selection(*leaves, chosen, SCALE, "union", kernels)
        (output.out.float().square().sum() + output.lse.sum()).backward()
        found.append([x.grad for x in leaves])
    for one, two in zip(*found, strict=True):
        assert (one - two).double().norm() <= 0.01 * two.double().norm()


def test_a_graph_and_two_streams():
    given = arguments(*CASES["ragged"])
    want = attend_selection(*given, SCALE, kernels="hopper")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = attend_selection(*given, SCALE, kernels="hopper")
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(20):
        held.out.fill_(7)
        torch.cuda.synchronize()
        found = [held]
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(attend_selection(*given, SCALE, kernels="hopper"))
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(got.out, want.out) for got in found)


def test_where_auto_takes_it():
    """Full sequences of up to 128 blocks, every length with loop_order="union"; not short calls."""
    usual = arguments(Sequences.one(1024, 16_384), 4, 16, BF16, 0.8)
    longer = arguments(Sequences.one(1024, 16_385), 4, 16, BF16, 0.8)
    few = arguments(Sequences.one(256, 16_384), 4, 16, BF16, 0.8)
    with mock.patch.object(union_walk, "walk", wraps=union_walk.walk) as walk:
        for given, options, calls in (
            (usual, {}, 1), (usual, {"loop_order": "union"}, 1), (longer, {}, 0), (few, {}, 0),
            (usual, {"kernels": "portable"}, 0), (usual, {"loop_order": "kv_outer"}, 0),
            (longer, {"loop_order": "union"}, 1), (longer, {"kernels": "hopper"}, 1),
            (few, {"kernels": "hopper"}, 1),
        ):  # fmt: skip
            walk.reset_mock()
            msa.sparse_attention(*given, **options)
            assert walk.call_count == calls, options


def test_attention_names_it_where_it_can_run():
    q, k, v, _ = arguments(Sequences.one(512, 512), 4, 16, BF16, 0.8)
    q_idx, k_idx = q[:, :4], k[:, 0]
    with mock.patch.object(union_walk, "walk", wraps=union_walk.walk) as walk:
        msa.attention(q, k, v, q_idx, k_idx, kernels="hopper")
        assert walk.call_count == 1
        msa.attention(q, k, v, q_idx, k_idx, kernels="hopper", loop_order="kv_outer")
        msa.attention(q[:, :, :64], k[:, :, :64], v, q_idx, k_idx, kernels="hopper")
        assert walk.call_count == 1
    with pytest.raises(ValueError, match="q must have D = 128 for kernels='hopper', got 64"):
        chosen = msa.select(q_idx, k_idx)
        msa.sparse_attention(q[:, :, :64], k[:, :, :64], v, chosen, kernels="hopper")


@pytest.mark.parametrize("subject", WALK, ids=lambda subject: subject.name)
@pytest.mark.parametrize("name", [
    "r9_every_loop_order_is_the_definition", "r19_every_loop_order_gives_the_same_bits",
])  # fmt: skip
def test_properties_where_blocks_are_folded_in(name, subject, monkeypatch):
    """Two fixed cases of the sanitized tests, with unions that are cut short."""
    from test_sanitized import WALK_CASES

    monkeypatch.setattr(kernel_choice, "LONGEST_WHOLE", 0)
    monkeypatch.setattr(attention, "choose_order", lambda selection, group: "split")
    monkeypatch.setattr(attention, "limits", lambda top_k: (1, 2))
    (check,) = (p.check for p in all_properties() if p.name == name)
    for label in ("ragged", "long unions"):
        check(subject, WALK_CASES[label])
