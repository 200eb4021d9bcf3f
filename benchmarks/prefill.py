"""Prefill on a GPU: first correct, then fast. Writes benchmarks/results/prefill_<device>.json.

    python -m benchmarks.prefill [--out results.json] [--parts lengths million production topk]

Every case is checked on sampled queries before it is timed; one that fails stops the run. Times are
medians of graph replays between events, the L2 cache overwritten before each; calls of more than
20 ms run without a graph, fewer times.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import cases
from benchmarks.cases import CONFIG, Inputs, make_inputs, make_selection
from msa.config import MSAConfig
from msa.ir import Selection, Sequences
from msa.triton_impl import select_fused
from msa.triton_impl.attention import LoopOrder, attend_selection
from msa.triton_impl.block_topk import select_rows
from msa.triton_impl.reverse_index import reverse_edges
from msa.triton_impl.schedule import schedule_edges
from msa.triton_impl.tile_union import split_tiles
from msa.triton_impl.tuning import CHUNK_EDGES

SCALE = cases.DIM**-0.5


# -- time -----------------------------------------------------------------------------------------
def timed(call: Callable[[], Any], graph: bool = True) -> dict[str, float]:
    """Median, least and most milliseconds of a call."""
    call()
    torch.cuda.synchronize()
    first = one_run(call)
    long = first > 20
    if graph and not long:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            call()
        replay = captured.replay
    else:
        replay = call
    times = [first] if first > 2000 else [one_run(replay) for _ in range(3 if long else 15)]
    return {"ms": statistics.median(times), "min": min(times), "max": max(times)}


def one_run(call: Callable[[], Any]) -> float:
    """Milliseconds of one call, the L2 cache full of something else."""
    torch.empty(2**27, dtype=torch.int8, device="cuda").zero_()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


# -- correctness ----------------------------------------------------------------------------------
def sampled(total: int, number: int = 24) -> list[int]:
    """Some queries: the first, the last, and others between."""
    return sorted({round(i * (total - 1) / (number - 1)) for i in range(number)})


def check_select(sequences: Sequences) -> None:
    """The fused selection equals a plain one on sampled queries, bit for bit, on integer inputs."""
    random = torch.Generator("cuda").manual_seed(1)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-3, 4, shape, generator=random, device="cuda").bfloat16()

    q_idx = integers(sequences.total_q, cases.GROUPS, cases.DIM)
    k_idx = integers(sequences.total_k, cases.DIM)
    chosen = select_fused(q_idx, k_idx, sequences, CONFIG).indices
    spans = list(sequences.spans())
    for i in sampled(sequences.total_q):
        qs, ks = next((q, k) for q, k in spans if q.start <= i < q.stop)
        own = (i - qs.stop + ks.stop - ks.start) // CONFIG.block_size
        ids = torch.full((cases.GROUPS, 1), own, device="cuda")
        if own:
            past = k_idx[ks.start : ks.start + own * CONFIG.block_size].float()
            scores = (q_idx[i].float() @ past.T).view(cases.GROUPS, own, -1).amax(2)
            order = torch.argsort(scores, dim=1, descending=True, stable=True)
            ids = torch.cat([order[:, : CONFIG.top_k - 1].sort(1).values, ids], 1)
        missing = torch.full((cases.GROUPS, CONFIG.top_k - ids.shape[1]), -1, device="cuda")
        wanted = torch.cat([ids, missing], 1).int()
        if not torch.equal(wanted, chosen[i]):
            raise AssertionError(f"selection of query {i} of {sequences} differs")


def check_attention(x: Inputs, chosen: Selection, order: LoopOrder) -> float:
    """The largest error of sampled queries against float64; raises beyond bfloat16's rounding."""
    result = attend_selection(x.q, x.k, x.v, chosen, SCALE, order)
    worst = 0.0
    for i in sampled(x.sequences.total_q):
        qs, ks = next((q, k) for q, k in x.sequences.spans() if q.start <= i < q.stop)
        position = i - qs.stop + ks.stop - ks.start
        for r in range(cases.GROUPS):
            ids = chosen.indices[i, r]
            tokens = ids[ids >= 0].long()[:, None] * CONFIG.block_size
            tokens = (tokens + torch.arange(CONFIG.block_size, device="cuda")).flatten()
            tokens = tokens[tokens <= position] + ks.start
            heads = slice(r * 16, r * 16 + 16)
            logits = x.q[i, heads].double() @ x.k[tokens, r].double().T * SCALE
            wanted = logits.softmax(1) @ x.v[tokens, r].double()
            lse = logits.logsumexp(1)
            worst = max(worst, float((result.out[i, heads].double() - wanted).abs().max()))
            worst = max(worst, float((result.lse[i, heads].double() - lse).abs().max()))
    if not worst < 0.02:
        raise AssertionError(f"{order} attention of {x.sequences} is off by {worst}")
    return worst


