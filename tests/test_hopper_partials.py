"""The hopper kernel of KV-outer on a GPU, alone and beside the hopper walk (R15, R16, R19)."""

from __future__ import annotations

import pytest
import torch
from hopper_cases import RAGGED, SCALE, arguments, packed

from msa import kernel_choice
from msa.ir import Sequences
from msa.torch_impl import attend_selection as attend_in_torch
from msa.triton_impl import attend_selection, attention
from msa.triton_impl.partials import fill_slots
from msa.triton_impl.reverse_index import reverse_edges
from msa.triton_impl.schedule import schedule_edges

pytest.importorskip("triton", minversion="3.6")

from msa.triton_impl.hopper import partials as hopper

CANNOT = kernel_choice.obstacle(kernel_choice.usual_call())
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(CANNOT is not None, reason=str(CANNOT))]
BF16, FP16 = torch.bfloat16, torch.float16


CASES = {  # sequences, groups, heads of a group, dtype, chance to keep a neighbour's block
    "one sequence": (Sequences.one(512, 512), 4, 16, BF16, 0.8),
    "one token": (Sequences.one(1, 1), 1, 16, BF16, 0.0),
    "ragged": (RAGGED, 4, 16, BF16, 0.8),
    "ragged, nothing alike": (RAGGED, 4, 16, FP16, 0.0),
    "eight heads": (Sequences.one(700, 900), 2, 8, BF16, 0.8),
    "32 heads": (Sequences.one(300, 2900), 2, 32, FP16, 0.0),
    "64 heads": (Sequences.one(300, 900), 1, 64, BF16, 0.8),
    "long rows": (Sequences.one(300, 40_000), 4, 16, BF16, 0.5),
}
ORDERS = {"kv_outer": None, "pairs stay": (0, 10**6), "three stay": (0, 0), "by length": (2, 6)}


@pytest.fixture(params=ORDERS)
def order(request, monkeypatch):
    """KV-outer for all blocks, or for those that too few queries of four share."""
    if ORDERS[request.param] is None:
        return "kv_outer"
    monkeypatch.setattr(kernel_choice, "LONGEST_WHOLE", 0)
    monkeypatch.setattr(attention, "choose_order", lambda selection, group: "split")
    monkeypatch.setattr(attention, "SHARED", ORDERS[request.param])
    return "auto"


