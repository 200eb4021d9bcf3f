"""Where training and decoding stand: tables and sentences from results, as in standing.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.cases import DIM, PERSISTENCE
from benchmarks.prefill_table import tokens
from benchmarks.reading import best_dense
from docs.hooks.curves import table
from docs.hooks.measured import age, device, read
from docs.hooks.standing import KEEP, digits, pair

Row = dict[str, Any]
FORMS = {
    "bf16": "step (layer)",
    "fp8 index": "the same, index keys in 8 bits",
    "fp8 all": "the same, all in 8 bits",
}


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
