"""Calls work on any CUDA device, any stream, any thread, and inside the capture of a graph.

Triton launches on the current device, so every entry of this backend makes the device of its
tensors current first (`on_its_device`). Kernels go to the current stream of that device, as torch's
own do. Only the tables that `device_table` keeps outlive a call. For these it holds that

 1. a table is complete before it is returned: the host waits for its copy, so any stream may read
    it. The copy runs on a separate stream and waits for no kernel of the caller;
 2. it is made in a separate thread, where neither the memory pool of a graph nor inference mode
    applies, so its memory is ordinary memory in whatever state the caller is;
 3. its memory is freed only when the streams that read it have done so, and never if a graph was
    captured with it, because a graph may be replayed at any time;
 4. a missing table cannot be made while a graph is captured, because the host could not wait for
    its copy. This is an error, and one call outside of the capture makes the table.

A table that is not kept yet costs a thread and a copy that the host waits for, some tens of
microseconds, once for each shape and device. A kept table costs two calls of torch. Two threads
that need the same new table at once make two of them; one is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, is_dataclass
from functools import lru_cache, update_wrapper, wraps
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from msa.checks import check_known_before_capture
from msa.triton_impl.step_sequences import StepSequences

P = ParamSpec("P")
R = TypeVar("R")

TABLES = 64
"""Tables that each function keeps; the least recently used one is dropped first."""


def tensors_of(thing: Any) -> list[Tensor]:
    """The tensors of a form, and of the forms inside it; a tensor itself.

    >>> [len(tensors_of(x)) for x in (torch.ones(2), "text", None)]
    [1, 0, 0]
    """
    if isinstance(thing, Tensor):
        return [thing]
    if not is_dataclass(thing) or isinstance(thing, type):
        return []
    return [t for f in fields(thing) for t in tensors_of(getattr(thing, f.name))]


def on_its_device(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function with the CUDA device of its first tensor argument as the current device."""

    @wraps(function)
    def run(*args: P.args, **options: P.kwargs) -> R:
        for thing in (*args, *options.values()):
            found = tensors_of(thing)
            if found:
                if not found[0].is_cuda:
                    break
                with torch.cuda.device(found[0].device):
                    return function(*args, **options)
        return function(*args, **options)

    return run


@lru_cache(maxsize=64)
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which this device's tables are copied.

    It has high priority: torch hands out its streams of each priority in turns, and the capture of
    a graph takes one of normal priority, so the two cannot be the same.
    """
    return torch.cuda.Stream(device, priority=-1)


@dataclass
class Kept:
    """A table, or a form that holds tables, and the streams that have read it."""

    thing: Any
    tensors: list[Tensor]
    streams: set[int] = field(default_factory=set)

    def use(self, device: torch.device) -> None:
        """Note that the kernels launched next read the table."""
        if torch.cuda.is_current_stream_capturing():
            IN_GRAPHS[id(self)] = self
            return
        stream = torch.cuda.current_stream(device)
        if stream.cuda_stream not in self.streams:
            for tensor in self.tensors:
                tensor.record_stream(stream)
            self.streams.add(stream.cuda_stream)


IN_GRAPHS: dict[int, Kept] = {}
"""Tables that graphs were captured with, never dropped: torch does not report deleted graphs."""


class device_table(Generic[P, R]):  # a decorator, so named like a function
    """Keep what a function returns for the same arguments (see above); the last is the device.

    `StepSequences` keep their tables themselves.
    """

    def __init__(self, make: Callable[P, R]) -> None:
        update_wrapper(self, make)
        self._make: Callable[..., R] = make
        self._keep = lru_cache(maxsize=TABLES)(self._kept)
        self.cache_clear = self._keep.cache_clear

    def __call__(self, *args: P.args, **options: P.kwargs) -> R:
        """The complete table, for kernels that are launched next on the current stream."""
        *others, device = args
        assert isinstance(device, torch.device) and not options
        if others and isinstance(others[0], StepSequences):
            step, key = others[0], (self._make, (*others[1:], device))
            if key not in step.tables and device.type == "cuda":
                check_known_before_capture(torch.cuda.is_current_stream_capturing())
            return step.table(self._make, *others[1:], device)
        if device.type != "cuda":
            return self._keep(*others, device).thing
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        kept = self._keep(*others, device)
        kept.use(device)
        return kept.thing

    def _kept(self, *args: Any) -> Kept:
        device = args[-1]
        if device.type != "cuda":
            thing = self._make(*args)
            return Kept(thing, tensors_of(thing))
        check_known_before_capture(torch.cuda.is_current_stream_capturing())

        def make_and_wait() -> R:
            with torch.cuda.stream(copy_stream(device)):
                thing = self._make(*args)
                torch.cuda.current_stream(device).synchronize()
            return thing

        with ThreadPoolExecutor(1) as thread:
            thing = thread.submit(make_and_wait).result()
        return Kept(thing, tensors_of(thing))
