"""The hopper scores of pages on a GPU: those of the definition, the same bits every time.

The properties of the subject "triton-hopper-pages" compare whole steps of small caches with the
definition.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import msa
from msa import kernel_choice
from msa.conformance.tolerances import HOPPER, PRECISIONS
from msa.ir import PagedKV
from msa.triton_impl import decode

pytest.importorskip("triton", minversion="3.6")

from msa.triton_impl.hopper.page_scores import score_pages_on_hopper

CANNOT = kernel_choice.obstacle(kernel_choice.usual_call())
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(CANNOT is not None, reason=str(CANNOT))]
BF16, FP16, E4M3 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
CASES = {  # q, pages, new queries, groups, Di, block, lengths
    "one long": (BF16, E4M3, 1, 4, 128, 128, (70_000,)),
    "8 bits, ragged": (BF16, E4M3, 1, 4, 128, 128, (5000, 0, 1, 128, 129, 40_000, 0)),
    "8 bits, eight queries": (FP16, E4M3, 8, 4, 128, 128, (3000, 9000, 8)),
    "8 bits, small": (BF16, E4M3, 2, 5, 64, 64, (9999, 64, 20_000)),
    "16 bits": (BF16, BF16, 1, 4, 128, 128, (40_000, 0, 0, 300, 129)),
    "float16, small": (FP16, FP16, 2, 3, 64, 64, (9999, 64, 20_000)),
    "many sequences": (BF16, E4M3, 1, 4, 128, 128, tuple(i * 977 % 3000 for i in range(300))),
    "empty": (BF16, E4M3, 1, 4, 128, 128, (0, 0)),
}
CONFIGS = [{"top_k": 8}, {"top_k": 8, "sink_blocks": 1, "local_blocks": 2}]


def make(q_dtype, k_dtype, n, groups, dim, block, lengths, strided=False, seed=0):
    """Queries and a cache. Unused pages and scales are NaN, unused columns stale ids.

    strided: padded pages and rows; every second column, in int64.
    """
    random = torch.Generator("cuda").manual_seed(seed)
    like = {"device": "cuda", "generator": random}
    used = sum(-(-x // block) for x in lengths)
    total, columns = used + 5, -(-max(lengths) // block) + 3
    room = (total, block + 16 * strided, dim + 16 * strided)
    pages = torch.full(room, torch.nan, device="cuda").to(k_dtype)[:, :block, :dim]
    order = torch.randperm(total, **like)
    kind = torch.int64 if strided else torch.int32
    table = torch.full((len(lengths), 2 * columns), 2**30, dtype=kind, device="cuda")
    table = table[:, ::2] if strided else table[:, :columns]
    first = 0
    for s, length in enumerate(lengths):
        blocks = -(-length // block)
        table[s, :blocks] = order[first : first + blocks].to(kind)
        first += blocks
    pages[order[:used]] = torch.randn(used, block, dim, **like).to(k_dtype)
    scales = None
    if k_dtype == E4M3:
        scales = torch.full((total,), torch.nan, device="cuda")
        scales[order[:used]] = 2.0 ** torch.randint(-3, 4, (used,), **like).float()
    kv = torch.empty(total, block, groups, 1, dtype=q_dtype, device="cuda")
    sizes = torch.tensor(lengths, dtype=kind, device="cuda")
    cache = PagedKV(kv, kv, pages, table, sizes, k_idx_scales=scales)
    return torch.randn(len(lengths), n, groups, dim, **like).to(q_dtype), cache


def scored(q, cache, config, **changes):
    """The kernel's scores, and NaN where it wrote none; its counters are set to 0."""
    batch, n, groups, _ = q.shape
    arrivals = torch.full((batch, n * groups), 77, dtype=torch.int32, device="cuda")
    width = 1 << max(5, (cache.page_table.shape[1] - 1).bit_length())
    known = torch.full((batch, n, groups, width), torch.nan, device="cuda")
    del known  # the allocator gives the same memory to the kernel's result
    found = score_pages_on_hopper(q, cache, config, arrivals, **changes)
    assert not arrivals.any()
    return [found[s, :, :, first:stop] for s, first, stop in spans(cache, config)]


