"""Several processes that train one model, each on its own GPU.

    torchrun --nproc-per-node 4 -m msa.cli train --preset small --minutes 7 --out trained_small

The processes form a mesh of two dimensions, "data" and "context". Processes along "data" read
different documents. Those along "context" read the same documents, each a part of the tokens
(`msa.parallel`). Gradients are added by DistributedDataParallel, over all processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh


@dataclass(frozen=True)
class Ranks:
    """One process of a run. With count 1 there are no other processes and no communication.

    >>> ranks, x = Ranks(), torch.ones(2)
    >>> ranks.add([x])
    >>> x, ranks.first, ranks.any(True), ranks.most([3.0])
    (tensor([1., 1.]), True, True, [3.0])
    >>> Ranks(rank=3, count=4, context=2).share  # the second of two shares of the documents
    (1, 2)
    """

    rank: int = 0
    count: int = 1
    device: str = "cpu"
    context: int = 1
    """How many processes read the same documents."""
    context_group: dist.ProcessGroup | None = None
    """Those that read the same documents as this process, if there are several."""

    @property
    def share(self) -> tuple[int, int]:
        """Which share of the documents this process reads, and how many shares there are."""
        return self.rank // self.context, self.count // self.context

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
def joined(device: str, context: int = 1) -> Iterator[Ranks]:
    """Connect the processes: by gloo on CPUs, by NCCL on GPUs, where each process uses one GPU.

    `context` processes read the same documents together.

    Raises:
        ValueError: more processes than GPUs; processes that cannot be parted by `context`.
    """
    ranks = read_ranks(device)
    check_context(context, ranks.count)
    if ranks.count == 1:
        yield ranks
        return
    kind = torch.device(device).type
    if kind == "cuda":
        check_processes(int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count())
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        mesh = init_device_mesh(
            kind, (ranks.count // context, context), mesh_dim_names=("data", "context")
        )
        group = mesh["context"].get_group() if context > 1 else None
        yield replace(ranks, context=context, context_group=group)
    finally:
        dist.destroy_process_group()


def check_context(context: int, processes: int) -> None:
    """The processes can be parted into groups of `context`."""
    if processes % context:
        raise ValueError(
            f"context_parallel must divide the number of processes = {processes}, which torchrun "
            f"starts, got {context}"
        )


def check_processes(processes: int, devices: int) -> None:
    """There is a GPU for each process."""
    if processes > devices:
        raise ValueError(
            f"nproc-per-node must be at most {devices}, the number of GPUs, got {processes}"
        )
