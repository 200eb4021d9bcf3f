"""Several processes that train one model, each on its own GPU: who is who, and how they add up.

    torchrun --nproc-per-node 4 -m msa.model.train --preset small --minutes 7 --out trained_small

Gradients are added up by hand and not by DistributedDataParallel: a step has two losses, means over
different things, two parts of the weights that are clipped each by itself, and the load of the
experts; after they are added up every process takes the same step.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from msa.model import checks


@dataclass(frozen=True)
class Ranks:
    """One process among those of a run. One alone has nobody to talk to.

    >>> ranks, x = Ranks(), torch.ones(2)
    >>> ranks.add([x])
    >>> x, ranks.first, ranks.any(True), ranks.most([3.0])
    (tensor([1., 1.]), True, True, [3.0])
    """

    rank: int = 0
    count: int = 1
    device: str = "cpu"

    @property
    def first(self) -> bool:
        """Whether this is the one that writes, tests and prints."""
        return self.rank == 0

    @torch.no_grad()
    def add(self, tensors: Sequence[Tensor]) -> None:
        """Make of each tensor the sum over all processes: a message of float32, one of integers."""
        if self.count == 1:
            return
        for dtype in (torch.float32, torch.int64):
            own = [x for x in tensors if x.is_floating_point() == dtype.is_floating_point]
            if own:
                flat = torch.cat([x.flatten().to(dtype) for x in own])
                dist.all_reduce(flat)
                for x, total in zip(own, flat.split([x.numel() for x in own])):
                    x.copy_(total.view_as(x))

    def most(self, values: Sequence[float]) -> list[float]:
        """The largest of each number among all processes."""
        if self.count == 1:
            return list(values)
        x = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(x, dist.ReduceOp.MAX)
        return x.tolist()

    def any(self, flag: bool) -> bool:
        """Whether one of the processes says so."""
        return bool(self.most([float(flag)])[0])


def read_ranks(device: str) -> Ranks:
    """What torchrun says; a process that it did not start is alone."""
    if not dist.is_torchelastic_launched():
        return Ranks(device=device)
    return Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), device)


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Meet the others: over gloo on CPUs, over NCCL on GPUs, of which each process takes its own.

    Raises:
        ValueError: more processes than GPUs.
    """
    ranks = read_ranks(device)
    if ranks.count == 1:
        yield ranks
        return
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        checks.check_processes(int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count())
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield ranks
    finally:
        dist.destroy_process_group()