def spans(cache, config):
    """The first scored block of each sequence, and the first behind them."""
    first = config.sink_blocks
    for s, length in enumerate(cache.lengths.tolist()):
        own = (length - 1) // config.block_size
        yield s, first, max(first, own - config.local_blocks + 1 if length else first)


def assert_right(found, q, cache, config):
    """Within the budget of products in float32, or in three parts of 8 bits."""
    dim, eight = q.shape[-1], cache.k_idx_scales is not None
    name = "float8_e4m3fn" if eight else str(q.dtype).removeprefix("torch.")
    precision = replace(PRECISIONS[name], unit=HOPPER[name])
    for got, (s, first, stop) in zip(found, spans(cache, config), strict=True):
        if first == stop:
            continue
        ids = cache.page_table[s, first:stop].long()
        k = cache.k_idx_pages[ids].double()
        if eight:
            k *= cache.k_idx_scales[ids].double()[:, None, None]
        want = torch.einsum("nrd,btd->nrbt", q[s].double(), k).amax(-1)
        sizes = torch.einsum("nrd,btd->nrbt", q[s].double().abs(), k.abs()).amax(-1).cpu().numpy()
        bound = torch.as_tensor((3 if eight else 1) * precision.sum_error(dim, sizes, sizes))
        if eight:
            lost = q[s].double().abs().amax(-1)[..., None] * k.abs().sum(-1).amax(-1)
            bound += 2.0**-17 * lost.cpu()
        error = (got.double() / config.index_scale_for(dim) - want).abs().cpu()
        assert (error <= bound).all()  # NaN is not


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("options", CONFIGS)
@pytest.mark.parametrize("strided", [False, True])
def test_scores_are_those_of_the_definition(name, options, strided):
    q, cache = make(*CASES[name], strided=strided)
    assert kernel_choice.choose("hopper", kernel_choice.page_call_of(q, cache)) == "hopper"
    config = msa.MSAConfig(CASES[name][5], **options)
    assert_right(scored(q, cache, config), q, cache, config)


@pytest.mark.parametrize("name", ["8 bits, ragged", "16 bits", "many sequences"])
@pytest.mark.parametrize("changes", [
    {"programs": 2}, {"STAGES": 2}, {"CHUNK": 32}, {"programs": 2, "maxnreg": 96},
    {"PAIRS": False},
])  # fmt: skip
def test_no_launch_parameter_changes_a_bit(name, changes):
    q, cache = make(*CASES[name])
    config = msa.MSAConfig(CASES[name][5], 8)
    for got, want in zip(
        scored(q, cache, config, **changes), scored(q, cache, config), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["8 bits, ragged", "8 bits, small", "float16, small"])
@pytest.mark.parametrize("strided", [False, True])
def test_two_hundred_repetitions_give_the_same_bits(name, strided):
    """ptxas once left a register of "8 bits, small" without a value, see `load_queries`."""
    q, cache = make(*CASES[name], strided=strided)
    config = msa.MSAConfig(CASES[name][5], 8)
    want = scored(q, cache, config)
    arrivals = torch.zeros(len(q), 4, dtype=torch.int32, device="cuda")
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(200):
        found = score_pages_on_hopper(q, cache, config, arrivals)
        for x, (s, first, stop) in zip(want, spans(cache, config), strict=True):
            different += (found[s, :, :, first:stop] != x).sum()
    assert different.item() == 0


