"""The parts of `msa bench serving`: a sparse layer of vLLM with its own kernels and the plug-in's.

Both run on the same tensors in vLLM's layouts, driven by vLLM's own files (`vllm_files.py`): its
metadata, its indexer, its attention. A time is that of indexer and attention of one layer. Shapes
are those of MiniMax-M3 on one GPU: 64 query heads, 4 groups, 16 blocks of 128 tokens.

Before anything is timed, selections and outputs are compared. Index tensors hold short numbers, so
their scores are exact, and blocks differ only where scores are equal: vLLM breaks ties otherwise.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import engine_files, serving_sglang, vllm_files
from benchmarks.checks import BOUND, Wrong, sampled
from benchmarks.timing import timed
from benchmarks.vllm_files import NAME, PAGE, Batch, Engine, Layer

HEADS, GROUPS, DIM, TOP_K = 64, 4, 128, 16
FORMS = {"bf16": ("auto", "bf16"), "fp8 index": ("auto", "fp8"), "fp8": ("fp8_e4m3", "fp8")}
"""vLLM's --kv-cache-dtype, and its indexer_kv_dtype."""
MIXED = Batch((1,) * 32 + (8192,), (32768,) * 33)
"""A chunk of 8K tokens at the end of 32K, beside 32 decodes at 32K."""
DECODES = {
    **{f"{b} x 32K": Batch((1,) * b, (32768,) * b) for b in (1, 4, 16, 64)},
    "8 x 128K": Batch((1,) * 8, (131072,) * 8),
}
CHECKED = {
    "decodes, one padded": Batch((1,) * 4, (5000, 129, 0, 40000)),
    "three tokens each": Batch((3,) * 3, (900, 6400, 40001), drafts=2),
    "mixed": Batch((1, 1, 300, 1500), (9000, 2570, 70000, 1500)),
    "rejected drafts": Batch((3, 2, 200), (9000, 640, 3000), 2, (9000, 642, 3000)),
}


# -- tensors --------------------------------------------------------------------------------------
@dataclass
class Run:
    """A layer with pages, a batch, and its queries."""

    engine: Engine
    layer: Layer
    batch: Batch
    table: Tensor
    q: Tensor
    q_idx: Tensor
    out: Tensor = field(init=False)

    def __call__(self) -> Tensor:
        """Indexer and attention, once."""
        return self.layer.run(self.q, self.q_idx, self.out)

    def build(self) -> dict[str, Any]:
        """Make the step of this batch the current one."""
        self.out = torch.full_like(self.q, torch.nan)
        return self.engine.build(self.layer, self.batch, self.table)

    def ids(self) -> Tensor:
        """The selected blocks, sorted."""
        return self.layer.topk_indices_buffer[: len(self.q)].sort(-1).values.clone()


