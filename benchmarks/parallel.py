"""`msa bench parallel` times context parallel attention on the GPUs that torchrun gives it.

    torchrun --nproc-per-node 2 -m msa.cli bench parallel

The same without tyro: torchrun --nproc-per-node 2 -m benchmarks.parallel [--out results.json]
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any, Literal, get_args

from rich.console import Console

from benchmarks import report

Part = Literal["prefill", "steps"]


@dataclass(frozen=True)
class ParallelOptions(report.Options):
    """Check, then time one layer on several GPUs against the same layer on one of them.

    Start it with torchrun. Every GPU gets a process, and the first one writes and prints.
    """

    parts: tuple[Part, ...] = get_args(Part)
    """What to measure: attention over 128K, 512K and 1M tokens; a training step of 128K tokens."""


def run(options: ParallelOptions) -> int:
    """Measure, write, print the table. Exit codes: 2 without a GPU, 1 for wrong results."""
    import torch.distributed as dist

    if not report.has_device("msa bench parallel"):
        return 2
    if not dist.is_torchelastic_launched():
        print(
            "msa bench parallel needs several processes: start it with torchrun "
            "--nproc-per-node GPUS -m msa.cli bench parallel",
            file=sys.stderr,
        )
        return 2
    import torch

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    try:
        first = dist.get_rank() == 0
        return report.measure(
            "parallel", options, "benchmarks.parallel_stages", show, write_to=first
        )[0]  # fmt: skip
    finally:
        dist.destroy_process_group()


def show(found: dict[str, Any], console: Console | None = None) -> None:
    """Print the results as a table."""
    console = console or Console()
    ranks = {row["ranks"] for part in ("prefill", "steps") for row in found.get(part, ())}
    made = report.table(
        f"One layer on {'/'.join(map(str, ranks))} GPUs, ms", "tokens", "what", "one GPU",
        "together", "times", "gather", "GiB got", "GiB one", "GiB each",
    )  # fmt: skip
    for part, name in (("prefill", "attention"), ("steps", "training step")):
        for row in found.get(part, ()):
            made.add_row(
                f"{row['n'] // 1024}K", name, f"{row['one']['ms']:.1f}",
                f"{row['together']['ms']:.1f}", f"{row['one']['ms'] / row['together']['ms']:.2f}",
                f"{row['gather']['ms']:.2f}", f"{row['received'] / 2**30:.2f}",
                f"{row['one_gib']:.1f}", f"{row['each_gib']:.1f}",
            )  # fmt: skip
    console.print(made)


if __name__ == "__main__":
    sys.exit(report.main(ParallelOptions, run))
