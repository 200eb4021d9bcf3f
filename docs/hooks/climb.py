"""The climb as a table: kernel, useful TFLOP/s, share of the ceiling, from the committed runs."""

from __future__ import annotations

from typing import Any

from docs.hooks.claims import hold
from docs.hooks.curves import table
from docs.hooks.measured import read, record
from docs.hooks.rungs import GRADIENTS, RESULTS, WALK

CHANGES = {
    "portable": ("the portable walk, in Triton", "two programs on a multiprocessor take turns"),
    "plain": ("Gluon, two consumers", "a warp copies; each consumer waits for its own products"),
    "three_consumers": ("three consumers, 64 keys a step", "longer unions: taken back"),
    "hopper": ("**two consumers, overlapped**", "the next scores run while the softmax is computed"),
    "steps_of_64": ("the same, 64 keys a step", "twice as many waits: taken back"),
}  # fmt: skip
"""For each version in the results of the walk: its name, and what changed or why it failed."""


def ceiling() -> float:
    """TFLOP/s of a plain product in bfloat16, on the GPU of both files."""
    found, walked = read(RESULTS), read(WALK)
    hold("the climb and its ceiling come from one kind of GPU", found["device"] == walked["device"])
    return found["plain_products"]["bf16_tflops"]


def walk() -> str:
    """Attention over a selection at ρ = 0.95: useful TFLOP/s of each version."""
    top = ceiling()
    rows = {row["n"]: row for row in read(WALK)["walk"] if row["keep"] == 0.95}
    lines: list[tuple[Any, ...]] = []
    for version, (name, change) in CHANGES.items():
        cells: list[str] = []
        for n in sorted(rows):
            rate = rows[n][version]["useful_tflops"]
            cells += [f"{rate:.0f}", f"{rate / top:.0%}"]
        lines.append((name, *cells, change))
    lines.append(("a plain product", *[f"{top:.0f}", "100%"] * len(rows), "the ceiling"))
    heads = [x for n in sorted(rows) for x in (f"{n // 1024}K, useful TFLOP/s", "share")]
    return f"{table(('kernel', *heads, 'what changed'), lines)}\n\n{record(WALK)}"


def scan() -> str:
    """Selection at 128K tokens: TFLOP/s of the index branch by each version."""
    top = ceiling()
    row = next(r for r in read(RESULTS)["select"] if r["shape"] == "128K" and r["index"] == "bf16")
    operations = 4 * 128 * row["n_q"] ** 2  # one product for each visible pair and group
    names = {
        "portable": ("the portable scan, in Triton", "products and maxima by turns"),
        "first_version": ("Gluon: scores, then the best of them", "one consumer's maxima while the other multiplies"),
        "hopper": ("**the same with a new top-k**", "piece maxima come from the score kernel; a row is one thread"),
    }  # fmt: skip
    lines = []
    for version, (name, change) in names.items():
        rate = operations / row[version]["ms"] / 1e9
        lines.append(
            (name, f"{row[version]['ms']:.3g}", f"{rate:.0f}", f"{rate / top:.0%}", change)
        )
    columns = ("kernel", "128K, ms", "useful TFLOP/s", "share", "what changed")
    return f"{table(columns, lines)}\n\n{record(RESULTS)}"


PREDICTED = (("128K", 0.95), ("16K of 1M", 0.95), ("171 of 55K", 0.95))
"""Of the score kernel: shapes, and the predicted share of a plain product, for all shapes one."""
TOPK = ((65536, 8192, 0.9), (131072, 1024, 0.30), (524288, 4096, 4.0))
"""Of the first top-k: rows, scores of each, and the predicted milliseconds."""


def predictions() -> str:
    """What was predicted before the first version of the selection ran, and what was measured."""
    found = read(RESULTS)
    shares = {
        r["shape"]: r["share"] for r in found["scores"] if r["index"] == "bf16" and r["maxima"]
    }
    lines = [
        (f"scores of {shape}, share of a plain product", f"{guess:.2f}", f"{shares[shape]:.2f}",
         verdict(shares[shape] / guess))
        for shape, guess in PREDICTED
    ]  # fmt: skip
    times = {
        (r["rows"], r["blocks"]): r["first_version"]["ms"] for r in found["topk"] if "first_version" in r
    }  # fmt: skip
    lines += [
        (f"top-k of {rows:,} × {blocks:,} scores, ms", f"{guess:g}", f"{times[rows, blocks]:.2f}",
         verdict(guess / times[rows, blocks]))
        for rows, blocks, guess in TOPK
    ]  # fmt: skip
    return table(("", "predicted", "measured", "looked back"), lines)


def verdict(ratio: float) -> str:
    """How much better or worse than predicted.

    >>> verdict(1.02), verdict(0.5), verdict(1.4)
    ('right', '50% of what was hoped for', '40% better')
    """
    if abs(ratio - 1) <= 0.1:
        return "right"
    return f"{ratio - 1:.0%} better" if ratio > 1 else f"{ratio:.0%} of what was hoped for"


def gradients() -> str:
    """The gradients at 32K tokens and ρ = 0.95: useful TFLOP/s of both kinds of kernels."""
    found = read(GRADIENTS)
    top = ceiling()
    hold("gradients and their ceiling come from one kind of GPU",
         found["device"] == read(RESULTS)["device"])  # fmt: skip
    lines = []
    for part, words in (("keys", "dK and dV"), ("queries", "dQ")):
        (row,) = (r for r in found[part] if (r["n"], r["keep"]) == (32768, 0.95))
        for version, name in (("portable", "in Triton"), ("hopper", "**in Gluon**")):
            rate = row[version]["tflops"]
            lines.append((f"{words}, {name}", f"{row[version]['ms']:.3g}", f"{rate:.0f}",
                          f"{rate / top:.0%}"))  # fmt: skip
    columns = ("kernel", "32K, ms", "useful TFLOP/s", "share")
    return f"{table(columns, lines)}\n\n{record(GRADIENTS)}"


def without() -> dict[str, float]:
    """Useful TFLOP/s of the overlapped walk at 16K, whole and with a part left out."""
    found = read(WALK)
    (row,) = (r for r in found["walk"] if (r["n"], r["keep"]) == (16384, 0.95))
    left_out = {
        p["without"]: p["useful_tflops"] for p in found["probes"]
        if (p["n"], p["keep"], p["version"]) == (16384, 0.95, "hopper")
    }  # fmt: skip
    return {"whole": row["hopper"]["useful_tflops"], **left_out}
