"""dQ on Hopper GPUs: the definition, the portable kernel, the same bits every time (R18, R19)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_hopper_walk import BF16, CASES, FP16, SCALE, arguments, packed

from msa import kernel_choice
from msa.conformance.tolerances import HOPPER, PRECISIONS, Precision, compare
from msa.conformance.yardstick import Attention, block_mask
from msa.conformance.yardstick_training import Gradients
from msa.ir import Sequences
from msa.triton_impl import query_gradients as portable
from msa.triton_impl.attention import attend_selection
from msa.triton_impl.launch import positions_of
from msa.triton_impl.tile_union import split_tiles

pytest.importorskip("triton", minversion="3.6")

from msa.triton_impl.hopper import query_gradients as hopper

CANNOT = kernel_choice.obstacle(kernel_choice.usual_call())
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(CANNOT is not None, reason=str(CANNOT))]
SMALL = {  # sequences, groups, heads of a group, dtype, chance to keep a neighbour's block
    "a tile and a part": (Sequences.one(13, 300), 2, 16, BF16, 0.5),
    "one token": (Sequences.one(1, 1), 1, 16, BF16, 0.0),
    "ragged": (packed((9, 140), (0, 130), (1, 1), (20, 700)), 2, 16, BF16, 0.0),
    "float16": (packed((9, 140), (20, 700)), 2, 16, FP16, 0.8),
    "five heads": (packed((17, 129), (20, 300)), 2, 5, BF16, 0.8),
    "one head": (packed((17, 129), (20, 300)), 3, 1, BF16, 0.8),
    "64 heads": (packed((3, 129), (7, 300)), 1, 64, BF16, 0.8),
}  # fmt: skip


def given(sequences, groups, group, dtype, keep, seed=0):
    """q, k, v, out, dO, lse, its gradient, and the selection."""
    q, k, v, chosen = arguments(sequences, groups, group, dtype, keep, seed)
    output = attend_selection(q, k, v, chosen, SCALE, "union", "portable")
    random = torch.Generator("cuda").manual_seed(seed + 1)
    d_out = torch.randn(q.shape, generator=random, device="cuda").to(dtype)
    d_lse = torch.randn(q.shape[:2], generator=random, device="cuda")
    return (q, k, v, output.out, d_out, output.lse, d_lse), chosen


def run(tensors, chosen, module=hopper, **options):
    """dQ and delta by a module's function, along unions of its own tile size."""
    group = tensors[0].shape[1] // tensors[1].shape[1]
    size = hopper.tile_size_of(group) if module is hopper else positions_of(group)
    union = split_tiles(chosen, size)
    return module.query_gradients(*tensors, union, chosen, SCALE, **options)


@pytest.mark.parametrize("name", SMALL)
def test_the_result_is_the_definition(name):
    """Within the budget of the backward pass; every place of dQ is written."""
    tensors, chosen = given(*SMALL[name])
    d_q = torch.full_like(tensors[0], torch.nan)
    got, delta = run(tensors, chosen, into=d_q)
    assert got is d_q
    q, k, v, out, d_out, _, d_lse = (x.double().cpu().numpy() for x in tensors)
    mask = block_mask(chosen.indices.cpu().numpy(), chosen.sequences, 128)
    want = Gradients(Attention(q, k, v, mask, SCALE, parts=chosen.top_k), d_out, d_lse)
    kind = str(got.dtype).removeprefix("torch.")
    usual = PRECISIONS[kind]
    precision = Precision(usual.stored, usual.work, usual.tiny, HOPPER[kind])
    compare("dq", got.double().cpu().numpy(), want.values()["q"], want.bounds(precision)["q"])
    sums = np.abs(d_out * out).sum(-1) + np.abs(d_lse)
    wanted = (d_out * out).sum(-1) - d_lse
    compare("delta", delta.cpu().numpy(), wanted, 136 * usual.work * sums)


