"""The parts of `msa bench parallel`: one layer on one GPU, and on all GPUs of the run."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import msa
from benchmarks.cases import CONFIG, DIM, GROUPS, MILLION, Inputs, make_inputs
from benchmarks.checks import Wrong
from msa.ir import Sequences
from msa.parallel import ContextOutput, context_parallel_attention, shard
from msa.parallel.gathering import start_gather

LENGTHS = (131072, MILLION // 2, MILLION)
STEADY = 20
"""Neighbouring queries that have the same index query: about those of a persistence of 0.95."""
BOUND = 0.01
"""Largest relative error of a gradient in bfloat16 against that of one GPU, by Frobenius norm."""
NAMES = ("q", "k", "v", "q_idx", "k_idx")


def whole_tensors(n: int) -> tuple[Tensor, ...]:
    """The tensors of one layer, the same on every GPU, with neighbours that agree."""
    x: Inputs = make_inputs(Sequences.one(n, n))
    q_idx = x.q_idx[::STEADY].repeat_interleave(STEADY, 0)[:n].contiguous()
    return x.q, x.k, x.v, q_idx, x.k_idx


def everyone() -> dist.ProcessGroup:
    """The group of all processes of the run."""
    group = dist.group.WORLD
    assert group is not None  # `benchmarks.parallel.run` has made it
    return group


def slowest(call: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Milliseconds of the slowest GPU: the median of some calls that all GPUs start together."""
    times: list[float] = []
    for _ in range(repeats + 1):
        dist.barrier()
        torch.cuda.synchronize()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        spent = torch.tensor(start.elapsed_time(stop), device="cuda")
        dist.all_reduce(spent, dist.ReduceOp.MAX)
        times.append(float(spent))
    times = times[1:]  # the first call compiles
    return {"ms": statistics.median(times), "min": min(times), "max": max(times)}


def peak_gib(call: Callable[[], Any]) -> float:
    """The most memory of a GPU during a call, its inputs included; the largest over all GPUs."""
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    peak = torch.tensor(float(torch.cuda.max_memory_allocated()), device="cuda")
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    return float(peak) / 2**30


def together(own: tuple[Tensor, ...], align: bool = False) -> ContextOutput:
    """The layer on all GPUs."""
    return context_parallel_attention(
        *own, group=everyone(), config=CONFIG, align=align, backend="triton"
    )


def alone(x: tuple[Tensor, ...], align: bool = False) -> msa.Output:
    """The layer on this GPU."""
    return msa.attention(*x, config=CONFIG, align=align, backend="triton")


def gathers(own: tuple[Tensor, ...], shards: Any) -> None:
    """The messages of the forward pass, and nothing else."""
    for x in own[1:3] + own[4:]:
        pending = start_gather(x, shards, everyone())
        if pending.work is not None:
            pending.work.wait()


def measure(n: int, call_alone: Callable[..., Any], call_together: Callable[..., Any],
            leaves: bool, repeats: int) -> dict[str, Any]:  # fmt: skip
    """Time a call on one GPU and on all, and the messages; memory with the inputs."""
    whole = tuple(x.requires_grad_(leaves) for x in whole_tensors(n))
    one_gib = peak_gib(lambda: call_alone(whole))
    row: dict[str, Any] = {"n": n, "ranks": dist.get_world_size(), "one_gib": one_gib}
    row["one"] = slowest(lambda: call_alone(whole), repeats)
    own = tuple(shard(x.detach(), everyone()).requires_grad_(leaves) for x in whole)
    del whole
    torch.cuda.empty_cache()
    row["each_gib"] = peak_gib(lambda: call_together(own))
    row["together"] = slowest(lambda: call_together(own), repeats)
    shards = together(own).shards
    row["gather"] = slowest(lambda: gathers(own, shards), repeats)
    row["received"] = 2 * (n - len(own[0])) * (2 * GROUPS * DIM + DIM)
    return row


@torch.no_grad()
def check_prefill(n: int) -> None:
    """All GPUs together select what one GPU selects, and attend to it."""
    whole = whole_tensors(n)
    one, found = alone(whole), together(tuple(shard(x, everyone()) for x in whole))
    rows = found.shards.tokens(dist.get_rank(), "cuda")
    ids = torch.cat([selection.indices for selection in found.selections])
    if one.selection is None or not torch.equal(ids, one.selection.indices[rows]):
        raise Wrong(f"selections of {n} tokens differ")
    gap = float((found.out - one.out[rows]).norm() / one.out[rows].norm())
    if not gap < BOUND:
        raise Wrong(f"outputs of {n} tokens are off by {gap:.1e}")


def measure_prefill() -> list[dict[str, Any]]:
    """Attention over 128K, 512K and 1M tokens."""
    check_prefill(LENGTHS[0])
    with torch.no_grad():
        return [measure(n, alone, together, False, 3) for n in LENGTHS]


def gradients(output: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradients of a loss that has both parts, out and kl."""
    return torch.autograd.grad(output.out.float().sum() + output.kl, inputs)


def step_alone(whole: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Forward, alignment loss and all gradients on this GPU."""
    return gradients(alone(whole, align=True), whole)


def step_together(own: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same on all GPUs."""
    return gradients(together(own, align=True), own)


def check_step(n: int) -> None:
    """All GPUs together have the gradients of one GPU."""
    whole = tuple(x.requires_grad_() for x in whole_tensors(n))
    own = tuple(shard(x.detach(), everyone()).requires_grad_() for x in whole)
    found, wanted = step_together(own), step_alone(whole)
    for name, a, b in zip(NAMES, found, wanted):
        b = shard(b, everyone())
        gap = float((a.float() - b.float()).norm() / b.float().norm())
        if not gap < BOUND:
            raise Wrong(f"the gradient of {name} at {n} tokens is off by {gap:.1e}")


def measure_steps() -> list[dict[str, Any]]:
    """A training step of one layer over 128K tokens."""
    check_step(LENGTHS[0])
    return [measure(LENGTHS[0], step_alone, step_together, True, 3)]


PARTS = {"prefill": measure_prefill, "steps": measure_steps}
