"""The parts of `msa bench prefill`: whole prompts, a million tokens, production shapes, top-k."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks import cases, counts
from benchmarks.cases import CONFIG, Inputs, make_inputs, make_selection
from benchmarks.checks import SCALE, check_attention, check_output, check_select, score_lost
from benchmarks.dense import baselines
from benchmarks.reading import ms
from benchmarks.timing import ceilings, timed
from benchmarks.topk_stages import freshly, topk
from msa.ir import Selection, Sequences
from msa.kernel_choice import Kernels, call_of, choose, walk_call_of
from msa.loop_order import limits
from msa.triton_impl import select_fused
from msa.triton_impl.attention import LoopOrder, attend_selection
from msa.triton_impl.prefill import attend_pages, select_pages
from msa.triton_impl.reverse_index import reverse_edges
from msa.triton_impl.schedule import schedule_edges
from msa.triton_impl.tile_union import split_tiles
from msa.triton_impl.tuning import CHUNK_EDGES

LIMITS = limits(CONFIG.top_k)


def layer(x: Inputs, chosen: Selection, kind: str | None = None) -> Callable[[], Any]:
    """Run selection on the index tensors, then attention over a selection of known agreement."""
    return lambda: (
        select_fused(x.q_idx, x.k_idx, x.sequences, CONFIG, kind),
        attend_selection(x.q, x.k, x.v, chosen, SCALE),
    )


def walker(x: Inputs, chosen: Selection, order: LoopOrder) -> str:
    """Return which kernels walk along unions where `kernels` is "auto"."""
    return choose("auto", walk_call_of(x.q, x.k, x.v, chosen, SCALE, order))


def attention_stages(x: Inputs, keep: float) -> dict[str, Any]:
    """Time the attention stage at one persistence: each loop order, and how its index is made.

    Where the hopper kernels can walk, the portable ones are timed beside them.
    """
    chosen = make_selection(x.sequences, keep)
    flops = cases.attention_flops(chosen)
    union = split_tiles(chosen, 4)
    row: dict[str, Any] = {"keep": keep, "gflop": flops / 1e9}
    row["mean_union_of_4"] = float(union.counts.float().mean())
    edges = {"kv_outer": int((chosen.indices >= 0).sum()), "union": 0}
    remote = split_tiles(chosen, 4, LIMITS).remote
    edges["auto"] = 0 if remote is None else int((remote.indices >= 0).sum())
    orders: tuple[LoopOrder, ...] = ("auto", "kv_outer", "union")
    for order in orders:
        row[f"{order}_error"] = check_attention(x, chosen, order)
        found = timed(partial(attend_selection, x.q, x.k, x.v, chosen, SCALE, order))
        moved = counts.walk_bytes(x.sequences) + counts.partial_bytes(edges[order])
        row[order] = found | {"tflops": flops / found["ms"] / 1e9, "gb": moved / 1e9}
    if walker(x, chosen, "union") != "portable":
        for order in ("auto", "union"):
            row[f"{order}_kernels"] = walker(x, chosen, order)
            row[f"portable_{order}"] = timed(
                partial(attend_selection, x.q, x.k, x.v, chosen, SCALE, order, "portable")
            )
    index = reverse_edges(chosen)
    row["reverse_index"] = timed(lambda: reverse_edges(chosen)) | {
        "gop": edges["kv_outer"] / 1e9, "gb": counts.reverse_bytes(chosen) / 1e9,
    }  # fmt: skip
    row["schedule"] = timed(lambda: schedule_edges(index, CHUNK_EDGES))
    row["unite"] = timed(lambda: split_tiles(chosen, 4))
    row["split"] = timed(lambda: split_tiles(chosen, 4, LIMITS))
    del index
    row["whole"] = timed(layer(x, chosen))
    row["whole_fp8"] = timed(layer(x, chosen, "fp8_e4m3"))
    print(f"  keep {keep}: {row['mean_union_of_4']:.1f} blocks in a union;", *(
        f"{order} {row[order]['tflops']:.0f} TFLOP/s (off by {row[f'{order}_error']:.4f}),"
        for order in orders), f"whole {row['whole']['ms']:.2f} ms", flush=True)  # fmt: skip
    return row


def select_stage(x: Inputs) -> dict[str, Any]:
    """Time the selection in bfloat16 and in fp8, and measure how much the two differ.

    The kernels are those of kernels="auto". If these are not the portable ones, the portable ones
    are timed beside them.
    """
    check_select(x.sequences)
    flops = cases.select_flops(x.sequences)
    row: dict[str, Any] = {"checked": "equal bit for bit on sampled queries, integer inputs"}
    row["kernels"] = choose("auto", call_of(x.q_idx, x.k_idx, CONFIG))

    def time(kernels: Kernels, kind: str | None) -> dict[str, float]:
        found = timed(lambda: select_fused(x.q_idx, x.k_idx, x.sequences, CONFIG, kind, kernels))
        return found | {"tflops": flops / found["ms"] / 1e9}

    for kind in (None, "fp8_e4m3"):
        moved = counts.select_bytes(x.sequences, fp8=kind is not None)
        row[kind or "bf16"] = time("auto", kind) | {"gb": moved / 1e9}
        if row["kernels"] != "portable":
            row[f"portable_{kind or 'bf16'}"] = time("portable", kind)
    fine = select_fused(x.q_idx, x.k_idx, x.sequences, CONFIG).indices
    coarse = select_fused(x.q_idx, x.k_idx, x.sequences, CONFIG, "fp8_e4m3").indices
    row["fp8_score_lost"] = score_lost(x, fine, coarse)
    fine, coarse = fine[-1024:], coarse[-1024:]
    same = (fine[..., :, None] == coarse[..., None, :]).any(-1) & (fine >= 0)
    row["fp8_same_blocks"] = float(same.sum() / (fine >= 0).sum())
    print(f"  select ({row['kernels']} kernels) {row['bf16']['tflops']:.0f} TFLOP/s, "
          f"fp8 {row['fp8_e4m3']['tflops']:.0f}: "
          f"{row['fp8_same_blocks']:.1%} of its blocks are the same, it loses "
          f"{row['fp8_score_lost']:.2%} of their score", flush=True)  # fmt: skip
    return row


def whole_prompt(n: int) -> dict[str, Any]:
    """Measure one prompt of n tokens."""
    print(f"{n} tokens", flush=True)
    x = make_inputs(Sequences.one(n, n))
    row: dict[str, Any] = {"n": n} | baselines(x, flash=n <= 32768)
    print(" ", {name: found for name, found in row.items() if name != "n"}, flush=True)
    row["select"] = select_stage(x)
    row["attention"] = [attention_stages(x, keep) for keep in cases.AGREEMENT]
    return row


def million_chunk(prefix: int) -> dict[str, Any]:
    """Measure 16K queries whose sequence has `prefix` earlier tokens."""
    print(f"{cases.CHUNK} tokens behind {prefix * cases.CHUNK}", flush=True)
    x = make_inputs(Sequences.one(cases.CHUNK, (prefix + 1) * cases.CHUNK))
    row: dict[str, Any] = {"prefix": prefix * cases.CHUNK, "select": select_stage(x)}
    row |= baselines(x, flash=False)
    stages: list[dict[str, float]] = []
    for keep in cases.PERSISTENCE:
        chosen = make_selection(x.sequences, keep)
        error = check_attention(x, chosen, "auto")
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        layer(x, chosen)()
        extra = torch.cuda.max_memory_allocated() - before - x.q.nbytes
        found = timed(lambda chosen=chosen: attend_selection(x.q, x.k, x.v, chosen, SCALE))
        found |= {"tflops": cases.attention_flops(chosen) / found["ms"] / 1e9, "error": error}
        stages.append({"keep": keep, "extra_gib": extra / 2**30} | found)
    row["attention"] = stages
    return row


def million_whole() -> dict[str, Any]:
    """Time all 64 chunks of a million tokens, one after the other, at ρ = 0.95."""
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
    print(f"{cases.MILLION} tokens in chunks: {whole}", flush=True)
    return whole


def lengths() -> list[dict[str, Any]]:
    """Measure prompts of 4K to 128K tokens."""
    return [freshly(whole_prompt, n) for n in cases.LENGTHS]


def million() -> dict[str, Any]:
    """Measure a million tokens in chunks of 16K: five chunks by stages, then all of them."""
    chunks = [freshly(million_chunk, prefix) for prefix in cases.PREFIXES]
    return {"chunks": chunks, "whole_keep_0.95": freshly(million_whole)}


def production() -> dict[str, Any]:
    """Measure the production shapes, 32 neighbours sharing their blocks; then ragged batches.

    The dense baseline of a shape is cuDNN over all of its keys.
    """
    rows: list[dict[str, Any]] = []
    for n_q, n_k, calls in cases.PRODUCTION:
        row = freshly(one_layer, Sequences.one(n_q, n_k), True)
        rows.append({"n_q": n_q, "n_k": n_k, "calls": calls} | row)
    ragged: list[dict[str, Any]] = []
    for queries, keys in cases.RAGGED:
        borders = [(0, *(sum(x[: i + 1]) for i in range(len(x)))) for x in (queries, keys)]
        ragged.append({"n_q": queries, "n_k": keys} | one_layer(Sequences(*borders)))
    means = {
        "weighted_ms": by_calls(rows, lambda row: row["ms"]),
        "weighted_fp8_ms": by_calls(rows, lambda row: ms(row, "fp8")),
        "weighted_eight_ms": by_calls(rows, lambda row: ms(row, "eight")),
    }
    if all(isinstance(row["cudnn"], dict) for row in rows):
        means["weighted_cudnn_ms"] = by_calls(rows, lambda row: ms(row, "cudnn"))
    return {"cases": rows, **means, "ragged": ragged}


def by_calls(rows: list[dict[str, Any]], measure: Callable[[dict[str, Any]], float]) -> float:
    """Average a measure over cases, each weighted by its number of calls.

    >>> by_calls([{"calls": 3, "ms": 1.0}, {"calls": 1, "ms": 5.0}], lambda row: row["ms"])
    2.0
    """
    return sum(row["calls"] * measure(row) for row in rows) / sum(row["calls"] for row in rows)


def one_layer(sequences: Sequences, dense: bool = False) -> dict[str, Any]:
    """Time selection and attention of one layer: in bfloat16, index in fp8, all in 8 bits."""
    x = make_inputs(sequences)
    chosen = make_selection(sequences, 0.0, every=32)
    check_select(sequences)
    error = check_attention(x, chosen, "auto")
    row: dict[str, Any] = timed(layer(x, chosen)) | {"error": error}
    row["fp8"] = timed(layer(x, chosen, "fp8_e4m3"))
    row["eight"] = eight_bits(x, chosen)
    row["select"] = timed(lambda: select_fused(x.q_idx, x.k_idx, x.sequences, CONFIG))
    if dense:
        row |= baselines(x, flash=False)
    print(sequences.cu_seqlens_q, sequences.cu_seqlens_k, row, flush=True)
    return row


def eight_bits(x: Inputs, chosen: Selection) -> dict[str, Any]:
    """Time the same layer over a cache of 8 bits, with index queries of 8 bits.

    `rounding` is what the rounding of keys and values changes: |out - out'| / |out|.
    """
    cache, rounded = cases.make_cache(x)
    out, lse = attend_pages(x.q, cache, chosen, SCALE)
    error = check_output(rounded, chosen, out, lse, "attention over 8 bits")
    exact = attend_selection(x.q, x.k, x.v, chosen, SCALE).out.float()
    rounding = float((out.float() - exact).norm() / exact.norm())

    def run() -> None:
        select_pages(x.q_idx, cache, x.sequences, CONFIG, "fp8_e4m3")
        attend_pages(x.q, cache, chosen, SCALE)

    return timed(run) | {"error": error, "rounding": rounding}


PARTS: dict[str, Callable[[], Any]] = {
    "ceilings": ceilings, "lengths": lengths, "million": million, "production": production,
    "topk": topk,
}  # fmt: skip