# -- baselines ------------------------------------------------------------------------------------
def dense(x: Inputs, backend: SDPBackend) -> dict[str, float] | str:
    """torch's dense attention: causal for a whole prompt, over all keys for a chunk of one."""
    q, k, v = (t.transpose(0, 1)[None] for t in (x.q, x.k, x.v))
    causal = x.sequences.total_q == x.sequences.total_k

    def call() -> Any:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    try:
        return timed(call, graph=False)
    except RuntimeError as error:
        return str(error).splitlines()[0]


# -- parts ----------------------------------------------------------------------------------------
def attention_stages(x: Inputs, keep: float) -> dict[str, Any]:
    """The attention stage at one persistence: each loop order, and what makes its index."""
    chosen = make_selection(x.sequences, keep)
    flops = cases.attention_flops(chosen)
    row: dict[str, Any] = {"keep": keep, "gflop": flops / 1e9}
    row["mean_union_of_4"] = float(split_tiles(chosen, 4).counts.float().mean())
    orders: tuple[LoopOrder, ...] = ("auto", "kv_outer", "union")
    for order in orders:
        row[f"{order}_error"] = check_attention(x, chosen, order)
        found = timed(partial(attend_selection, x.q, x.k, x.v, chosen, SCALE, order))
        row[order] = found | {"tflops": flops / found["ms"] / 1e9}
    index = reverse_edges(chosen)
    row["reverse_index"] = timed(lambda: reverse_edges(chosen))
    row["schedule"] = timed(lambda: schedule_edges(index, CHUNK_EDGES))
    row["unite"] = timed(lambda: split_tiles(chosen, 4))
    row["split"] = timed(lambda: split_tiles(chosen, 4, (28, 48)))
    del index
    both = timed(
        lambda: (
            select_fused(x.q_idx, x.k_idx, x.sequences, CONFIG),
            attend_selection(x.q, x.k, x.v, chosen, SCALE),
        )
    )
    row["whole"] = both
    row["whole_fp8"] = timed(
        lambda: (
            select_fused(x.q_idx, x.k_idx, x.sequences, CONFIG, "fp8_e4m3"),
            attend_selection(x.q, x.k, x.v, chosen, SCALE),
        )
    )
    return row


def select_stage(x: Inputs) -> dict[str, Any]:
    """The fused selection in bfloat16 and fp8, and how much the two differ."""
    check_select(x.sequences)
    flops = cases.select_flops(x.sequences)
    row: dict[str, Any] = {}
    for kind in (None, "fp8_e4m3"):
        found = timed(lambda kind=kind: select_fused(x.q_idx, x.k_idx, x.sequences, CONFIG, kind))
        row[kind or "bf16"] = found | {"tflops": flops / found["ms"] / 1e9}
    fine = select_fused(x.q_idx, x.k_idx, x.sequences, CONFIG).indices[-1024:]
    coarse = select_fused(x.q_idx, x.k_idx, x.sequences, CONFIG, "fp8_e4m3").indices[-1024:]
    same = (fine[..., :, None] == coarse[..., None, :]).any(-1) & (fine >= 0)
    row["fp8_same_blocks"] = float(same.sum() / (fine >= 0).sum())
    return row


