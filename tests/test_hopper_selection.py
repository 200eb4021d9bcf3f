"""The hopper kernels on a GPU: the selection of the portable kernels, bit for bit, every time."""

from __future__ import annotations

from itertools import accumulate
from unittest import mock

import pytest
import torch

import msa
from msa import kernel_choice
from msa.ir import Sequences
from msa.triton_impl import select_fused, selection

pytest.importorskip("triton", minversion="3.6")

from msa.triton_impl.hopper import plan
from msa.triton_impl.hopper import selection as hopper

CANNOT = kernel_choice.obstacle(kernel_choice.usual_call())
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(CANNOT is not None, reason=str(CANNOT))]
BF16, FP16 = torch.bfloat16, torch.float16
FP8 = "fp8_e4m3"


def packed(*lengths):
    """Sequences from pairs of queries and keys."""
    return Sequences(*((0, *accumulate(n)) for n in zip(*lengths, strict=True)))


RAGGED = packed(
    (54, 1042), (0, 300), (0, 0), (233, 3120), (1, 1), (700, 700), (5, 40000), (12, 129)
)
CASES = {  # sequences, groups, Di, (block size, k, sink, local), dtype, index dtype
    "one chunk": (Sequences.one(64, 4096), 4, 128, (128, 16), BF16, None),
    "ragged": (RAGGED, 4, 128, (128, 16), BF16, None),
    "ragged in 8 bits": (RAGGED, 4, 128, (128, 16), BF16, FP8),
    "float16": (Sequences.one(2048, 2048), 4, 128, (128, 16), FP16, None),
    "one group, forced blocks": (RAGGED, 1, 128, (128, 16, 1, 2), BF16, None),
    "64 places": (RAGGED, 8, 128, (128, 65), BF16, None),
    "three groups": (RAGGED, 3, 128, (128, 8, 2, 1), BF16, None),
    "five groups of 64": (RAGGED, 5, 64, (128, 16), BF16, None),
    "17 groups": (RAGGED, 17, 64, (64, 4), FP16, None),
    "200 groups": (packed((9, 700), (3, 64)), 200, 64, (64, 4), BF16, None),
    "blocks of 64": (RAGGED, 4, 128, (64, 16), BF16, None),
    "2,344 blocks": (Sequences.one(3000, 300_000), 4, 128, (128, 16), BF16, None),
    "one place": (Sequences.one(777, 140_001), 4, 128, (128, 1), BF16, None),
    "two places": (Sequences.one(777, 140_001), 4, 128, (128, 2), BF16, None),
    "8 bits of 64": (Sequences.one(777, 140_001), 2, 64, (128, 33), FP16, FP8),
    "17,188 blocks": (Sequences.one(100, 1_100_000), 7, 128, (64, 5), BF16, None),
    "many forced blocks": (Sequences.one(300, 20_000), 2, 64, (64, 100, 50, 30), BF16, None),
    "more places than blocks": (Sequences.one(400, 400), 4, 64, (64, 40), BF16, None),
    "no queries": (packed((0, 500), (0, 0)), 4, 128, (128, 16), BF16, None),
    "no sequences": (Sequences((0,), (0,)), 4, 128, (128, 16), BF16, None),
}  # fmt: skip


def integers(*shape, dtype=BF16, span=2, seed=0):
    """Small integers, most of them 0: every score is exact, and many scores are equal."""
    random = torch.Generator("cuda").manual_seed(seed)
    x = torch.randint(-span, span + 1, shape, generator=random, device="cuda", dtype=torch.int8)
    some = torch.rand(shape, generator=random, device="cuda") < 0.3
    return (x * some).to(dtype)


def arguments(name):
    """q_idx, k_idx, sequences, config and the index dtype of a case."""
    sequences, groups, dim, sizes, dtype, index_dtype = CASES[name]
    q_idx = integers(sequences.total_q, groups, dim, dtype=dtype)
    k_idx = integers(sequences.total_k, dim, dtype=dtype, seed=1)
    return q_idx, k_idx, sequences, msa.MSAConfig(*sizes), index_dtype


def assert_same(got, want):
    assert torch.equal(got.indices, want.indices)


@pytest.mark.parametrize("spoiled", [False, True], ids=["finite", "spoiled"])
@pytest.mark.parametrize("name", CASES)
def test_the_selection_is_that_of_the_portable_kernels(name, spoiled):
    """For keys that are not finite, too; with any bound on the scores' memory."""
    q_idx, k_idx, *rest = arguments(name)
    if spoiled:
        random = torch.Generator("cuda").manual_seed(2)
        lost = torch.rand(len(k_idx), generator=random, device="cuda") < 0.3
        k_idx[lost] = torch.nan
        k_idx[100:400] = torch.nan  # whole blocks
        k_idx[500:501] = torch.inf
        k_idx[900:901, :7] = -torch.inf
        q_idx[::7] = torch.nan
        q_idx[3::50] = 0
    want = select_fused(q_idx, k_idx, *rest, kernels="portable")
    assert_same(select_fused(q_idx, k_idx, *rest, kernels="hopper"), want)
    assert_same(hopper.select_on_hopper(q_idx, k_idx, *rest, score_bytes=2**20), want)
    want.validate()


