"""Where the kernels stand: tables and sentences of prefill, training and decoding, from results.

Each function takes the name of a results file: "prefill" is the committed one, "history/prefill_h100"
an older one. No number is written by hand, so a new run changes every page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.cases import CHUNK, DIM, PERSISTENCE
from benchmarks.prefill_table import LOOP_ORDERS, tokens
from benchmarks.reading import at, best_dense, million_dense, over_million
from docs.hooks.curves import table
from docs.hooks.measured import age, device, read

Row = dict[str, Any]
KEEP = 0.95
FORMS = {
    "bf16": "step (layer)",
    "fp8 index": "the same, index keys in 8 bits",
    "fp8 all": "the same, all in 8 bits",
}


def digits(value: float) -> str:
    """Three digits, or all digits before the point.

    >>> [digits(x) for x in (0.1204, 1.386, 29.44, 505.2, 1832.6)]
    ['0.120', '1.39', '29.4', '505', '1833']
    """
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.{2 - math.floor(math.log10(value))}f}"


def span(values: Iterable[float], show: Callable[[float], str] = digits) -> str:
    """The least and the greatest value, or the one value if both look alike.

    >>> span([0.931, 0.969], lambda x: f"{100 * x:.0f}"), span([2.0, 2.001])
    ('93–97', '2.00')
    """
    shown = [show(value) for value in sorted(values)]
    return shown[0] if shown[0] == shown[-1] else f"{shown[0]}–{shown[-1]}"


def pair(fine: float, coarse: float, show: Callable[[float], str] = digits) -> str:
    """A number, and in brackets that of 8 bits."""
    return f"{show(fine)} ({show(coarse)})"


# -- prefill --------------------------------------------------------------------------------------
def prompts(name: str = "prefill") -> list[Row]:
    """The measured prompts from 8K tokens on."""
    return [row for row in read(name)["lengths"] if row["n"] >= 8192]


def gains(row: Row) -> tuple[float, float]:
    """How many times faster than cuDNN a prompt is at ρ = 0.95, in bfloat16 and with an fp8 index."""
    stage = at(row, KEEP)
    dense = row["cudnn"]["ms"]
    return dense / stage["whole"]["ms"], dense / stage["whole_fp8"]["ms"]


def prefill(name: str = "prefill") -> str:
    """The stages of whole prompts, and the whole against cuDNN."""
    rows = prompts(name)

    def rates(order: str) -> list[str]:
        return [
            " / ".join(f"{at(row, keep)[order]['tflops']:.0f}" for keep in PERSISTENCE)
            for row in rows
        ]

    def both(measure: Callable[[Row], tuple[float, float]]) -> list[str]:
        return [pair(*measure(row)) for row in rows]

    keeps = " / ".join(f"{keep:g}" for keep in PERSISTENCE)
    orders = [f"attention, useful TFLOP/s, `auto`, ρ = {keeps}"]
    orders += [f"the same, `{order}`" for order in ("union", "kv_outer")]
    lines = [
        ("select, TFLOP/s (fp8)", *both(
            lambda row: tuple(row["select"][kind]["tflops"] for kind in ("bf16", "fp8_e4m3")))),
        *((words, *rates(order)) for words, order in zip(orders, ("auto", "union", "kv_outer"))),
        ("dense, cuDNN, ms", *(digits(row["cudnn"]["ms"]) for row in rows)),
        ("select + attention, ms (fp8)", *both(
            lambda row: tuple(at(row, KEEP)[whole]["ms"] for whole in ("whole", "whole_fp8")))),
        ("times cuDNN (fp8)", *both(gains)),
    ]  # fmt: skip
    assert set(LOOP_ORDERS) == {"auto", "union", "kv_outer"}
    return f"{table(('', *(tokens(row['n']) for row in rows)), lines)}\n\n{age(name)}"


def million(name: str = "prefill") -> str:
    """A million tokens in chunks, against dense attention."""
    found = read(name)["million"]
    chunks, whole = found["chunks"], found["whole_keep_0.95"]
    dense = million_dense(found)
    fine, coarse = (whole[kind]["ms"] for kind in ("bf16", "fp8_e4m3"))
    behind = [chunk for chunk in chunks if chunk["prefix"]]
    rates = [
        span((chunk["select"][kind]["tflops"] for chunk in behind), lambda x: f"{x:.0f}")
        for kind in ("bf16", "fp8_e4m3")
    ]
    memory = max(stage["extra_gib"] for chunk in chunks for stage in chunk["attention"])
    share = over_million(found, lambda chunk: chunk["select"]["bf16"]["ms"]) / fine
    return (
        f"A million tokens in 64 chunks of {tokens(CHUNK)} queries take {fine / 1e3:.2f} s at ρ = "
        f"{KEEP:g}, and {coarse / 1e3:.2f} s with fp8 index operands. Dense attention was timed on "
        f"{len(chunks)} of these chunks ({span(chunk['cudnn']['ms'] for chunk in chunks)} ms). By "
        f"linear interpolation all chunks take {dense / 1e3:.1f} s, so MSA is {dense / fine:.0f} "
        f"times as fast (fp8 {dense / coarse:.0f}). Selection takes {share:.0%} of the time; behind "
        f"the first chunk it runs at {rates[0]} TFLOP/s (fp8 {rates[1]}). In addition to inputs and "
        f"outputs {memory:.1f} GiB are needed."
    )


def production(name: str = "prefill") -> str:
    """The production shapes: the mean by calls, and the smallest chunk."""
    found = read(name)["production"]
    cases = found["cases"]
    least = min(cases, key=lambda row: row["ms"])
    words = (
        f"The production shapes ({len(cases)} shapes of batch 1, weighted by their numbers of "
        f"calls) take {found['weighted_ms']:.2f} ms per layer"
    )
    if "weighted_fp8_ms" in found:
        words += f", and {found['weighted_fp8_ms']:.2f} ms with fp8 index operands"
    if "weighted_cudnn_ms" in found:
        words += f"; cuDNN takes {found['weighted_cudnn_ms']:.1f} ms"
    return (
        f"{words}. The quickest one, {least['n_q']} queries of {least['n_k']:,} keys, takes "
        f"{least['ms']:.3f} ms."
    )


def eight_bits(name: str = "prefill") -> str:
    """What an index in 8 bits changes."""
    found = [row["select"] for row in read(name)["lengths"]]
    same = span((row["fp8_same_blocks"] for row in found), lambda x: f"{100 * x:.0f}")
    lost = span((row["fp8_score_lost"] for row in found), lambda x: f"{100 * x:.2f}")
    return (
        f"fp8 index operands find {same} % of the blocks that bfloat16 finds, and lose {lost} % of "
        "the score."
    )


def selection(name: str = "prefill") -> str:
    """Milliseconds of a selection by both kinds of kernels; a dash where one was not measured."""
    found = read(name)
    places = [(f"{row['n']:,}", row["select"]) for row in found["lengths"]]
    places += [
        (f"{CHUNK:,} behind {chunk['prefix']:,}", chunk["select"])
        for chunk in found["million"]["chunks"] if chunk["prefix"]
    ]  # fmt: skip
    lines: list[tuple[Any, ...]] = []
    for words, row in places:
        hopper = row.get("kernels", "portable") == "hopper"
        cells = [
            digits(row[f"{prefix}{kind}"]["ms"]) if here else "–"
            for kind in ("bf16", "fp8_e4m3")
            for prefix, here in (("portable_" if hopper else "", True), ("", hopper))
        ]
        lines.append((words, *cells))
    columns = ("queries", "portable", "hopper", "portable, fp8 index", "hopper, fp8 index")
    return f"{table(columns, lines)}\n\n{age(name)}"


def topk(name: str = "prefill") -> str:
    """One sentence: the stand-alone top-k of the first shape against torch's."""
    row = read(name)["topk"][0]
    words = (
        f"on an {device(name)}, torch.topk needs {digits(row['torch']['ms'])} ms for "
        f"{tokens(row['rows'])} rows of {row['blocks']:,} scores, and this project's portable "
        f"kernel {digits(row['ours']['ms'])} ms"
    )
    return words + (f", its hopper kernel {digits(row['hopper']['ms'])} ms." if "hopper" in row
                    else ".")  # fmt: skip


