"""Timing on the GPU: medians of graph replays; the L2 cache is overwritten before each."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from msa import chips

NO_EIGHT_BITS = "this GPU has no numbers of 8 bits"
LONG = 20.0
"""A call that takes more milliseconds than this runs without a graph, and fewer times."""


def timed(call: Callable[[], Any], graph: bool = True) -> dict[str, float]:
    """Time a call: median, least and most milliseconds of 15 replays.

    A call of more than LONG runs 3 times, one of more than two seconds once, both without a graph.
    """
    call()
    torch.cuda.synchronize()
    first = one_run(call)
    long = first > LONG
    if graph and not long:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            call()
        replay = captured.replay
    else:
        replay = call
    times = [first] if first > 2000 else [one_run(replay) for _ in range(3 if long else 15)]
    return {"ms": statistics.median(times), "min": min(times), "max": max(times)}


def one_run(call: Callable[[], Any]) -> float:
    """Time one call in milliseconds, after the L2 cache was filled with other data."""
    torch.empty(2**27, dtype=torch.int8, device="cuda").zero_()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


def ceilings() -> dict[str, float]:
    """Measure what the device can do at best: torch's copy of 4 GiB and products of 8192^3.

    TB/s of the copy count what is read and what is written; TFLOP/s of the fp8 product are those
    with bfloat16 results, 0 on a GPU without numbers of 8 bits.
    """
    source, target = (torch.zeros(2**32, dtype=torch.int8, device="cuda") for _ in range(2))
    copy = timed(lambda: target.copy_(source))
    del source, target
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    fine = timed(lambda: a @ b.T)
    found = {"copy_tbps": 2 * 2**32 / copy["ms"] / 1e9, "bf16_tflops": 2 * n**3 / fine["ms"] / 1e9}
    if not has_eight_bits():
        return found | {"fp8_tflops": 0.0}
    coarse_a, coarse_b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    one = torch.ones((), device="cuda")
    coarse = timed(
        lambda: torch._scaled_mm(
            coarse_a, coarse_b.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    )
    return found | {"fp8_tflops": 2 * n**3 / coarse["ms"] / 1e9}


def has_eight_bits() -> bool:
    """Whether the current GPU has numbers of 8 bits, so that parts with them can be measured."""
    return chips.current().family.e4m3


def index_kinds() -> tuple[str | None, ...]:
    """The data types of the index that can be measured here."""
    return (None, "fp8_e4m3") if has_eight_bits() else (None,)
