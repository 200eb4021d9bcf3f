"""From which length on is MSA faster than dense attention on a CPU?

MSA is first compared with the reference on a small problem, and with PyTorch's causal attention
when every block is kept (R11). Then both are timed in turn, so that other load slows both.

    python -m benchmarks.crossing --repeats 7
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from msa import reference, torch_impl
from msa.ablations.run import cpu_name
from msa.config import MSAConfig
from msa.ir import Sequences

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Crossing:
    """Time dense attention and MSA on this CPU, and find the length from which MSA is faster."""

    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768)
    q_heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    index_dim: int = 64
    block_size: int = 64
    top_k: int = 8
    repeats: int = 5
    threads: int = 0
    """Threads of PyTorch; 0 keeps its default."""
    out: Path = Path("benchmarks/results/crossing_cpu.json")

    @property
    def config(self) -> MSAConfig:
        """The configuration of MSA."""
        return MSAConfig(block_size=self.block_size, top_k=self.top_k)

    def inputs(self, length: int) -> Inputs:
        """q, k, v, q_idx, k_idx of one sequence, float32, the same at every call."""
        generator = torch.Generator().manual_seed(length)

        def normal(*shape: int) -> Tensor:
            return torch.randn(length, *shape, generator=generator)

        return (
            normal(self.q_heads, self.head_dim),
            normal(self.kv_heads, self.head_dim),
            normal(self.kv_heads, self.head_dim),
            normal(self.kv_heads, self.index_dim),
            normal(self.index_dim),
        )


@dataclass(frozen=True)
class Timing:
    """Seconds of one function at one length."""

    median: float
    fastest: float
    slowest: float

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """The median and both ends of the spread."""
        return cls(statistics.median(seconds), min(seconds), max(seconds))


def dense_attention(inputs: Inputs) -> Callable[[], Tensor]:
    """PyTorch's causal attention on the layout [1, H, T, D], which is made beforehand."""
    q, k, v = (x.transpose(0, 1)[None].contiguous() for x in inputs[:3])
    return lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def sparse_attention(inputs: Inputs, config: MSAConfig) -> Callable[[], Tensor]:
    """All of MSA: scoring, selection, attention."""
    sequences = Sequences.one(len(inputs[0]), len(inputs[0]))
    return lambda: torch_impl.attend(*inputs, sequences, config).out


def check(case: Crossing) -> dict[str, float]:
    """The largest error against the reference, and against dense attention with all blocks kept."""
    small = 5 * case.block_size + 3
    inputs, sequences = case.inputs(small), Sequences.one(small, small)
    config = MSAConfig(block_size=case.block_size, top_k=2)
    ours = torch_impl.attend(*inputs, sequences, config)
    q, k, v, q_idx, k_idx = (x.numpy() for x in inputs)
    spec = reference.attend(q, k, v, q_idx, k_idx, sequences, config)
    assert ours.selection is not None and spec.selection is not None
    np.testing.assert_array_equal(ours.selection.indices.numpy(), spec.selection.indices)
    everything = sparse_attention(inputs, MSAConfig(block_size=case.block_size, top_k=6))()
    dense = dense_attention(inputs)()[0].transpose(0, 1)
    errors = {
        "reference": float(np.abs(ours.out.numpy() - spec.out).max()),
        "dense limit (R11)": float((everything - dense).abs().max()),
    }
    for name, error in errors.items():
        if not error < 1e-5:
            raise AssertionError(f"MSA is off by {error} against: {name}")
    return errors


def time_in_turn(functions: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, Timing]:
    """One round to warm up, then `repeats` rounds, every other one in the opposite order."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for turn in range(repeats + 1):
        for name in names if turn % 2 else names[::-1]:
            start = time.perf_counter()
            functions[name]()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing.of(values) for name, values in seconds.items()}


def crossing_length(rows: dict[int, dict[str, Timing]]) -> float | None:
    """Find where the two curves meet, interpolated on a log-log scale between two lengths.

    >>> def row(dense, sparse):
    ...     return {"dense": Timing(dense, 0, 0), "msa": Timing(sparse, 0, 0)}
    >>> crossing_length({1000: row(1, 2), 2000: row(4, 4), 4000: row(16, 8)})
    2000.0
    """
    gaps = {n: np.log(row["msa"].median / row["dense"].median) for n, row in rows.items()}
    lengths = sorted(gaps)
    lasting = [n for i, n in enumerate(lengths) if all(gaps[m] <= 0 for m in lengths[i:])]
    if not lasting:
        return None
    after, before = lasting[0], [n for n in lengths if n < lasting[0]][-1:]
    if not before:
        return float(after)
    share = gaps[before[0]] / (gaps[before[0]] - gaps[after])
    return round(before[0] * (after / before[0]) ** float(share), 6)


def show(rows: dict[int, dict[str, Timing]], crossing: float | None) -> None:
    """Print the table and a summary of one line."""
    table = Table(title="seconds, median (fastest - slowest)")
    for title in ("tokens", "dense SDPA", "MSA", "dense / MSA"):
        table.add_column(title, justify="right")
    for length, row in rows.items():
        cells = [
            f"{t.median:.3f} ({t.fastest:.3f} - {t.slowest:.3f})"
            for t in (row["dense"], row["msa"])
        ]
        table.add_row(str(length), *cells, f"{row['dense'].median / row['msa'].median:.2f}")
    console = Console()
    console.print(table)
    where = f"about {crossing:.0f} tokens" if crossing else "beyond the lengths measured"
    console.print(f"MSA overtakes dense attention at {where}")


def main(case: Crossing) -> None:
    """Check, measure, show, write."""
    if case.threads:
        torch.set_num_threads(case.threads)
    errors = check(case)
    rows = {}
    with torch.inference_mode():
        for length in case.lengths:
            inputs = case.inputs(length)
            functions = {
                "dense": dense_attention(inputs),
                "msa": sparse_attention(inputs, case.config),
            }
            rows[length] = time_in_turn(functions, case.repeats)
    crossing = crossing_length(rows)
    show(rows, crossing)
    record = {
        "device": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "case": asdict(case) | {"out": case.out.name, "dtype": "float32"},
        "largest_error": errors,
        "crossing_tokens": crossing,
        "seconds": {
            str(n): {name: asdict(t) for name, t in row.items()} for n, row in rows.items()
        },
    }
    case.out.parent.mkdir(parents=True, exist_ok=True)
    case.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Crossing))