def reverse_index(name: str = "prefill") -> str:
    """One sentence: the time of the reverse index."""
    times = [
        f"{span((1e3 * s['reverse_index']['ms'] for s in row['attention']), lambda x: f'{x:.0f}')}"
        f" µs for {tokens(row['n'])}" for row in prompts(name)
    ]  # fmt: skip
    return f"on an {device(name)}, {', '.join(times)} queries."


# -- training -------------------------------------------------------------------------------------
def sparse(row: Row, keep: float) -> Row:
    """The step that was measured with ρ = `keep`."""
    return next(found for found in row["sparse"] if found["keep"] == keep)


def training(name: str = "train") -> str:
    """A training step and its stages, against dense attention."""
    rows = read(name)["steps"]
    others = sorted((keep for keep in PERSISTENCE if keep != KEEP), reverse=True)
    label = "; ".join(f"ρ = {keep:g}" for keep in others)

    def stage(*names: str) -> list[str]:
        steps = (sparse(row, KEEP)["stages"] for row in rows)
        return [", ".join(digits(found[n]["ms"]) for n in names) for found in steps]

    def rated(name: str) -> list[str]:
        steps = (sparse(row, KEEP)["stages"][name] for row in rows)
        return [f"{digits(found['ms'])} ({found['tflops']:.0f})" for found in steps]

    def gain(row: Row, keep: float) -> str:
        return digits(row["dense"]["ms"] / sparse(row, keep)["step"]["ms"])

    lines = [
        ("dense step, ms", *(digits(row["dense"]["ms"]) for row in rows)),
        ("MSA step, ms", *(digits(sparse(row, KEEP)["step"]["ms"]) for row in rows)),
        (f"times dense ({label})", *(
            f"{gain(row, KEEP)} ({'; '.join(gain(row, keep) for keep in others)})" for row in rows)),
        ("select, forward, ms", *stage("select", "forward")),
        ("alignment loss with its gradient, ms", *stage("align")),
        ("dQ, ms (useful TFLOP/s)", *rated("queries")),
        ("dK and dV, ms (useful TFLOP/s)", *rated("keys")),
        ("extra memory at the peak, GiB (dense)", *(
            f"{sparse(row, KEEP)['extra_gib']:.1f} ({row['dense_extra_gib']:.1f})" for row in rows)),
    ]  # fmt: skip
    return f"{table((f'ρ = {KEEP:g}', *(tokens(row['n']) for row in rows)), lines)}\n\n{age(name)}"


