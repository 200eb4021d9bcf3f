"""Where prefill stands: tables and sentences from results.

Each function takes the name of a results file: "prefill" is the committed one, "history/prefill_h100"
an older one. No number is written by hand, so a new run changes every page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.cases import CHUNK, PERSISTENCE
from benchmarks.prefill_table import tokens
from benchmarks.reading import at, million_dense, over_million
from docs.hooks.curves import table
from docs.hooks.measured import age, device, read

Row = dict[str, Any]
KEEP = 0.95


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


def useful(stage: Row, order: str) -> float:
    """TFLOP/s of a loop order at one ρ, counting the selected blocks alone."""
    return stage["gflop"] / stage[order]["ms"]


def prefill(name: str = "prefill") -> str:
    """The stages of whole prompts, and the whole against cuDNN."""
    rows = prompts(name)

    def rates(order: str) -> list[str]:
        return [
            " / ".join(f"{useful(at(row, keep), order):.0f}" for keep in PERSISTENCE)
            for row in rows
        ]

    def both(measure: Callable[[Row], tuple[float, float]]) -> list[str]:
        return [pair(*measure(row)) for row in rows]

    keeps = " / ".join(f"{keep:g}" for keep in PERSISTENCE)
    orders = [f"attention, useful TFLOP/s, `auto`, ρ = {keeps}"]
    orders += [f"the same, `{order}`" for order in ("union", "kv_outer")]
    names = ["auto", "union", "kv_outer"]
    if all("portable_union" in at(row, keep) for row in rows for keep in PERSISTENCE):
        orders += [f"`{order}` by the portable kernels" for order in ("auto", "union")]
        names += ["portable_auto", "portable_union"]
    lines = [
        ("select, TFLOP/s (fp8)", *both(
            lambda row: tuple(row["select"][kind]["tflops"] for kind in ("bf16", "fp8_e4m3")))),
        *((words, *rates(order)) for words, order in zip(orders, names)),
        ("dense, cuDNN, ms", *(digits(row["cudnn"]["ms"]) for row in rows)),
        ("select + attention, ms (fp8)", *both(
            lambda row: tuple(at(row, KEEP)[whole]["ms"] for whole in ("whole", "whole_fp8")))),
        ("times cuDNN (fp8)", *both(gains)),
    ]  # fmt: skip
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


def times_of(part: str, name: str = "prefill") -> str:
    """One sentence: the time of the reverse index or of the schedule, over all ρ."""
    times = [
        f"{span((1e3 * s[part]['ms'] for s in row['attention']), lambda x: f'{x:.0f}')}"
        f" µs for {tokens(row['n'])}" for row in prompts(name)
    ]  # fmt: skip
    return f"on an {device(name)}, {', '.join(times)} queries."