def whole_prompt(n: int) -> dict[str, Any]:
    """One prompt of n tokens."""
    x = make_inputs(Sequences.one(n, n))
    row: dict[str, Any] = {"n": n, "cudnn": dense(x, SDPBackend.CUDNN_ATTENTION)}
    if n <= 32768:
        row["flash"] = dense(x, SDPBackend.FLASH_ATTENTION)
    row["select"] = select_stage(x)
    row["attention"] = [attention_stages(x, keep) for keep in cases.PERSISTENCE]
    show(f"N = {n}", row)
    return row


def million_chunk(prefix: int) -> dict[str, Any]:
    """The 16K queries behind `prefix` chunks of 16K tokens."""
    x = make_inputs(Sequences.one(cases.CHUNK, (prefix + 1) * cases.CHUNK))
    row: dict[str, Any] = {"prefix": prefix * cases.CHUNK, "select": select_stage(x)}
    row["cudnn"] = dense(x, SDPBackend.CUDNN_ATTENTION)
    stages: list[dict[str, float]] = []
    for keep in cases.PERSISTENCE:
        chosen = make_selection(x.sequences, keep)
        check_attention(x, chosen, "auto")
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        select_fused(x.q_idx, x.k_idx, x.sequences, CONFIG)
        attend_selection(x.q, x.k, x.v, chosen, SCALE)
        extra = torch.cuda.max_memory_allocated() - before - x.q.nbytes
        found = timed(lambda chosen=chosen: attend_selection(x.q, x.k, x.v, chosen, SCALE))
        found |= {"tflops": cases.attention_flops(chosen) / found["ms"] / 1e9}
        stages.append({"keep": keep, "extra_gib": extra / 2**30} | found)
    row["attention"] = stages
    print(json.dumps(row), flush=True)
    return row