def warm_up(name: str = "train") -> str:
    """The warm-up form: dense attention with the loss over all visible tokens."""
    row = read(name)["warm_up"]
    dense, both, align, without = (
        row[part]["ms"] for part in ("dense", "both", "align", "align_without_lse")
    )
    return (
        f"The warm-up form at {tokens(row['n'])} is dense attention by cuDNN with the loss over all "
        f"visible tokens. It takes {digits(both)} ms, {both / dense:.2f} times as long as the dense "
        "step. If the lse of the dense attention is not given and has to be computed, the loss takes "
        f"{digits(without)} ms instead of {digits(align)}."
    )


def loss(name: str = "train") -> str:
    """One sentence: what the alignment loss takes of a training step."""
    row = next(row for row in read(name)["steps"] if row["n"] == 32768)
    step = sparse(row, KEEP)
    return (
        f"On an {device(name)}, the loss with its gradient takes "
        f"{digits(step['stages']['align']['ms'])} of the {digits(step['step']['ms'])} ms of a "
        f"training step at {tokens(row['n'])} tokens."
    )


# -- decoding -------------------------------------------------------------------------------------
def decoding(name: str = "decode") -> str:
    """A decode step in each form, its scores alone, and dense attention, in microseconds."""
    rows = read(name)["steps"]

    def us(row: Row, form: str, part: str) -> float:
        return row[form][part]["us"]

    def cells(measure: Callable[[Row], str]) -> list[str]:
        return [measure(row) for row in rows]

    def gain(row: Row, form: str) -> float:
        return best_dense(row) / us(row, form, "step")

    def short(value: float) -> str:
        return f"{value:.1f}"

    lines = [("dense", *cells(lambda row: digits(best_dense(row))))]
    lines += [
        (words, *cells(lambda row, form=form: pair(us(row, form, "step"), us(row, form, "layer"))))
        for form, words in FORMS.items()
    ]
    lines += [
        ("scores alone (8 bits)", *cells(
            lambda row: pair(us(row, "bf16", "scores"), us(row, "fp8 index", "scores")))),
        ("their TB/s (8 bits)", *cells(
            lambda row: pair(rate(row, "bf16"), rate(row, "fp8 index"), lambda x: f"{x:.2f}"))),
        ("times dense, step (8 bits)", *cells(
            lambda row: pair(gain(row, "bf16"), gain(row, "fp8 index"), short))),
    ]  # fmt: skip
    shapes = (f"{row['batch']} × {long(row['context'])}" for row in rows)
    return f"{table(('µs', *shapes), lines)}\n\n{age(name)}"


def long(n: int) -> str:
    """A length in units of 1,024, or of 1,024².

    >>> long(131072), long(2**20)
    ('128K', '1M')
    """
    return tokens(n) if n % 2**20 else f"{n // 2**20}M"


def rate(row: Row, form: str) -> float:
    """TB/s at which the scores read the index keys."""
    width = 1 if form == "fp8 index" else 2
    read_bytes = row["batch"] * row["context"] * DIM * width
    return read_bytes / row[form]["scores"]["us"] / 1e6


def quality(name: str = "decode") -> str:
    """What 8 bits lose, on normal tokens and on tokens with loud channels."""
    normal, loud = (read(name)["quality"][kind] for kind in ("normal", "loud channels"))
    index, other = normal["index"], loud["index"]
    return (
        f"Of the blocks, {index['block_recall']:.1%} are those of bfloat16, and "
        f"{1 - index['score_recall']:.2%} of the score is lost. If four channels are sixteen times "
        f"as large, as in trained keys, these are {other['block_recall']:.1%} and "
        f"{1 - other['score_recall']:.1%}. With random tokens, attention to another block gives a "
        f"very different output, so the outputs differ by {index['output_error']:.0%} "
        f"({other['output_error']:.0%}). If only keys and values are rounded, they differ by "
        f"{normal['kv']['output_error']:.1%} ({loud['kv']['output_error']:.0%})."
    )


# -- transformers ---------------------------------------------------------------------------------
def operators(name: str = "integrations") -> str:
    """Milliseconds of one call from Python, in four ways."""
    ways = ("function", "operator", "compiled", "captured")
    lines = [
        (row["name"], *(f"{row[way]['ms']:.2f}" for way in ways)) for row in read(name)["operators"]
    ]
    columns = ("", "`msa.` function", "`msa.ops` operator", "compiled", "CUDA graph")
    return f"{table(columns, lines)}\n\n{age(name)}"
