"""The tables that `msa bench prefill` prints."""

from __future__ import annotations

import math

from rich.console import Console
from rich.table import Table

from benchmarks.reading import Found, at, million_dense, ms, reasons
from benchmarks.report import table

LOOP_ORDERS = ("auto", "kv_outer", "union")


def number(value: float, unit: str = "") -> str:
    """Format a time or ratio with three digits; a dash if it was not measured.

    >>> [number(x) for x in (0.1204, 29.44, 491.7, 1246.8, float("nan"))]
    ['0.12', '29.4', '492', '1,247', '–']
    """
    if math.isnan(value):
        return "–"
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{digits}f}{unit}"


def tokens(n: int) -> str:
    """Format a length in units of 1,024.

    >>> tokens(131072)
    '128K'
    """
    return f"{n / 1024:.0f}K"


def share(row: Found, name: str) -> str:
    """Format a share as a percentage; a dash if it was not measured."""
    return f"{row[name]:.1%}" if name in row else "–"


def dense_and_select(rows: list[Found]) -> Table:
    """Make the table of dense attention and of the index branch."""
    kernels = rows[0]["select"].get("kernels", "portable")
    beside = () if kernels == "portable" else ("portable_bf16", "portable_fp8_e4m3")
    made = table(
        f"Whole prompts: dense attention and the selection ({kernels} kernels), ms", "tokens",
        "cuDNN", "flash", "FA-4", "select", "TFLOP/s", "fp8", "TFLOP/s", "same blocks",
        "score lost", *(("portable", "fp8") if beside else ()),
    )  # fmt: skip
    for row in rows:
        select = row["select"]
        made.add_row(
            tokens(row["n"]),
            *(number(ms(row, name)) for name in ("cudnn", "flash", "fa4")),
            *(
                cell
                for kind in ("bf16", "fp8_e4m3")
                for cell in (number(ms(select, kind)), f"{select[kind]['tflops']:.0f}")
            ),
            share(select, "fp8_same_blocks"),
            share(select, "fp8_score_lost"),
            *(number(ms(select, name)) for name in beside),
        )
    made.caption = "; ".join(reasons(rows)) or None
    return made


def attention(rows: list[Found]) -> Table:
    """Make the table of the attention stage in each loop order, and of all of MSA against cuDNN."""
    made = table(
        "Attention over the selection (useful TFLOP/s), and the whole against cuDNN (ms)",
        "tokens", "ρ", "union of 4", *LOOP_ORDERS, "largest error", "whole", "× cuDNN", "fp8",
        "× cuDNN",
    )  # fmt: skip
    for row in rows:
        for stage in row["attention"]:
            wholes = [ms(stage, name) for name in ("whole", "whole_fp8")]
            made.add_row(
                tokens(row["n"]),
                f"{stage['keep']:g}",
                f"{stage['mean_union_of_4']:.1f}",
                *(f"{stage[order]['tflops']:.0f}" for order in LOOP_ORDERS),
                f"{max(stage[f'{order}_error'] for order in LOOP_ORDERS):.4f}",
                *(x for w in wholes for x in (number(w), number(ms(row, "cudnn") / w, "×"))),
            )
        made.add_section()
    made.caption = "ρ: the chance that a query keeps each remote block of its predecessor"
    return made


