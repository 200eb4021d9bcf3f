"""Curves and tables of the chapters, from measured results and from runs on the page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from matplotlib import pyplot

from benchmarks.figures.decode import steps
from benchmarks.figures.style import BLUE, GREEN, INK, MUTED, STYLE
from docs.hooks.measured import age, inline, read, show


def learning_figure(history: list[tuple[int, float, float]], border: int) -> str:
    """KL and block recall against steps; the warm-up ends at `border`."""
    steps, losses, recalls = zip(*history)
    with pyplot.rc_context(STYLE | {"svg.fonttype": "none"}):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 2.6), layout="constrained")
        left.plot(steps, losses, color=BLUE)
        left.set_title("KL", loc="left", fontweight="bold", fontsize=10)
        right.plot(steps, recalls, color=GREEN)
        right.set_title("block recall", loc="left", fontweight="bold", fontsize=10)
        right.set_ylim(0, 1)
        for axis in (left, right):
            axis.axvline(border, color=MUTED, lw=0.8, ls=(0, (4, 3)))
            axis.set_xlabel("step")
        caption = "The figure shows the run above. The warm-up ends at the dashed line."
        return inline(figure, "learning", caption, "the loss falls and the recall rises")


def decode_figure() -> str:
    """Microseconds of one decoding step, dense and sparse, for each batch and context."""
    caption = "One new token per sequence. The dense time is that of the faster of two kernels."
    alt = "bars of three kinds for each cache size, the dense ones longest"
    return show("decode", steps, caption, alt)


def crossing_figure() -> str:
    """Seconds against tokens on a CPU."""
    found = read("crossing")
    lengths = [int(n) for n in found["seconds"]]
    with pyplot.rc_context(STYLE | {"svg.fonttype": "none"}):
        figure, axis = pyplot.subplots(figsize=(8, 3.2))
        for name, color, words in (("dense", INK, "dense, PyTorch SDPA"), ("msa", BLUE, "MSA")):
            times = [t[name]["median"] for t in found["seconds"].values()]
            axis.plot(lengths, times, "o-", color=color, label=words)
        axis.axvline(found["crossing_tokens"], color=MUTED, lw=0.8, ls=(0, (4, 3)))
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(lengths, [f"{n // 1024}K" for n in lengths])
        axis.set_xlabel("tokens")
        axis.set_title("Seconds of one layer on two CPU cores", loc="left", fontweight="bold")
        axis.legend(frameon=False)
        caption = f"From {found['crossing_tokens']:,.0f} tokens on, MSA is faster (dashed line)."
        alt = "two lines that cross, the sparse one flatter"
        return inline(figure, "crossing", caption, alt) + age("crossing")


def table(columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """A Markdown table."""
    lines = [columns, tuple("---" for _ in columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def findings_table(lines_of: Callable[[dict[str, Any]], list[tuple[str, ...]]]) -> str:
    """One of the tables of `msa findings`."""
    columns, *rows = lines_of(read("findings"))
    return f"{table(columns, rows)}\n"


def selection_table() -> str:
    """Selection by length, and the stand-alone top-k against torch's."""
    found = read("prefill")
    by_length = [
        (f"{row['n']:,}", f"{row['select']['bf16']['ms']:.3f}", f"{row['select']['bf16']['tflops']:.0f}",
         f"{row['select']['fp8_e4m3']['ms']:.3f}", f"{row['select']['fp8_e4m3']['tflops']:.0f}")
        for row in found["lengths"]
    ]  # fmt: skip
    topk = [
        (f"{t['rows']:,}", f"{t['blocks']:,}", t["k"], f"{t['torch']['ms']:.2f}", f"{t['ours']['ms']:.2f}")
        for t in found["topk"]
    ]  # fmt: skip
    scan = table(("tokens", "bf16, ms", "TFLOP/s", "fp8, ms", "TFLOP/s"), by_length)
    rows = table(("rows", "scores each", "k", "torch.topk, ms", "here, ms"), topk)
    return f"{scan}\n\nThis table shows the top-k alone, over scores that are in memory:\n\n{rows}\n\n{age('prefill')}"


def training_table() -> str:
    """A training step by length, against the dense one."""
    found = read("train")
    rows = [
        (f"{row['n']:,}", f"{row['dense']['ms']:.1f}", f"{sparse['step']['ms']:.1f}",
         f"{row['dense']['ms'] / sparse['step']['ms']:.1f}×", f"{sparse['keep']:g}")
        for row in found["steps"] for sparse in row["sparse"]
    ]  # fmt: skip
    columns = ("tokens", "dense step, ms", "MSA step, ms", "gain", "ρ")
    return f"{table(columns, rows)}\n\n{age('train')}"