def short_numbers(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """Numbers of four bits between 1/8 and 15/4 with signs: exact in e4m3, and so are sums."""
    like: dict[str, Any] = {"device": "cuda", "generator": random}
    bits = torch.randint(1, 16, shape, **like) * 2.0 ** torch.randint(-3, -1, shape, **like)
    return bits * (2 * torch.randint(0, 2, shape, **like) - 1)


def make_run(
    engine: Engine, batch: Batch, form: str, order: str = "LBNHC", spare: int = 2,
    spoiled: bool = True,
) -> Run:  # fmt: skip
    """A layer of this form over pages of random order; spoiled: NaN behind each sequence's end.

    spare: pages that each sequence has behind its own.
    """
    random = torch.Generator("cuda").manual_seed(len(batch.new))
    kv_dtype, index_dtype = FORMS[form]
    tokens = sum(batch.new)
    layer = engine.layer(HEADS, GROUPS, DIM, TOP_K, tokens, kv_dtype, index_dtype)
    blocks = [-(-max(n, 1) // PAGE) for n in batch.lengths]
    pages, width = sum(blocks) + spare * len(blocks) + 1, max(blocks) + spare
    places = (torch.randperm(pages - 1, generator=random, device="cuda") + 1).int().tolist()
    table = torch.zeros((len(blocks), width), dtype=torch.int32)
    for s, n in enumerate(blocks):
        own = [places.pop() for _ in range(n + spare)]
        table[s, : len(own)] = torch.tensor(own)
    table = table.cuda()

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device="cuda", dtype=torch.bfloat16)

    if order == "LBNHC":
        kv = normal(pages, PAGE, GROUPS, 2 * DIM).transpose(1, 2)
    else:
        kv = normal(pages, GROUPS, PAGE, 2 * DIM)
    keys = short_numbers((pages, 1, PAGE, DIM), random).bfloat16()
    q_idx = short_numbers((tokens, GROUPS * DIM), random).bfloat16()
    for s, n in enumerate(batch.lengths if spoiled else ()):
        kv[table[s, n // PAGE], :, n % PAGE :] = torch.nan
    if kv_dtype != "auto":
        kv = kv.to(torch.float8_e4m3fn).view(torch.uint8)
    layer.kv_cache = kv
    index = layer.indexer.index_cache
    index.bind_kv_cache(keys.to(index.dtype))
    run = Run(engine, layer, batch, table, normal(tokens, HEADS * DIM), q_idx.to(index.dtype))
    run.build()
    return run


@contextmanager
def vllm() -> Iterator[Engine]:
    """vLLM's files from the folder of the environment variable."""
    with tempfile.TemporaryDirectory() as into:
        folder = os.environ[engine_files.VARIABLE]
        os.environ["MSA_WARM_UP"] = "0"  # each step is run before it is timed
        with vllm_files.loaded(engine_files.unpack("vllm", folder, Path(into))) as engine:
            yield engine


# -- checks ---------------------------------------------------------------------------------------
def compare(run: Run) -> dict[str, float]:
    """Both on the same step: selections equal up to ties, outputs against float64.

    Afterwards the layer runs with the plug-in.
    """
    theirs, their_ids = run().clone(), run.ids()
    run.engine.plug_in(run.layer)
    run.build()
    run.layer.topk_indices_buffer.fill_(-7)
    ours, ids = run().clone(), run.ids()
    real = torch.tensor([n > 0 for n in run.batch.lengths], device="cuda")
    real = real.repeat_interleave(torch.tensor(run.batch.new, device="cuda"))
    differ = ((ids != their_ids).any(-1) & real[:, None]).nonzero()
    for query, group in differ[:: max(1, len(differ) // 50)].tolist():
        scores = [block_scores(run, query, group, x[query, group]) for x in (ids, their_ids)]
        if not torch.equal(*scores):
            raise Wrong(f"query {query}, group {group}: blocks with other scores than vLLM's")
    if (ours[~real] != 0).any():
        raise Wrong("padded rows must be 0")
    mean, worst, worst_theirs = 0.0, 0.0, 0.0
    queries = [i for i in sampled(len(run.q)) if real[i]]
    for query in queries:
        want = plain_output(run, query, ids[query])
        size = float(want.norm())
        error = float((ours[query].double() - want).norm()) / size
        mean, worst = mean + error / len(queries), max(worst, error)
        if torch.equal(ids[query], their_ids[query]):
            error = float((theirs[query].double() - want).norm()) / size
            worst_theirs = max(worst_theirs, error)
    if not worst < BOUND:
        raise Wrong(f"output is off by {worst:.3f}")
    rows = float(real.sum()) * GROUPS
    return {"rows": rows, "ties": len(differ), "error": worst, "mean_error": mean,
            "error_vllm": worst_theirs}  # fmt: skip


def place(run: Run, query: int) -> tuple[int, int]:
    """The sequence of a query, and its position."""
    first = 0
    for s, (new, length) in enumerate(zip(run.batch.new, run.batch.lengths)):
        if query < first + new:
            return s, length - new + query - first
        first += new
    raise IndexError(query)


def block_scores(run: Run, query: int, group: int, ids: Tensor) -> Tensor:
    """The sorted scores of blocks before the query's own block."""
    s, position = place(run, query)
    ids = ids[(ids >= 0) & (ids < position // PAGE)].long()
    keys = run.layer.indexer.index_cache.kv_cache[run.table[s, ids].long()].double()
    q_idx = run.q_idx[query].view(GROUPS, DIM)[group].double()
    return (keys @ q_idx).amax(-1).sort().values


def plain_output(run: Run, query: int, ids: Tensor) -> Tensor:
    """The output of a query over given blocks [Hkv, k], by plain formulas in float64."""
    s, position = place(run, query)
    kv = run.layer.kv_cache
    if kv.dtype == torch.uint8:
        kv = kv.view(torch.float8_e4m3fn)
    q = run.q[query].view(GROUPS, -1, DIM).double()
    found: list[Tensor] = []
    for group in range(GROUPS):
        own = ids[group][ids[group] >= 0].long()
        token = (own[:, None] * PAGE + torch.arange(PAGE, device="cuda")).flatten()
        both = kv[run.table[s, own].long(), group].double().flatten(0, 1)[token <= position]
        k, v = both[:, :DIM], both[:, DIM:]
        found.append(torch.softmax(q[group] @ k.T * DIM**-0.5, -1) @ v)
    return torch.cat(found).flatten()


def check_replay(engine: Engine, form: str) -> dict[str, float]:
    """A captured decode, replayed with longer sequences and one that was empty."""
    batch = Batch((1,) * 4, (5000, 129, 0, 40000))
    run = make_run(engine, batch, form, spare=4, spoiled=False)
    engine.plug_in(run.layer)
    step = run.build()
    lengths = step[NAME].decode.seq_lens
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    grown = torch.tensor([5300, 131, 1, 40129], dtype=torch.int32, device="cuda")
    lengths.copy_(grown)
    run.out.fill_(torch.nan)
    graph.replay()
    replayed, ids = run.out.clone(), run.ids()
    run.out.fill_(torch.nan)
    eager, eager_ids = run().clone(), run.ids()
    if not (torch.equal(replayed, eager) and torch.equal(ids, eager_ids)):
        raise Wrong("a replayed graph differs from a call")
    if not torch.isfinite(replayed).all():
        raise Wrong("a replayed graph gives NaN")
    return {"replayed": float(len(ids))}


def checks() -> dict[str, Any]:
    """Every kind of batch, bf16 and 8 bits, two orders of pages; replay with grown lengths."""
    found: dict[str, Any] = {}
    with vllm() as engine:
        for form in FORMS:
            for name, batch in CHECKED.items():
                order = "LBHNC" if name == "three tokens each" else "LBNHC"
                found[f"{name}, {form}"] = compare(make_run(engine, batch, form, order))
            found[f"replay, {form}"] = check_replay(engine, form)
    return found


# -- times ----------------------------------------------------------------------------------------
def device_time(run: Run) -> dict[str, float]:
    """Time on the device; in a graph where it can be captured."""
    try:
        return timed(run)
    except RuntimeError:  # a capture that failed
        torch.cuda.synchronize()
        return timed(run, graph=False)


def host_time(run: Run, calls: int = 50) -> float:
    """Microseconds of the host for one call."""
    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    spent = time.perf_counter() - start
    torch.cuda.synchronize()
    return spent / calls * 1e6


def race(engine: Engine, batch: Batch, form: str, host: bool = False) -> dict[str, Any]:
    """Both kernels on one step: checked, then timed in turns; the better of two times counts."""
    run = make_run(engine, batch, form)
    found: dict[str, Any] = {"check": compare(run)}
    parts = {"vllm": engine.own_parts, "msa": engine.parts_of(run.layer)}
    for name in ("vllm", "msa", "vllm", "msa"):
        engine.exchange(run.layer, parts[name])
        run.build()
        new = device_time(run)
        if new["ms"] < found.get(name, new)["ms"] or name not in found:
            found[name] = found.get(name, {}) | new
        if host and "host_us" not in found[name]:
            found[name]["host_us"] = host_time(run)
    found["times"] = found["vllm"]["ms"] / found["msa"]["ms"]
    return found


def production_shapes() -> list[dict[str, int]]:
    """Shapes of prefill in production, each with the number of calls that it stands for."""
    path = Path(__file__).parent / "production_prefill.json"
    return json.loads(path.read_text(encoding="utf-8"))["single"]


def prefill() -> dict[str, Any]:
    """Prefill of production shapes, one sequence at a time; `by_calls` weighs by their number."""
    found: dict[str, Any] = {}
    with vllm() as engine:
        for form in ("bf16", "fp8"):
            rows = [shape | race(engine, one_prefill(shape), form) for shape in production_shapes()]
            found[form] = {"shapes": rows, "by_calls": by_calls(rows)}
    return found


def one_prefill(shape: dict[str, int]) -> Batch:
    """The batch of a production shape."""
    return Batch((shape["query_len"],), (shape["kv_len"],))


def by_calls(rows: list[dict[str, Any]]) -> float:
    """How many times as long vLLM takes for all calls that the shapes stand for."""
    total = {n: sum(r["weight"] * r[n]["ms"] for r in rows) for n in ("vllm", "msa")}
    return total["vllm"] / total["msa"]


def mixed() -> dict[str, Any]:
    """A chunk of a prompt beside decodes."""
    with vllm() as engine:
        return {form: race(engine, MIXED, form, host=True) for form in FORMS}


def decode() -> dict[str, Any]:
    """Decodes of several batches."""
    with vllm() as engine:
        return {form: {name: race(engine, batch, form, host=True)
                       for name, batch in DECODES.items()} for form in FORMS}  # fmt: skip


PARTS: dict[str, Callable[[], Any]] = {
    "checks": checks, "prefill": prefill, "mixed": mixed, "decode": decode,
    "sglang": serving_sglang.measure,
}  # fmt: skip