@pytest.mark.parametrize("some", [False, True], ids=["all rows", "some rows"])
@pytest.mark.parametrize("name", CASES)
def test_scores_below_zero(name, some):
    """All scores of a block are negative; in others, zeros of both signs or NaN lie beside them."""
    q_idx, k_idx, *rest = arguments(name)
    rows = slice(None, None, 5 if some else 1)
    q_idx[rows] = q_idx[rows].abs()
    k_idx.copy_(-k_idx.abs() - 1)
    k_idx[1000:1500:3] = torch.nan
    k_idx[2000:2300] = -0.0
    want = select_fused(q_idx, k_idx, *rest, kernels="portable")
    assert_same(select_fused(q_idx, k_idx, *rest, kernels="hopper"), want)


@pytest.mark.parametrize("long", [0, 10**9], ids=["maxima", "direct"])
@pytest.mark.parametrize("name", ["ragged", "2,344 blocks", "64 places"])
def test_both_ways_through_the_rows(name, long, monkeypatch):
    monkeypatch.setattr(plan, "LONG", long)
    monkeypatch.setattr(hopper, "plan_scores", plan.plan_scores.__wrapped__)
    given = arguments(name)
    assert_same(hopper.select_on_hopper(*given), select_fused(*given, kernels="portable"))