def million(found: Found) -> Table:
    """Make the table of chunks of a million tokens, and of all of them together."""
    chunks = found["chunks"]
    keeps = [stage["keep"] for stage in chunks[0]["attention"]]
    made = table(
        "A million tokens in chunks of 16K, ms", "tokens before", "cuDNN", "FA-4", "select", "fp8",
        *(f"attention\nρ = {keep:g}" for keep in keeps), "extra GiB",
    )  # fmt: skip
    for chunk in chunks:
        stages = [at(chunk, keep) for keep in keeps]
        made.add_row(
            tokens(chunk["prefix"]),
            *(number(ms(chunk, name)) for name in ("cudnn", "fa4")),
            *(number(ms(chunk["select"], kind)) for kind in ("bf16", "fp8_e4m3")),
            *(number(stage["ms"]) for stage in stages),
            f"{max(stage['extra_gib'] for stage in stages):.1f}",
        )
    dense, whole = million_dense(found), found["whole_keep_0.95"]
    fine, coarse = (ms(whole, kind) for kind in ("bf16", "fp8_e4m3"))
    made.caption = (
        f"all 64 chunks, ρ = 0.95: {fine / 1e3:.2f} s, fp8 {coarse / 1e3:.2f} s; dense by "
        f"interpolation {dense / 1e3:.1f} s, {dense / fine:.0f}× and {dense / coarse:.0f}×"
    )
    return made


def production(found: Found) -> Table:
    """Make the table of shapes seen in production, one layer each."""
    made = table(
        "Production shapes, select + attention, ms", "queries", "keys", "calls", "ms", "least",
        "most", "fp8 index", "8 bits", "select", "cuDNN",
    )  # fmt: skip
    for row in [*found["cases"], *found["ragged"]]:
        n_q, n_k = (
            " + ".join(f"{n:,}" for n in (x if isinstance(x, (list, tuple)) else [x]))
            for x in (row["n_q"], row["n_k"])
        )
        times = (f"{row[name]:.3f}" for name in ("ms", "min", "max"))
        beside = (number(ms(row, name)) for name in ("fp8", "eight", "select", "cudnn"))
        made.add_row(n_q, n_k, str(row.get("calls", "–")), *times, *beside)
    means = (
        f"{words}{found[f'weighted_{name}']:.3f} ms"
        for words, name in (
            ("", "ms"),
            ("fp8 index ", "fp8_ms"),
            ("all 8 bits ", "eight_ms"),
            ("cuDNN ", "cudnn_ms"),
        )
        if f"weighted_{name}" in found
    )
    made.caption = f"weighted by calls: {', '.join(means)}"
    changed = [row["eight"]["rounding"] for row in found["cases"] if "eight" in row]
    if changed:
        made.caption += f"; rounding k and v to 8 bits changes outputs by up to {max(changed):.1%}"
    return made


def topk(rows: list[Found]) -> Table:
    """Make the table of the stand-alone top-k and torch.topk."""
    hopper = any("hopper" in row for row in rows)
    made = table(
        "Stand-alone top-k, ms", "rows", "blocks", "k", "torch.topk", "portable", "faster by",
        *(("hopper", "faster by") if hopper else ()),
    )  # fmt: skip
    for row in rows:
        theirs, times = ms(row, "torch"), [ms(row, "ours")] + [ms(row, "hopper")] * hopper
        sizes = (f"{row[name]:,}" for name in ("rows", "blocks", "k"))
        cells = (cell for x in times for cell in (number(x), number(theirs / x, "×")))
        made.add_row(*sizes, number(theirs), *cells)
    if hopper:
        made.caption = "hopper: the maxima of pieces are there, as its score kernel writes them"
    return made


def show(found: Found, console: Console | None = None) -> None:
    """Every table for which the results have the part, at least 110 columns wide."""
    console = console or Console(width=max(110, Console().width))
    console.print(
        f"[bold]{found['device']}[/], torch {found['torch']}, triton {found['triton']}, "
        f"{found['date']}"
    )
    if "ceilings" in found:
        top = found["ceilings"]
        console.print(
            f"ceilings by torch: copy {top['copy_tbps']:.2f} TB/s, matrix product "
            f"{top['bf16_tflops']:.0f} TFLOP/s, in fp8 {top['fp8_tflops']:.0f}"
        )
    if "lengths" in found:
        console.print(dense_and_select(found["lengths"]), attention(found["lengths"]))
    for name, draw in (("million", million), ("production", production), ("topk", topk)):
        if name in found:
            console.print(draw(found[name]))
