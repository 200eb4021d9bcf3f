"""Functions that find and read results files, for tables and figures. They need no GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases import CHUNK, MILLION

Found = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
"""The committed results: one file of each benchmark. Those of other GPUs are in its `history`."""


def committed(benchmark: str, folder: Path = RESULTS) -> Path:
    """Return the path of the committed results of a benchmark, whatever the device.

    Raises:
        LookupError: if there is not exactly one such file.

    >>> committed("crossing").name
    'crossing_cpu.json'
    """
    found = sorted(path.name for path in folder.glob(f"{benchmark}_*.json"))
    if len(found) != 1:
        raise LookupError(
            f"{folder} must hold one file of {benchmark}, got {found}: python -m docs.hooks.adopt "
            "puts new results in the place of older ones"
        )
    return folder / found[0]


def device(found: Found) -> str:
    """Return the short name of the device of some results.

    >>> device({"device": "NVIDIA H100 80GB HBM3"}), device({"device": "NVIDIA A100-SXM4-80GB"})
    ('H100', 'A100')
    """
    return found["device"].removeprefix("NVIDIA ").replace("-", " ").split()[0]


def ms(row: Found, name: str) -> float:
    """Return the median milliseconds of a stage; NaN if it was not measured.

    >>> ms({"cudnn": {"ms": 2.0}, "fa4": "not installed"}, "cudnn")
    2.0
    >>> ms({"cudnn": {"ms": 2.0}, "fa4": "not installed"}, "fa4")
    nan
    """
    found = row.get(name)
    return found["ms"] if isinstance(found, dict) else math.nan


def best_dense(row: Found) -> float:
    """Return the microseconds of the faster dense decode step.

    >>> best_dense({"dense": {"cudnn": "RuntimeError: no", "flash": {"us": 109.0}}})
    109.0
    """
    return min(found["us"] for found in row["dense"].values() if isinstance(found, dict))


def at(row: Found, keep: float) -> Found:
    """Return the attention stage that was measured with ρ = `keep`."""
    return next(stage for stage in row["attention"] if stage["keep"] == keep)


def reasons(rows: list[Found]) -> list[str]:
    """List why baselines have no time: the sentences that stand in place of a stage, each once."""
    said = {
        f"{name}: {value}": None for row in rows for name, value in row.items()
        if name in ("cudnn", "flash", "fa4") and isinstance(value, str)
    }  # fmt: skip
    return list(said)


def over_million(million: Found, measure: Callable[[Found], float]) -> float:
    """Sum a measure over all chunks of a million tokens. Some chunks were measured; the others are
    interpolated linearly, by the number of keys before them.

    >>> chunks = [{"prefix": p * CHUNK, "ms": 1.0 + p} for p in (0, 63)]
    >>> over_million({"chunks": chunks}, lambda chunk: chunk["ms"])
    2080.0
    """
    chunks = million["chunks"]
    known = [chunk["prefix"] for chunk in chunks]
    every = np.arange(0, MILLION, CHUNK)
    return float(np.interp(every, known, [measure(chunk) for chunk in chunks]).sum())


def million_dense(million: Found) -> float:
    """Return the milliseconds of dense attention by cuDNN over a million tokens, interpolated."""
    return over_million(million, lambda chunk: ms(chunk, "cudnn"))


def million_sparse(million: Found, keep: float) -> float:
    """Return the milliseconds of selection and attention over a million tokens, interpolated."""
    return over_million(
        million, lambda chunk: ms(chunk["select"], "bf16") + at(chunk, keep)["ms"]
    )  # fmt: skip
