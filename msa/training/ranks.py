"""Several processes that train one model, each on its own GPU, and the sums over all of them.

    torchrun --nproc-per-node 4 -m msa.cli train --preset small --minutes 7 --out trained_small

Gradients are added here and not by DistributedDataParallel, for three reasons. A step has two
losses, which are means over different things. The weights have two parts, which are clipped
separately. The loads of the experts are added too. After the sums, every process takes the same
step.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """One process of a run. With count 1 there are no other processes and no communication.

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
        """Whether this process writes, tests and prints. The others only take steps."""
        return self.rank == 0

    @torch.no_grad()
    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes.

        There is one message for the float32 tensors and one for the integers.
        """
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
        """The largest of each number, over all processes."""
        if self.count == 1:
            return list(values)
        x = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(x, dist.ReduceOp.MAX)
        return x.tolist()

    def any(self, flag: bool) -> bool:
        """Whether the flag is True in at least one process."""
        return bool(self.most([float(flag)])[0])


def read_ranks(device: str) -> Ranks:
    """The rank that torchrun gave to this process. Without torchrun the process is the only one."""
    if not dist.is_torchelastic_launched():
        return Ranks(device=device)
    return Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), device)


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Connect the processes: by gloo on CPUs, by NCCL on GPUs, where each process uses one GPU.

    Raises:
        ValueError: more processes than GPUs.
    """
    ranks = read_ranks(device)
    if ranks.count == 1:
        yield ranks
        return
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        check_processes(int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count())
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield ranks
    finally:
        dist.destroy_process_group()


def check_processes(processes: int, devices: int) -> None:
    """There is a GPU for each process."""
    if processes > devices:
        raise ValueError(
            f"nproc-per-node must be at most {devices}, the number of GPUs, got {processes}"
        )
