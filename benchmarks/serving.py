"""`msa bench serving` checks and times a sparse layer of vLLM and SGLang with the plug-ins.

The same without tyro: python -m benchmarks.serving [--out results.json] [--parts checks mixed]
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from rich.console import Console

from benchmarks import engine_files, report

Part = Literal["checks", "prefill", "mixed", "decode", "sglang"]
NEEDS = {"sglang": "sglang"}
"""The engine whose files a part needs; the others need those of vLLM."""


@dataclass(frozen=True)
class ServingOptions(report.Options):
    """Compare vLLM's and SGLang's kernels with the plug-ins, on the same tensors, on this GPU.

    The engines are not installed: their files are read from their wheels.
    """

    parts: tuple[Part, ...] = get_args(Part)
    """What to measure: every kind of batch checked; production prefills, a chunk beside decodes,
    decodes, all in vLLM's files; SGLang's functions."""
    engines: Path | None = None
    """A folder with the engines' wheels; None is that of MSA_ENGINE_WHEELS."""


def run(options: ServingOptions) -> int:
    """Measure, write, print the tables. Exit codes: 2 without GPU or files, 1 for wrong results."""
    if not report.has_device("msa bench serving"):
        return 2
    for engine in sorted({NEEDS.get(part, "vllm") for part in options.parts}):
        why = engine_files.missing(engine, options.engines)
        if why is not None:
            print(f"msa bench serving: {why}", file=sys.stderr)
            return 2
    if options.engines is not None:
        os.environ[engine_files.VARIABLE] = str(options.engines)
    return report.measure("serving", options, "benchmarks.serving_stages", show)[0]


def show(found: dict[str, Any], console: Console | None = None) -> None:
    """Print the results as a table."""
    console = console or Console()
    made = report.table(
        "Indexer and attention of one layer, ms", "step", "engine's own", "plug-in", "times",
    )  # fmt: skip
    for name, row in rows_of(found):
        own = row.get("vllm") or row["sglang"]
        made.add_row(name, f"{own['ms']:.3f}", f"{row['msa']['ms']:.3f}", f"{row['times']:.2f}")
    console.print(made)
    for form, part in found.get("prefill", {}).items():
        console.print(
            f"prefill of production shapes, {form}: {part['by_calls']:.2f} times by calls"
        )


def rows_of(found: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Every race of the results, with a name."""
    rows = [
        (f"prefill {row['query_len']} of {row['kv_len']}, {form}", row)
        for form, part in found.get("prefill", {}).items() for row in part["shapes"]
    ]  # fmt: skip
    rows += [
        (f"8K chunk and 32 decodes, {form}", row) for form, row in found.get("mixed", {}).items()
    ]
    for form, part in found.get("decode", {}).items():
        rows += [(f"decode {name}, {form}", row) for name, row in part.items()]
    return rows + [(f"SGLang {name}", row) for name, row in found.get("sglang", {}).items()]


if __name__ == "__main__":
    sys.exit(report.main(ServingOptions, run))
