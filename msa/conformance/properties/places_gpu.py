"""R21 on a GPU: streams, devices and CUDA graphs change no bit of a result."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from msa.conformance import strategies
from msa.conformance.backends import Subject
from msa.conformance.cases import Case, PagedCase
from msa.conformance.properties import holds_for
from msa.conformance.properties.places_strides import Bits, same_bits
from msa.conformance.properties.places_threads import (
    InMode,
    arrays_of,
    in_mode,
    output_of,
    results_of,
    whole_call,
)
from msa.conformance.tolerances import AGREES, Measure, same


def long_work(subject: Subject) -> None:
    """Give the GPU work for tens of milliseconds, so that a missing wait shows."""
    import torch

    square = torch.ones(4096, 4096, device=subject.device)
    for _ in range(20):
        square = square @ square


@holds_for(strategies.cases, needs=("api", "streams"))
def r21_any_stream_gives_the_same_bits(subject: Subject, case: Case) -> Measure:
    """A first call on a busy stream and a second on another stream give the same bits."""
    import torch

    streams = [torch.cuda.Stream(subject.device) for _ in range(2)]
    found: list[Bits] = []
    # in a second thread, because a call waits when its results are read
    with ThreadPoolExecutor(1) as pool:

        def on(stream: Any, busy: bool) -> Bits:
            with torch.cuda.stream(stream):
                if busy:
                    long_work(subject)
                return whole_call(subject, case)

        slow = pool.submit(on, streams[0], True)
        found += [on(streams[1], False), slow.result()]
    want = whole_call(subject, case)
    for bits in found:
        same_bits(bits, want)
    return AGREES


@holds_for(in_mode, needs=("api", "devices"))
def r21_any_device_gives_the_same_bits(subject: Subject, given: InMode) -> Measure:
    """Tensors on another device than the current one give the same bits."""
    import torch

    def results(device: str) -> Bits:
        there = replace(subject, device=device)
        bits = results_of(there, given.of, arrays_of(there, given.of))
        return bits if isinstance(given.of, PagedCase) else bits | whole_call(there, given.of)

    want = results("cuda:0")
    same_bits(results("cuda:1"), want)
    with torch.cuda.device(1):
        return same_bits(results("cuda:0"), want)


@holds_for(in_mode, needs=("api", "graphs"))
def r21_a_graph_gives_the_same_bits(subject: Subject, given: InMode) -> Measure:
    """A CUDA graph of attention or decode, replayed, writes the same bits again."""
    import torch

    arrays = arrays_of(subject, given.of)
    want = output_of(subject, given.of, arrays)  # the first call of a shape cannot be captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = output_of(subject, given.of, arrays)
    got.out.fill_(torch.nan)
    got.lse.fill_(torch.nan)
    graph.replay()
    same("out", subject.read(got.out), subject.read(want.out))
    return same("lse", subject.read(got.lse), subject.read(want.lse))