def test_a_hundred_ragged_shapes():
    """Without waiting in between: a wrong release would hang or mix up pages."""
    random = torch.Generator().manual_seed(0)
    found = []
    for seed in range(100):
        batch = int(torch.randint(1, 9, (), generator=random))
        lengths = torch.randint(0, 3000, (batch,), generator=random).tolist()
        q, cache = make(BF16, E4M3, 1, 4, 128, 128, lengths, seed=seed)
        config = msa.MSAConfig(128, 4)
        found.append((scored(q, cache, config), q, cache, config))
    for one in found:
        assert_right(*one)


def test_a_nan_token_counts_as_the_lowest():
    """R4: of a block with NaN in one index key, the other tokens count; of one with only NaN,
    none."""
    q, cache = make(*CASES["16 bits"])
    pages = cache.page_table[0, :2].long()
    cache.k_idx_pages[pages[0], 5] = torch.nan
    cache.k_idx_pages[pages[1]] = torch.nan
    (found, *_) = scored(q, cache, msa.MSAConfig(128, 8))
    k = torch.cat([cache.k_idx_pages[pages[0], :5], cache.k_idx_pages[pages[0], 6:]]).double()
    want = torch.einsum("nrd,td->nrt", q[0].double(), k).amax(-1) * 128**-0.5
    torch.testing.assert_close(found[..., 0].double(), want, rtol=1e-4, atol=1e-4)
    assert (found[..., 1] == -torch.inf).all()


def test_a_captured_step_follows_lengths_and_table():
    """A graph of three steps is replayed after tokens, pages and queries have changed."""
    kinds = BF16, E4M3, 1, 4, 128, 128
    q_idx, cache = make(*kinds, (3000, 0, 20_000))
    _, longer = make(*kinds, (30_000, 5000, 700), seed=1)
    pages = torch.zeros_like(longer.k_idx_pages)
    scales = torch.ones_like(longer.k_idx_scales)
    table = torch.zeros_like(longer.page_table)
    kv = torch.randn(len(pages), 128, 4, 128, device="cuda").to(BF16)
    shown = PagedKV(kv, kv, pages, table, cache.lengths.clone(), k_idx_scales=scales)
    q = torch.randn(3, 1, 64, 128, device="cuda").to(BF16)

    def show(of):
        pages[: len(of.k_idx_pages)].copy_(of.k_idx_pages)
        scales[: len(of.k_idx_pages)].copy_(of.k_idx_scales)
        stop = min(table.shape[1], of.page_table.shape[1])
        table[:, :stop].copy_(of.page_table[:, :stop])
        shown.lengths.copy_(of.lengths)

    def step(kernels):
        return decode.decode_step(q, q_idx, shown, msa.MSAConfig(), kernels=kernels)

    show(cache)
    step("hopper")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [step("hopper") for _ in range(3)]
    for of in (longer, cache):
        show(of)
        graph.replay()
        want = step("portable")
        for output in outputs:
            torch.testing.assert_close(output.out, want.out, rtol=2e-2, atol=2e-2)
            torch.testing.assert_close(output.lse, want.lse, rtol=1e-3, atol=1e-3)


def test_pages_beyond_two_to_the_31():
    total, used = 2**31 // (128 * 128) + 40, 40
    pages = torch.zeros(total, 128, 128, device="cuda", dtype=BF16)
    pages[-used:] = torch.randint(-2, 3, pages[-used:].shape, device="cuda").to(BF16)
    table = torch.arange(total - 1, total - 1 - used, -1, dtype=torch.int32, device="cuda")
    kv = torch.empty(1, 128, 4, 1, device="cuda", dtype=BF16).expand(total, 128, 4, 1)
    lengths = torch.tensor([used * 128], dtype=torch.int32, device="cuda")
    cache = PagedKV(kv, kv, pages, table[None], lengths)
    q = torch.randint(-2, 3, (1, 1, 4, 128), device="cuda").to(BF16)
    (found,) = scored(q, cache, msa.MSAConfig(128, 8))
    k = pages[table[: used - 1].long()].float()
    want = torch.einsum("nrd,btd->nrbt", q[0].float(), k).amax(-1) * 128**-0.5
    assert torch.equal(found, want)