def test_a_row_of_equal_scores_longer_than_16_bits():
    """34 million keys in blocks of 64: 66,000 pieces whose maxima are all 0."""
    n = 34_000_000
    assert n // 64 // plan.PIECE > 2**16
    q_idx = torch.zeros(2, 1, 64, dtype=BF16, device="cuda")
    k_idx = torch.zeros(n, 64, dtype=BF16, device="cuda")
    got = select_fused(q_idx, k_idx, Sequences.one(2, n), msa.MSAConfig(64, 16), kernels="hopper")
    assert got.indices.tolist() == [[[*range(15), (n - 1) // 64]]] * 2


@pytest.mark.parametrize("index_dtype", [None, FP8])
@pytest.mark.parametrize("name", ["ragged", "one chunk", "five groups of 64", "2,344 blocks"])
def test_a_thousand_repetitions_give_the_same_bits(name, index_dtype):
    """Without waiting in between; real numbers, so that a wrong score would show."""
    sequences, groups, dim, sizes, dtype, _ = CASES[name]
    random = torch.Generator("cuda").manual_seed(3)
    q_idx, k_idx = (torch.randn(shape, generator=random, device="cuda").to(dtype) for shape in (
        (sequences.total_q, groups, dim), (sequences.total_k, dim)))  # fmt: skip
    config, different = msa.MSAConfig(*sizes), torch.zeros((), dtype=torch.int64, device="cuda")
    want = select_fused(q_idx, k_idx, sequences, config, index_dtype, "hopper").indices
    for _ in range(1000):
        got = select_fused(q_idx, k_idx, sequences, config, index_dtype, "hopper").indices
        different += (got != want).sum()
    assert different.item() == 0


def test_shapes_by_turns_do_not_disturb_one_another():
    """Scores of another shape lie in the memory that a call gets."""
    given = {name: arguments(name) for name in ("ragged", "one chunk", "three groups", "float16")}
    want = {name: select_fused(*x, kernels="portable") for name, x in given.items()}
    for _ in range(50):
        for name, x in given.items():
            assert_same(select_fused(*x, kernels="hopper"), want[name])


@pytest.mark.large
def test_index_keys_beyond_2_31():
    """17.3 million keys of 128 numbers; the queries read blocks on both sides of the border."""
    n_q, n_k, dim = 300, 17_300_000, 128
    assert n_k * dim > 2**31
    q_idx, k_idx = integers(n_q, 4, dim), integers(n_k, dim, seed=1)
    k_idx[2**31 // dim - 64 : 2**31 // dim + 64] = 2.0
    given = q_idx, k_idx, Sequences.one(n_q, n_k), msa.MSAConfig()
    want = select_fused(*given, kernels="portable")
    assert_same(select_fused(*given, kernels="hopper"), want)
    assert (want.indices[:, :, :-1] * 128 > 2**31 // dim).any()


@pytest.mark.large
def test_index_queries_and_ids_beyond_2_31():
    """2.2 million queries of 16 groups in sequences of 1,100: numbers of q_idx, ids of the output.

    Their scores take many super-tiles.
    """
    length, batch, groups, dim, top_k = 1100, 2000, 16, 64, 64
    tokens = length * batch
    assert min(tokens * groups * dim, tokens * groups * top_k) > 2**31
    q_idx, k_idx = integers(tokens, groups, dim), integers(tokens, dim, seed=1)
    given = q_idx, k_idx, Sequences.uniform(batch, length, length), msa.MSAConfig(64, top_k)
    got = select_fused(*given, kernels="hopper")
    assert_same(got, select_fused(*given, kernels="portable"))


@pytest.mark.parametrize("tokens", [16_384, 131_072])
def test_memory_is_bounded(tokens):
    """Scores and their maxima, the ids of kept pieces, the output: for any number of tokens."""
    q_idx, k_idx = integers(tokens, 4, 128), integers(tokens, 128, seed=1)
    given = q_idx, k_idx, Sequences.one(tokens, tokens), msa.MSAConfig()
    select_fused(*given, kernels="hopper")  # its tables stay
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = select_fused(*given, kernels="hopper").indices
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= plan.SCORE_BYTES * 9 // 8 + 2 * out.nbytes + 2**21


def test_strides_of_every_kind():
    """Head-major and padded views, rows that do not start at 16 bytes, the same row for all."""
    q_idx, k_idx, *rest = arguments("ragged")
    want = select_fused(q_idx, k_idx, *rest, kernels="portable")
    head_major = q_idx.transpose(0, 1).contiguous().transpose(0, 1)
    padded = torch.cat([k_idx, k_idx], 1)[:, : k_idx.shape[1]]
    odd = torch.nn.functional.pad(k_idx, (1, 2))[:, 1:-2]
    for q, k in ((head_major, padded), (q_idx, odd)):
        assert_same(select_fused(q, k, *rest, kernels="hopper"), want)
    alike = k_idx[:1].expand(len(k_idx), -1), q_idx[:1].expand(len(q_idx), -1, -1)
    for q, k in ((q_idx, alike[0]), (alike[1], k_idx)):
        want = select_fused(q, k, *rest, kernels="portable")
        assert_same(select_fused(q, k, *rest, kernels="hopper"), want)


@pytest.mark.large
@pytest.mark.parametrize("which", ["q_idx", "k_idx"])
def test_rows_far_apart(which):
    """The last row lies more than 2^31 numbers behind the first one."""
    n, dim, step = 300, 64, 2**23 + 16
    assert (n - 1) * step > 2**31
    close = {"q_idx": integers(n, 1, dim), "k_idx": integers(n, dim, seed=1)}
    wide = torch.empty(n * step, dtype=BF16, device="cuda")
    far = wide.as_strided(close[which].shape, (step, *close[which].stride()[1:]))
    far.copy_(close[which])
    rest = Sequences.one(n, n), msa.MSAConfig(64, 3)
    want = select_fused(*close.values(), *rest, kernels="portable")
    assert_same(select_fused(*(close | {which: far}).values(), *rest, kernels="hopper"), want)


def test_a_graph_and_two_streams():
    given = arguments("ragged")
    want = select_fused(*given, kernels="hopper").indices
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = select_fused(*given, kernels="hopper").indices
    plan.plan_scores.cache_clear()  # the graph keeps the tables that it reads
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(20):
        got.fill_(101)
        torch.cuda.synchronize()
        found = []
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(select_fused(*given, kernels="hopper").indices)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(x, want) for x in (got, *found))


def test_auto_takes_them_and_portable_does_not():
    q_idx, k_idx, _, config, _ = arguments("one chunk")
    real = hopper.select_on_hopper
    with mock.patch.object(hopper, "select_on_hopper", wraps=real) as chosen:
        msa.select(q_idx, k_idx, config=config)
        msa.select(q_idx, k_idx, config=config, kernels="hopper", index_dtype=FP8)
        q, k = integers(64, 8, 64), integers(4096, 4, 64)
        msa.attention(q, k, k, q_idx, k_idx, config=config, kernels="hopper")
        assert chosen.call_count == 3
        assert chosen.call_args_list[1].args[4] == FP8
        msa.select(q_idx, k_idx, config=config, kernels="portable")
        msa.select(q_idx.float(), k_idx.float(), config=config)
        assert chosen.call_count == 3
    with (
        mock.patch.object(kernel_choice, "triton_version", lambda: "3.5.1"),
        mock.patch.object(selection, "select_portable", wraps=selection.select_portable) as other,
    ):
        msa.select(q_idx, k_idx, config=config)
        assert other.call_count == 1
        with pytest.raises(ValueError, match=r"triton must be 3\.6 or newer"):
            msa.select(q_idx, k_idx, config=config, kernels="hopper")
