"""Pages of 8 bits that are widened to 16: the same numbers, and a prefill over them (R2, R12)."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import msa
from msa import kernel_choice
from msa.ir import Output, PagedKV, Selection, Sequences
from msa.torch_impl import attend_selection
from msa.triton_impl import attention, prefill, tuning, union_walk, wide_pages
from msa.triton_impl.paged_keys import Pages

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [pytest.mark.gpu] * CUDA
E4M3 = torch.float8_e4m3fn
BLOCK, GROUPS, GROUP, DIM, DIM_V = 16, 2, 3, 16, 20
CONFIG = msa.MSAConfig(BLOCK, 4)
COUNTS, LENGTHS = (37, 0, 0, 3, 9), (150, 33, 0, 47, 9)
SEQUENCES = Sequences(*((0, *accumulate(n)) for n in (COUNTS, LENGTHS)))
HOPPER = kernel_choice.obstacle(kernel_choice.usual_call()) is None


def factors(random, shape, kind):
    """Factors of pages: powers of two, numbers between them, or of every size."""
    exponents = torch.randint(-3, 4, shape, generator=random)
    if kind == "every size":
        exponents = torch.randint(-126, 110, shape, generator=random)
    found = 2.0 ** exponents.float()
    if kind != "powers of two":
        found *= 1 + torch.rand(shape, generator=random)
    return found


def make_cache(
    kind="numbers", seed=0, block=BLOCK, dims=(DIM, DIM_V), dtype=torch.float16, index_dim=DIM
):
    """Pages of e4m3 in any order, with NaN behind each sequence's last token."""
    random = torch.Generator().manual_seed(seed)
    blocks = [-(-n // block) for n in LENGTHS]
    order = torch.randperm(sum(blocks) + 2, generator=random)
    table = torch.full((len(LENGTHS), max(blocks) + 2), 10**9, dtype=torch.int32)
    for s, first in enumerate([0, *accumulate(blocks)][:-1]):
        table[s, : blocks[s]] = order[first : first + blocks[s]].int()
    pages = [torch.randn(len(order), block, GROUPS, dim, generator=random).to(E4M3) for dim in dims]
    k_idx = torch.randint(-2, 3, (len(order), block, index_dim), generator=random).to(dtype)
    for s, n in enumerate(LENGTHS):
        if n % block:
            for x in pages:
                x.view(torch.uint8)[table[s, n // block], n % block :] = 0x7F
    scales = [factors(random, (len(order), GROUPS), kind) for _ in pages]
    given = (*pages, k_idx, table, torch.tensor(LENGTHS), *scales)
    return PagedKV(*(x.to(DEVICE) for x in given))


def pages_of(cache):
    return Pages(cache.page_table, cache.k_scales, cache.v_scales)


def meaning(cache, name, block=BLOCK):
    """The packed numbers, in float64."""
    pages, scales = getattr(cache, f"{name}_pages"), getattr(cache, f"{name}_scales")
    parts = []
    for s, n in enumerate(LENGTHS):
        own = cache.page_table[s, : -(-n // block)].long()
        numbers = pages.view(torch.uint8)[own].view(E4M3).double()
        parts.append((numbers * scales[own].double()[:, None, :, None]).flatten(0, 1)[:n])
    return torch.cat(parts)


def queries(dtype=torch.float16, dim=DIM, group=GROUP, seed=1, index_dim=DIM):
    random = torch.Generator().manual_seed(seed)
    q = torch.randn(sum(COUNTS), GROUPS * group, dim, generator=random).to(DEVICE, dtype)
    q_idx = torch.randint(-2, 3, (sum(COUNTS), GROUPS, index_dim), generator=random)
    return q, q_idx.to(DEVICE, dtype)


def select(cache, q_idx):
    return prefill.select_pages(q_idx, cache, SEQUENCES, CONFIG)


# -- the numbers ----------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("readers", [0, 10**9], ids=["all blocks", "marked blocks"])
@settings(max_examples=5, deadline=None)
@given(kind=st.sampled_from(["powers of two", "numbers", "every size"]), seed=st.integers(0, 999))
def test_a_number_times_its_factor_is_what_it_was(dtype, readers, kind, seed):
    """Exactly: compared in float64, where products of the two have room."""
    cache = make_cache(kind, seed)
    if CUDA:  # NaN stays NaN; the interpreter reads it as 480
        cache.k_pages.view(torch.uint8)[cache.page_table[0, 0].long(), 3] = 0x7F
    chosen = select(cache, queries(cache.k_idx_pages.dtype)[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_choice, "MARKED_READERS", readers)
        k, v, wide = wide_pages.widen_pages(
            cache.k_pages, cache.v_pages, pages_of(cache), chosen, dtype
        )
    assert wide.mild == (dtype == torch.bfloat16)
    read = {
        (s, r, int(b))
        for s, (rows, _) in enumerate(SEQUENCES.spans()) for r in range(GROUPS)
        for b in chosen.indices[rows, r].unique() if b >= 0
    }  # fmt: skip
    assert read
    for name, pages, scales in (("k", k, wide.k_scales), ("v", v, wide.v_scales)):
        packed = meaning(cache, name)
        for s, r, b in read:
            first = SEQUENCES.cu_seqlens_k[s] + b * BLOCK
            want = packed[first : min(first + BLOCK, SEQUENCES.cu_seqlens_k[s + 1]), r]
            page = int(wide.table[s, b])
            got = pages[page, :, r].double() * scales[page, r].double()
            torch.testing.assert_close(got[: len(want)], want, rtol=0, atol=0, equal_nan=True)
            assert not got[len(want) :].any()
    if dtype == torch.bfloat16 and kind != "every size":
        used = wide.k_scales[wide.table[0, 0]]
        assert ((used >= 1) & (used < 2)).all()
        assert (kind == "numbers") == bool((used != 1).any())


def test_blocks_without_a_reader_are_not_written(monkeypatch):
    cache = make_cache()
    ids = torch.full((sum(COUNTS), GROUPS, 4), -1, dtype=torch.int32, device=DEVICE)
    ids[..., 0] = 0
    ids[:37, 1, 1] = 7
    monkeypatch.setattr(kernel_choice, "MARKED_READERS", 10**9)
    k, _, wide = wide_pages.widen_pages(
        cache.k_pages, cache.v_pages, pages_of(cache), Selection(ids, SEQUENCES, BLOCK),
        torch.float16,
    )  # fmt: skip
    written = k.isnan().logical_not().flatten(3).all(3).all(1)  # fresh memory holds NaN in tests
    want = torch.zeros_like(written)
    for s, r, b in ((0, 0, 0), (0, 1, 0), (0, 1, 7), (3, 0, 0), (3, 1, 0), (4, 0, 0), (4, 1, 0)):
        want[wide.table[s, b], r] = True
    assert torch.equal(written, want)
    assert len(k) == sum(-(-n // BLOCK) for n, count in zip(LENGTHS, COUNTS) if count)


# -- a prefill ------------------------------------------------------------------------------------
def distance(got: Output, want: Output) -> float:
    return float((got.out.double() - want.out.double()).norm() / want.out.double().norm())


@pytest.mark.parametrize("kind", ["powers of two", "numbers"])
@pytest.mark.parametrize("loop_order", ["auto", "union", "kv_outer"])
@pytest.mark.parametrize("wide", [True, False], ids=["widened", "converted in kernels"])
def test_the_result_is_attention_over_numbers_times_factors(kind, loop_order, wide, monkeypatch):
    """float16, with super-tiles that begin inside a sequence."""
    cache, (q, q_idx) = make_cache(kind), queries()
    monkeypatch.setattr(kernel_choice, "KEYS_PER_QUERY", 10**9 if wide else 0)
    monkeypatch.setattr(tuning, "PARTIAL_BYTES", 2**14)
    if loop_order == "auto":
        monkeypatch.setattr(attention, "limits", lambda *_: (2, 4))
        monkeypatch.setattr(attention, "choose_order", lambda selection, group: "split")
    dtypes = []
    attend_part = attention.attend_part
    monkeypatch.setattr(
        attention, "attend_part", lambda *a: (dtypes.append(a[1].dtype), attend_part(*a))
    )
    options = {"cu_seqlens_q": SEQUENCES.cu_seqlens_q, "config": CONFIG, "backend": "triton"}
    got = msa.prefill(q, q_idx, cache, **options, loop_order=loop_order, kernels="portable")
    assert set(dtypes) == {torch.float16 if wide else E4M3}
    keys = meaning(cache, "k"), meaning(cache, "v")
    want = attend_selection(q.double(), *keys, got.selection, DIM**-0.5)
    assert distance(got, want) < 2.0**-11
    torch.testing.assert_close(got.lse.double(), want.lse.double(), rtol=1e-5, atol=1e-5)


def test_outputs_in_units_of_a_factor(monkeypatch):
    """The walk that bfloat16 takes after widening, on numbers that the interpreter can multiply."""
    cache, (q, q_idx) = make_cache(), queries()
    chosen = select(cache, q_idx)
    k, v, wide = wide_pages.widen_pages(
        cache.k_pages, cache.v_pages, pages_of(cache), chosen, torch.float16
    )
    found = []
    walk = union_walk.walk
    for mild in (False, True):
        pages = Pages(wide.table, wide.k_scales, wide.v_scales, mild)
        monkeypatch.setattr(attention, "walk", lambda *a, **b: (found.append(b["pages"].mild),
                                                               walk(*a, **b)))  # fmt: skip
        out, lse = attention.attend_super_tiles(
            q, k, v, chosen, DIM**-0.5, "union", "portable", pages
        )
        found.append((out.double(), lse))
    assert found[::2] == [False, True]
    (one, one_lse), (two, two_lse) = found[1::2]
    assert float((one - two).norm() / one.norm()) < 2.0**-11
    assert torch.equal(one_lse, two_lse)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 2.0**24, 1e20])
def test_large_logits(scale, monkeypatch):
    """What is at the maximum keeps its weight, whatever the factors are."""
    cache, (q, q_idx) = make_cache(), queries()
    config = msa.MSAConfig(BLOCK, 4, softmax_scale=scale)
    found = []
    for keys in (0, 10**9):
        monkeypatch.setattr(kernel_choice, "KEYS_PER_QUERY", keys)
        args = q, q_idx, cache, SEQUENCES, config, "union", None, "portable"
        found.append(prefill.prefill_chunk(*args))
    keys = meaning(cache, "k"), meaning(cache, "v")
    want = attend_selection(q.double(), *keys, found[0].selection, scale)
    for got in found:
        assert got.out.isfinite().all()
        torch.testing.assert_close(got.lse.double(), want.lse.double(), rtol=2e-6, atol=1e-5)


# -- the rule -------------------------------------------------------------------------------------
def test_where_pages_are_widened(monkeypatch):
    cache, (q, _) = make_cache(), queries()
    pages = cache.k_pages, cache.v_pages

    def widens(x=q, k=pages[0], sequences=SEQUENCES, kernels="auto"):
        return kernel_choice.widens(x, k, pages[1], sequences, kernels)

    assert widens() and widens(q.bfloat16())
    assert not widens(q.float()) and not widens(k=pages[0].half())
    assert not widens(sequences=Sequences((0, 0), (0, 9)))
    few = Sequences.one(2, 2 * kernel_choice.KEYS_PER_QUERY)
    more = Sequences.one(2, 2 * kernel_choice.KEYS_PER_QUERY + 1)
    assert widens(sequences=few) and not widens(sequences=more)
    assert widens(sequences=more, kernels="hopper")
    room = 2 * 16 * GROUPS * (DIM + DIM_V) * sum(-(-n // 16) for n in LENGTHS)
    monkeypatch.setattr(kernel_choice, "WIDE_BYTES", room)
    assert widens()
    monkeypatch.setattr(kernel_choice, "WIDE_BYTES", room - 1)
    assert not widens() and not widens(kernels="hopper")


# -- kernels for Hopper ---------------------------------------------------------------------------
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("kind", ["powers of two", "numbers"])
@pytest.mark.parametrize("readers", [0, 10**9], ids=["all blocks", "marked blocks"])
def test_the_hopper_walk_takes_factors(kind, readers, monkeypatch):
    """A hundred times, without waiting in between."""
    monkeypatch.setattr(kernel_choice, "MARKED_READERS", readers)
    cache = make_cache(kind, block=128, dims=(128, 128), dtype=torch.bfloat16, index_dim=128)
    q, q_idx = queries(torch.bfloat16, dim=128, group=16, index_dim=128)
    config = msa.MSAConfig(128, 4)
    options = {"cu_seqlens_q": SEQUENCES.cu_seqlens_q, "config": config}
    found = [
        msa.prefill(q, q_idx, cache, **options, loop_order="union", kernels="hopper")
        for _ in range(100)
    ]
    keys = meaning(cache, "k", 128), meaning(cache, "v", 128)
    want = attend_selection(q.double(), *keys, found[0].selection, 128**-0.5)
    assert distance(found[0], want) < 2.0**-8
    torch.testing.assert_close(found[0].lse.double(), want.lse.double(), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(x.out, found[0].out) for x in found)