@pytest.mark.parametrize("name", CASES)
def test_the_result_is_that_of_the_portable_kernel(name):
    tensors, chosen = given(*CASES[name])
    (got, delta), (want, want_delta) = run(tensors, chosen), run(tensors, chosen, portable)
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got, want, rtol=4 * eps, atol=4 * eps * float(want.abs().max()))
    torch.testing.assert_close(delta, want_delta, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["ragged", "ragged, nothing alike", "one token"])
def test_two_hundred_repetitions_give_the_same_bits(name):
    tensors, chosen = given(*CASES[name])
    want, want_delta = run(tensors, chosen)
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(200):
        got, delta = run(tensors, chosen)
        different += (got != want).sum() + (delta != want_delta).sum()
    assert different.item() == 0


def test_a_hundred_short_ragged_shapes():
    """Without waiting in between: a wrong release would hang or mix up tiles."""
    random = torch.Generator().manual_seed(0)
    found = []
    for seed in range(100):
        n = torch.randint(0, 60, (int(torch.randint(1, 9, (), generator=random)),),
                          generator=random)  # fmt: skip
        n[0] += 1  # some sequences have no query, but not all
        more = torch.randint(0, 2000, n.shape, generator=random)
        sequences = packed(*zip(n.tolist(), (n + more).tolist(), strict=True))
        case = given(sequences, 4, 16, BF16, 0.6, seed)
        found.append((run(*case)[0], case))
    for got, case in found:
        want = run(*case, portable)[0]
        assert (got - want).double().norm() <= 0.01 * want.double().norm()


def test_without_queries():
    tensors, chosen = given(packed((0, 500), (0, 0)), 1, 16, BF16, 0.0)
    d_q, delta = run(tensors, chosen)
    assert d_q.shape == tensors[0].shape and delta.shape == tensors[0].shape[:2]


def test_what_is_not_finite_stays_in_its_sequence():
    (q, k, v, *rest), chosen = given(*CASES["ragged"])
    clean, _ = run((q, k, v, *rest), chosen)
    queries, keys = list(chosen.sequences.spans())[2]
    k[keys] = v[keys] = torch.nan
    got, _ = run((q, k, v, *rest), chosen)
    other = torch.ones(len(q), dtype=torch.bool, device="cuda")
    other[queries] = False
    assert torch.equal(got[other], clean[other])
    assert got[queries].isnan().all()


def test_strides_of_every_kind():
    tensors, chosen = given(*CASES["ragged"])
    (q, k, v), rest = tensors[:3], tensors[3:]
    want, want_delta = run(tensors, chosen)
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    padded = [torch.cat([x, x], 2)[:, :, :128] for x in (q, k, v)]
    odd = [torch.cat([x, x], 2)[:, :, 3:131].copy_(x) for x in (q, k, v)]
    for some in (turned, padded, odd):
        got, delta = run((*some, *rest), chosen)
        assert torch.equal(got, want) and torch.equal(delta, want_delta)


def test_heads_that_are_all_the_same_tensor():
    """A stride of zero between heads and between tokens."""
    (q, k, v, *rest), chosen = given(Sequences.one(100, 500), 2, 16, BF16, 0.8)
    for shared in (q[:, :1].expand_as(q), q[:1].expand_as(q)):
        got, _ = run((shared, k, v, *rest), chosen)
        assert torch.equal(got, run((shared.contiguous(), k, v, *rest), chosen)[0])


def test_tiles_of_another_size_are_refused():
    tensors, chosen = given(Sequences.one(100, 500), 2, 16, BF16, 0.8)
    with pytest.raises(ValueError, match="union must have tiles of 8 queries, got 4"):
        hopper.query_gradients(*tensors, split_tiles(chosen, 4), chosen, SCALE)


def test_a_graph_and_two_streams():
    case = given(*CASES["ragged"])
    want, _ = run(*case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held, _ = run(*case)
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(20):
        held.fill_(7)
        torch.cuda.synchronize()
        found = [held]
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(run(*case)[0])
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(got, want) for got in found)