def million_whole() -> dict[str, Any]:
    """All 64 chunks of a million tokens, one after the other, neighbours agreeing to 0.95."""
    x = make_inputs(Sequences.one(cases.CHUNK, cases.MILLION))
    parts = []
    for prefix in range(cases.MILLION // cases.CHUNK):
        part = Sequences.one(cases.CHUNK, (prefix + 1) * cases.CHUNK)
        parts.append((part, make_selection(part, 0.95, seed=prefix)))

    def run(kind: str | None) -> None:
        for part, chosen in parts:
            keys = slice(0, part.total_k)
            select_fused(x.q_idx, x.k_idx[keys], part, CONFIG, kind)
            attend_selection(x.q, x.k[keys], x.v[keys], chosen, SCALE)

    whole = {kind or "bf16": timed(lambda kind=kind: run(kind)) for kind in (None, "fp8_e4m3")}
    print("1M whole", whole, flush=True)
    return whole


def freshly(call: Callable[..., Any], *given: Any) -> Any:
    """Call with an empty cache of device memory before."""
    torch.cuda.empty_cache()
    return call(*given)


def whole_prompts() -> list[dict[str, Any]]:
    """Prompts of 8K to 128K tokens."""
    return [freshly(whole_prompt, n) for n in cases.LENGTHS]


def million() -> dict[str, Any]:
    """A million tokens in chunks of 16K: five chunks by stages, then all of them."""
    chunks = [freshly(million_chunk, prefix) for prefix in cases.PREFIXES]
    return {"chunks": chunks, "whole_keep_0.95": freshly(million_whole)}


def production() -> dict[str, Any]:
    """The production shapes, neighbours sharing their blocks by 32; then ragged batches."""
    rows: list[dict[str, Any]] = []
    total, weight = 0.0, 0
    for n_q, n_k, calls in cases.PRODUCTION:
        rows.append({"n_q": n_q, "n_k": n_k, "calls": calls} | one_layer(Sequences.one(n_q, n_k)))
        total, weight = total + calls * rows[-1]["ms"], weight + calls
    ragged: list[dict[str, Any]] = []
    for queries, keys in cases.RAGGED:
        borders = [(0, *(sum(x[: i + 1]) for i in range(len(x)))) for x in (queries, keys)]
        ragged.append({"n_q": queries, "n_k": keys} | one_layer(Sequences(*borders)))
    print("production: weighted mean", total / weight, "ms; smallest", rows[0]["ms"], flush=True)
    return {"cases": rows, "weighted_ms": total / weight, "ragged": ragged}


def one_layer(sequences: Sequences) -> dict[str, float]:
    """Selection and attention of one layer."""
    x = make_inputs(sequences)
    chosen = make_selection(sequences, 0.0, every=32)
    check_select(sequences)
    check_attention(x, chosen, "auto")
    row = timed(
        lambda: (
            select_fused(x.q_idx, x.k_idx, sequences, CONFIG),
            attend_selection(x.q, x.k, x.v, chosen, SCALE),
        )
    )
    print(sequences.cu_seqlens_q, sequences.cu_seqlens_k, row, flush=True)
    return row


def topk_rows(n: int, blocks: int, k: int) -> dict[str, Any]:
    """n rows of scores, all blocks visible."""
    scores = torch.randn(n, 1, blocks, device="cuda")
    scores[:, :, -1] = 100.0  # the forced block is everyone's best, so the two agree
    positions = torch.full((n,), blocks * 128 - 1, device="cuda", dtype=torch.int32)
    config = MSAConfig(top_k=k)
    ours = select_rows(scores, positions, 128, config)
    if not torch.equal(ours[:, 0], scores[:, 0].topk(k).indices.sort(1).values.int()):
        raise AssertionError("the stand-alone top-k differs from torch.topk")
    row = {"rows": n, "blocks": blocks, "k": k, "torch": timed(lambda: scores.topk(k, dim=-1))}
    row["ours"] = timed(lambda: select_rows(scores, positions, 128, config))
    print(row, flush=True)
    return row


def topk() -> list[dict[str, Any]]:
    """The stand-alone top-k over rows of scores against torch.topk (the paper's Table 1)."""
    shapes = ((2**17, 1024, 16), (2**17, 2048, 32), (2**19, 4096, 16))
    return [freshly(topk_rows, *shape) for shape in shapes]


def show(title: str, row: dict[str, Any]) -> None:
    """A few lines of what matters."""
    cudnn = row["cudnn"]["ms"]
    rates = {k: round(v["tflops"]) for k, v in row["select"].items() if isinstance(v, dict)}
    print(f"{title}: cuDNN {cudnn:.2f} ms; select {rates} TFLOP/s,", end=" ")
    print(f"fp8 shares {row['select']['fp8_same_blocks']:.3f} of the blocks")
    for a in row["attention"]:
        rates = {k: round(a[k]["tflops"]) for k in ("auto", "kv_outer", "union")}
        speed = {k: round(cudnn / a[k]["ms"], 2) for k in ("whole", "whole_fp8")}
        print(f"  keep {a['keep']}: {rates} useful TFLOP/s, times cuDNN {speed}", flush=True)


def main() -> None:
    """Run the parts asked for and write what they found."""
    parts = {"lengths": whole_prompts, "million": million, "production": production, "topk": topk}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="benchmarks/results/prefill_h100.json")
    parser.add_argument("--parts", nargs="*", default=list(parts), choices=list(parts))
    given = parser.parse_args()
    device = torch.cuda.get_device_properties(0)
    found: dict[str, Any] = {
        "device": device.name, "multiprocessors": device.multi_processor_count,
        "torch": torch.__version__, "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    for name in given.parts:
        found[name] = parts[name]()
        with open(given.out, "w") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