def error(got, want):
    """The norm of the difference, divided by the norm."""
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("name", CASES)
def test_the_result_is_that_of_float64(name, order):
    """Weights, slots and the output are rounded to 16 bits: three errors of half a unit."""
    q, k, v, chosen = arguments(*CASES[name])
    want = attend_in_torch(q.double(), k.double(), v.double(), chosen, SCALE)
    got = attend_selection(q, k, v, chosen, SCALE, order, "hopper")
    assert error(got.out, want.out) <= 1.5 * torch.finfo(q.dtype).eps
    torch.testing.assert_close(got.lse.double(), want.lse.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_slots_are_those_of_the_portable_kernel(name):
    q, k, v, chosen = arguments(*CASES[name])
    schedule = schedule_edges(reverse_edges(chosen), 128)
    want = fill_slots(q, k, v, schedule, SCALE)
    got = hopper.fill_slots(q, k, v, schedule, SCALE)
    used = torch.arange(chosen.top_k, device="cuda") < want.counts[..., None]
    eps = torch.finfo(q.dtype).eps
    torch.testing.assert_close(got.out[used], want.out[used], rtol=4 * eps, atol=4 * eps)
    torch.testing.assert_close(got.top[used], want.top[used], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.total[used], want.total[used], rtol=1e-5, atol=1e-5)
    assert got.out[~used].isnan().all()  # nothing is written where there is no edge
    assert got.top[~used].isnan().all() and got.total[~used].isnan().all()


@pytest.mark.parametrize("name", ["ragged", "ragged, nothing alike", "one token", "eight heads"])
def test_two_hundred_repetitions_give_the_same_bits(name, order):
    given = arguments(*CASES[name])
    want = attend_selection(*given, SCALE, order, "hopper")
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(200):
        got = attend_selection(*given, SCALE, order, "hopper")
        different += (got.out != want.out).sum() + (got.lse != want.lse).sum()
    assert different.item() == 0


def test_a_hundred_short_ragged_shapes(order):
    """Without waiting in between: a wrong release would hang or mix up tiles."""
    random = torch.Generator().manual_seed(0)
    found = []
    for seed in range(100):
        n = torch.randint(0, 60, (int(torch.randint(1, 9, (), generator=random)),),
                          generator=random)  # fmt: skip
        n[0] += 1  # some sequences have no query, but not all
        more = torch.randint(0, 2000, n.shape, generator=random)
        sequences = packed(*zip(n.tolist(), (n + more).tolist(), strict=True))
        given = arguments(sequences, 4, 16, BF16, 0.6, seed)
        found.append((attend_selection(*given, SCALE, order, "hopper"), given))
    eps = torch.finfo(BF16).eps
    for got, given in found:
        want = attend_selection(*given, SCALE, "kv_outer", "portable")
        torch.testing.assert_close(got.out, want.out, rtol=4 * eps, atol=4 * eps)
        torch.testing.assert_close(got.lse, want.lse, rtol=1e-5, atol=1e-5)


def test_what_is_not_finite_stays_in_its_sequence(order):
    q, k, v, chosen = arguments(*CASES["ragged"])
    clean = attend_selection(q, k, v, chosen, SCALE, order, "hopper")
    queries, keys = list(chosen.sequences.spans())[2]
    k[keys] = v[keys] = torch.nan
    got = attend_selection(q, k, v, chosen, SCALE, order, "hopper")
    other = torch.ones(len(q), dtype=torch.bool, device="cuda")
    other[queries] = False
    assert torch.equal(got.out[other], clean.out[other])
    assert torch.equal(got.lse[other], clean.lse[other])
    assert got.out[queries].isnan().all()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 2.0**24, 1e20])
def test_logits_of_every_size(scale, order):
    q, k, v, chosen = arguments(*CASES["one sequence"])
    want = attend_selection(q, k, v, chosen, scale, "kv_outer", "portable")
    got = attend_selection(q, k, v, chosen, scale, order, "hopper")
    eps = torch.finfo(BF16).eps
    torch.testing.assert_close(got.out, want.out, rtol=4 * eps, atol=4 * eps)
    torch.testing.assert_close(got.lse, want.lse, rtol=1e-5, atol=1e-5)


def test_strides_of_every_kind(order):
    q, k, v, chosen = arguments(*CASES["ragged"])
    want = attend_selection(q, k, v, chosen, SCALE, order, "hopper")
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    padded = [torch.cat([x, x], 2)[:, :, :128] for x in (q, k, v)]
    odd = [torch.nn.functional.pad(x, (1, 2))[:, :, 1:-2] for x in (q, k, v)]
    for given in (turned, padded, odd):
        got = attend_selection(*given, chosen, SCALE, order, "hopper")
        assert torch.equal(got.out, want.out) and torch.equal(got.lse, want.lse)


@pytest.mark.large
def test_queries_far_apart():
    """The last query lies more than 2^31 numbers behind the first one."""
    q, k, v, chosen = arguments(*CASES["one sequence"])
    step = 2**22 + 2**14
    assert (len(q) - 1) * step > 2**31
    far = torch.empty(len(q) * step, dtype=BF16, device="cuda").as_strided(
        q.shape, (step, *q.stride()[1:])
    )
    far.copy_(q)
    want = attend_selection(q, k, v, chosen, SCALE, "kv_outer", "hopper")
    got = attend_selection(far, k, v, chosen, SCALE, "kv_outer", "hopper")
    assert torch.equal(got.out, want.out) and torch.equal(got.lse, want.lse)
