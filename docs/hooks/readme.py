"""The table of measurements in the README, and the links to figures, made from the results.

python -m docs.hooks.readme

README.md and docs/ladder.md are read on their own, too, so their text holds numbers and names of
figures. This writes both anew; a test fails when they are not those of the committed results.
"""

from __future__ import annotations

import re
from typing import Any

from benchmarks.cases import MILLION
from benchmarks.reading import at, best_dense, committed, million_dense
from docs.hooks.curves import table
from docs.hooks.measured import ROOT, device, read
from docs.hooks.standing import KEEP
from docs.hooks.standing_steps import long, sparse

Row = dict[str, Any]
COLUMNS = ("on", "dense attention by", "MSA overtakes it at", "and is faster by")
FIGURE = re.compile(r"\b(prefill|decode|integrations)_[a-z0-9]+((?:_roofline|_union)?\.svg)")
PAGES = ("README.md", "docs/ladder.md")


def overtakes(gains: dict[int, float]) -> str:
    """Where MSA overtakes dense attention: among the lengths that were measured.

    >>> overtakes({4096: 0.8, 8192: 1.4}), overtakes({8192: 1.03}), overtakes({8192: 0.9})
    ('4K to 8K tokens', 'below 8K tokens', 'more than 8K tokens')
    """
    slower = [n for n, gain in gains.items() if gain < 1]
    faster = [n for n, gain in gains.items() if gain >= 1 and n > max(slower, default=0)]
    if not faster:
        return f"more than {long(max(slower))} tokens"
    return f"{long(max(slower))} to {long(min(faster))} tokens" if slower else (
        f"below {long(min(faster))} tokens"
    )  # fmt: skip


def told(gains: dict[int, float], least: int = 8192) -> str:
    """The gains from a length on.

    >>> told({4096: 0.8, 8192: 1.39, 131072: 12.06})
    '1.4× at 8K, 12.1× at 128K'
    """
    return ", ".join(f"{gain:.1f}× at {long(n)}" for n, gain in gains.items() if n >= least)


def on_cpu() -> tuple[str, ...]:
    """A layer on a CPU."""
    found = read("crossing")
    gains = {
        int(n): row["dense"]["median"] / row["msa"]["median"] for n, row in found["seconds"].items()
    }
    return (
        "2 CPU cores, float32, 8/2 heads of 64, Bk 64, k 8, `torch`", "PyTorch SDPA",
        f"{found['crossing_tokens']:,.0f} tokens", told(gains),
    )  # fmt: skip


def of_prompts() -> tuple[str, ...]:
    """A layer on a GPU, by length; a million tokens against interpolated dense attention."""
    found = read("prefill")
    gains = {
        row["n"]: row["cudnn"]["ms"] / at(row, KEEP)["whole"]["ms"] for row in found["lengths"]
    }
    whole, dense = found["million"]["whole_keep_0.95"], million_dense(found["million"])
    fine, coarse = (dense / whole[kind]["ms"] for kind in ("bf16", "fp8_e4m3"))
    return (
        f"one {device('prefill')}, bf16, 64/4 heads of 128, Bk 128, k 16, `triton`, ρ = {KEEP:g}",
        "cuDNN", overtakes(gains),
        f"{told(gains)}, {fine:.0f}× at {long(MILLION)}, index in 8 bits {coarse:.0f}×",
    )  # fmt: skip


def of_training() -> tuple[str, ...]:
    """A training step."""
    gains = {
        row["n"]: row["dense"]["ms"] / sparse(row, KEEP)["step"]["ms"]
        for row in read("train")["steps"]
    }
    same = same_device("train")
    return (
        f"{same}, forward, alignment loss and all gradients", "cuDNN, forward and backward",
        overtakes(gains), told(gains),
    )  # fmt: skip


def of_decoding() -> tuple[str, ...]:
    """A decode step. The faster dense kernel is named; it has to be the same for all shapes."""
    rows = read("decode")["steps"]
    gain = {
        (row["batch"], row["context"], form): f"{best_dense(row) / row[form]['step']['us']:.1f}×"
        for row in rows for form in ("bf16", "fp8 index")
    }  # fmt: skip
    one, four = (gain[b, n, "bf16"] for b, n in ((1, 2**17), (4, MILLION)))
    names = {best_name(row["dense"]): None for row in rows}
    return (
        f"{same_device('decode')}, one new token over a paged cache, `msa.decode` in a CUDA graph",
        f"{' or '.join(names)}, one query", "",
        f"{one} at 128K, {gain[1, MILLION, 'bf16']} at 1M; {four} for four sequences of 1M, index "
        f"keys in 8 bits {gain[4, MILLION, 'fp8 index']}",
    )  # fmt: skip


def best_name(dense: Row) -> str:
    """The name of the faster dense kernel.

    >>> best_name({"cudnn": {"us": 1430.0}, "flash": {"us": 110.0}, "fa4": "not installed"})
    'flash'
    """
    times = {name: found["us"] for name, found in dense.items() if isinstance(found, dict)}
    return min(times, key=lambda name: times[name])


def of_transformers() -> tuple[str, ...]:
    """A model in transformers: gains at 8K, where the other ways end, and the longest pass."""
    ways = read("integrations")["lengths"]["ways"]
    eager, sdpa, ours = ({row["n"]: row for row in ways[w]} for w in ("eager", "sdpa", "enabled"))
    held = [n for n in eager if all("time" in way.get(n, {}) for way in (eager, sdpa, ours))]
    gains = {
        n: min(w[n]["time"]["ms"] for w in (eager, sdpa)) / ours[n]["time"]["ms"] for n in held
    }
    pair = "; ".join(f"{w[8192]['time']['ms'] / ours[8192]['time']['ms']:.1f}×"
                     for w in (eager, sdpa))  # fmt: skip
    ends = [long(n) for way in (eager, sdpa) for n, row in way.items() if "ends" in row]
    out = f"both run out of memory at {ends[0]}" if len(set(ends)) == 1 and len(ends) == 2 else (
        f"they run out of memory at {' and '.join(ends)}"
    )  # fmt: skip
    last = max(n for n, row in ours.items() if "time" in row)
    seconds, gib = ours[last]["time"]["ms"] / 1e3, ours[last]["gib"]
    where = "" if device("integrations") == device("prefill") else f"one {device('integrations')}, "
    return (
        f"{where}four layers of MiniMax-M3 in transformers, bf16, before and after `enable(model)`",
        "eager; sdpa", overtakes(gains),
        f"than eager and than sdpa {pair} at 8K; {out}, MSA takes {seconds:.2f} s and {gib:.1f} GiB "
        f"at {long(last)}",
    )  # fmt: skip


def same_device(benchmark: str) -> str:
    """The first words of a row whose device may be that of the prefill row above it."""
    here, above = device(benchmark), device("prefill")
    return "the same" if here == above else f"one {here}, the same shape"


def measured() -> str:
    """The table of the README."""
    return table(COLUMNS, [on_cpu(), of_prompts(), of_training(), of_decoding(), of_transformers()])


def renewed(text: str) -> str:
    """A page with the names of the committed figures, and with the table of this module if it has one."""
    text = FIGURE.sub(lambda found: f"{committed(found[1]).stem}{found[2]}", text)
    head = re.escape(table(COLUMNS, []).partition("\n")[0])
    return re.sub(rf"^{head}\n(?:\|.*\n)+", lambda _: f"{measured()}\n", text, flags=re.M)


def write() -> None:
    """Write the pages anew."""
    for page in PAGES:
        path = ROOT / page
        path.write_text(renewed(path.read_text()))


if __name__ == "__main__":
    write()
