"""The parts of `msa bench decode`: steps over paged caches, and what 8 bits cost in quality.

A step is the scores of all blocks, the selection, and the attention, captured in a CUDA graph. Its
caches are taken in turns, so that no step finds the index keys of its own in the L2. Two times are
taken: `step` is one replay of a graph of one step, launch included; `layer` is the share of one
step in a graph of LAYERS, as a model captures its layers.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import msa
from benchmarks.cases import CONFIG, DIM, GROUPS, HEADS, MILLION
from benchmarks.checks import BOUND, Wrong
from benchmarks.timing import ceilings
from msa.eight_bits import scale_for
from msa.ir import Output, PagedKV
from msa.triton_impl import decode as decoding
from msa.triton_impl.page_attention import attend_pages
from msa.triton_impl.page_scores import score_pages

SHAPES = ((1, 131072), (8, 131072), (1, MILLION), (4, MILLION))
LAYERS = 10
REPLAYS = 40
LONG = 2000.0
"""A graph that takes more microseconds than this is replayed fewer times."""
FORMS = {"bf16": (), "fp8 index": ("k_idx",), "fp8 all": ("k", "v", "k_idx")}
L2 = 2**28
"""Bytes of index keys that the caches of one measurement have at least: five times the cache."""


def make_cache(batch: int, context: int, seed: int, integers: bool = False) -> PagedKV:
    """Full sequences of random tokens in pages of random order; index keys may be integers."""
    random = torch.Generator("cuda").manual_seed(seed)
    pages, block = batch * context // CONFIG.block_size, CONFIG.block_size

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device="cuda", dtype=torch.bfloat16)

    k, v = (normal(pages, block, GROUPS, DIM) for _ in range(2))
    k_idx = normal(pages, block, DIM)
    if integers:
        k_idx = torch.randint(-3, 4, k_idx.shape, generator=random, device="cuda").bfloat16()
    order = torch.randperm(pages, generator=random, device="cuda").to(torch.int32)
    lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    return PagedKV(k, v, k_idx, order.view(batch, -1), lengths)


def in_eight_bits(cache: PagedKV, names: tuple[str, ...]) -> PagedKV:
    """Convert some pages of a cache to e4m3, each with the scale of `msa.eight_bits`."""
    changed: dict[str, Tensor] = {}
    for name in names:
        pages = getattr(cache, f"{name}_pages")
        scales = scale_for(pages.float().abs().amax((1, -1)))
        rounded = pages / scales.view(len(scales), 1, *scales.shape[1:], 1)
        changed[f"{name}_pages"] = rounded.to(torch.float8_e4m3fn)
        changed[f"{name}_scales"] = scales
    return replace(cache, **changed)


def make_queries(batch: int, integers: bool = False) -> tuple[Tensor, Tensor]:
    """Make one query for each sequence, and its index queries."""
    random = torch.Generator("cuda").manual_seed(7)
    like: dict[str, Any] = {"device": "cuda", "generator": random}
    q = torch.randn(batch, 1, HEADS, DIM, dtype=torch.bfloat16, **like)
    if integers:
        return q, torch.randint(-3, 4, (batch, 1, GROUPS, DIM), **like).bfloat16()
    return q, torch.randn(batch, 1, GROUPS, DIM, dtype=torch.bfloat16, **like)


def check(cache: PagedKV, q: Tensor, q_idx: Tensor, output: Output) -> float:
    """A step against plain formulas: selection bit for bit, on integers; attention in float64.

    Returns:
        the largest error of outputs and log-sum-exps.
    """
    assert output.selection is not None
    worst = 0.0
    for s, ids in enumerate(output.selection.indices):
        table, length = cache.page_table[s].long(), int(cache.lengths[s])
        own = (length - 1) // CONFIG.block_size
        k_idx = cache.read("k_idx", table[:own]).float()
        scores = torch.einsum("rd,btd->rbt", q_idx[s, 0].float(), k_idx).amax(-1)
        order = torch.argsort(scores, dim=1, descending=True, stable=True)
        best = order[:, : CONFIG.top_k - 1].sort(1).values
        wanted = torch.nn.functional.pad(best, (0, 1), value=own).to(torch.int32)
        if not torch.equal(wanted, ids):
            raise Wrong(f"the selection of sequence {s} differs from the plain one")
        for r in range(GROUPS):
            pages = table[ids[r].long()]
            k, v = (cache.read(n, pages)[:, :, r].flatten(0, 1).double() for n in ("k", "v"))
            heads = slice(r * HEADS // GROUPS, (r + 1) * HEADS // GROUPS)
            logits = q[s, 0, heads].double() @ k.T * DIM**-0.5
            errors = (
                output.out[s, 0, heads].double() - logits.softmax(-1) @ v,
                output.lse[s, 0, heads].double() - logits.logsumexp(-1),
            )
            worst = max(worst, *(float(error.abs().max()) for error in errors))
    if not worst < BOUND:
        raise Wrong(f"a decode step over {tuple(cache.page_table.shape)} pages is off by {worst}")
    return worst


def replays(calls: list[Callable[[], Any]], each: int = 1) -> dict[str, float]:
    """Time calls in microseconds: each is captured in a graph, and the graphs replay in turns.

    The result is the median of nine runs of REPLAYS graphs, or of a few graphs that take long.
    """
    graphs = []
    for call in calls:
        call()
        torch.cuda.synchronize()
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            call()

    def run(number: int = REPLAYS) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for i in range(number):
            graphs[i % len(graphs)].replay()
        stop.record()
        torch.cuda.synchronize()
        return 1000 * start.elapsed_time(stop) / number / each

    first = run(len(graphs))
    number = REPLAYS if first * each < LONG else max(4, len(graphs))
    times = [run(number) for _ in range(9)]
    return {"us": statistics.median(times), "min": min(times), "max": max(times)}


def in_layers(calls: list[Callable[[], Any]]) -> dict[str, float]:
    """Time one call as its share of a graph of LAYERS calls."""
    return replays([lambda: [calls[i % len(calls)]() for i in range(LAYERS)]], LAYERS)


def time_steps(caches: list[PagedKV], q: Tensor, q_idx: Tensor) -> dict[str, Any]:
    """Time a whole step, and its two kernels in a graph of layers."""
    arrivals = decoding.counters(q, GROUPS)
    scores = [score_pages(q_idx, cache, CONFIG, arrivals) for cache in caches]

    def attend(i: int) -> Any:
        arrivals.zero_()
        return attend_pages(q, caches[i], CONFIG, scores[i], arrivals)

    steps: list[Callable[[], Any]] = [
        partial(msa.decode, q, q_idx, cache, config=CONFIG, backend="triton") for cache in caches
    ]
    scoring: list[Callable[[], Any]] = [
        partial(score_pages, q_idx, cache, CONFIG, arrivals) for cache in caches
    ]
    attending: list[Callable[[], Any]] = [partial(attend, i) for i in range(len(caches))]
    return {
        "step": replays(steps),
        "layer": in_layers(steps),
        "scores": in_layers(scoring),
        "attention and a memset": in_layers(attending),
    }


def dense(q: Tensor, caches: list[PagedKV]) -> dict[str, Any]:
    """Time torch's dense attention of one query over flat keys; the heads of a group are rows."""
    batch = len(q)
    rows = q.view(batch, GROUPS, HEADS // GROUPS, DIM)
    flat = [
        [x.view(batch, -1, GROUPS, DIM).transpose(1, 2) for x in (c.k_pages, c.v_pages)]
        for c in caches
    ]
    found: dict[str, Any] = {}
    for name, backend in (
        ("cudnn", SDPBackend.CUDNN_ATTENTION),
        ("flash", SDPBackend.FLASH_ATTENTION),
    ):

        def call(kv: list[Tensor], backend: SDPBackend) -> Tensor:
            k, v = kv
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(rows, k, v)

        try:
            found[name] = replays([partial(call, kv, backend) for kv in flat])
        except RuntimeError as error:
            found[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return found


def steps() -> list[dict[str, Any]]:
    """Check and time every shape in every form, and dense attention over the same keys."""
    rows = []
    for batch, context in SHAPES:
        q, q_idx = make_queries(batch)
        copies = max(2, -(-L2 // (batch * context * DIM * 2)))
        caches = [make_cache(batch, context, seed) for seed in range(copies)]
        row: dict[str, Any] = {"batch": batch, "context": context, "dense": dense(q, caches)}
        for form, names in FORMS.items():
            exact = in_eight_bits(make_cache(batch, context, 99, integers=True), names)
            queries = make_queries(batch, integers=True)
            output = msa.decode(*queries, exact, config=CONFIG, backend="triton")
            error = check(exact, *queries, output)
            del exact
            new = tuple(n for n in names if getattr(caches[0], f"{n}_scales") is None)
            caches = [in_eight_bits(cache, new) for cache in caches]
            row[form] = time_steps(caches, q, q_idx) | {"error": error}
        rows.append(row)
        del caches
        torch.cuda.empty_cache()
    return rows


def quality() -> dict[str, Any]:
    """Measure what 8 bits lose on 131,072 random tokens, and on tokens with some large channels."""
    random = torch.Generator("cuda").manual_seed(11)

    def normal(*shape: int) -> Float[Tensor, "..."]:
        return torch.randn(shape, generator=random, device="cuda", dtype=torch.bfloat16)

    n, n_k = 16, 131072
    tensors = [normal(n, HEADS, DIM), normal(n_k, GROUPS, DIM), normal(n_k, GROUPS, DIM),
               normal(n, GROUPS, DIM), normal(n_k, DIM)]  # fmt: skip
    loud = torch.ones(DIM, device="cuda", dtype=torch.bfloat16)
    loud[:4] = 16.0  # a few channels sixteen times as large, as trained keys have them
    found = {}
    for name, (q, k, v, q_idx, k_idx) in (
        ("normal", tensors),
        ("loud channels", [tensors[0], tensors[1] * loud, *tensors[2:4], tensors[4] * loud]),
    ):
        kinds = msa.cache_quality(q, k, v, q_idx, k_idx, config=CONFIG, backend="triton")
        found[name] = {kind: asdict(loss) for kind, loss in kinds.items()}
    return found


PARTS: dict[str, Callable[[], Any]] = {
    "ceilings": ceilings, "steps": steps, "quality": quality,
}  # fmt: skip
