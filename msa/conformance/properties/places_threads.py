"""R21: several threads at once, and the defaults of torch, change no bit of a result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from threading import Barrier
from typing import Any

import numpy as np
from hypothesis import strategies as st

import msa
from msa.conformance import strategies
from msa.conformance.backends import Domain, Subject
from msa.conformance.cases import Brief, Case, PagedCase
from msa.conformance.properties import holds_for
from msa.conformance.properties.places_strides import NAMES, Bits, LaidOut, call, same_bits
from msa.conformance.run_stage import selected
from msa.conformance.strides import Stride
from msa.conformance.tolerances import AGREES, Measure
from msa.ir import Output

THREADS = 4


def whole_call(subject: Subject, case: Case) -> Bits:
    """The results of the whole path, its loss and its gradients, from new tensors."""
    plain = LaidOut(case, "attention", tuple(Stride() for _ in NAMES))
    return call(subject, plain, laid=False)


@holds_for(strategies.cases, needs=("api", "threads"))
def r21_several_threads_get_the_same_bits(subject: Subject, case: Case) -> Measure:
    """Several threads that make the first calls of a shape at once get the bits of one thread."""
    together = Barrier(THREADS)

    def work(_: int) -> Bits:
        together.wait()
        with own_stream(subject):
            return whole_call(subject, case)

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(work, range(THREADS)))
    want = whole_call(subject, case)
    for bits in found:
        same_bits(bits, want)
    return AGREES


@contextmanager
def own_stream(subject: Subject) -> Iterator[None]:
    """Run in a new CUDA stream, if there is a GPU."""
    if not subject.domain.has("streams"):
        yield
        return
    import torch

    stream = torch.cuda.Stream(subject.device)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def torch_modes() -> tuple[Callable[[], AbstractContextManager[Any]], ...]:
    """Global settings of torch that a caller may have made for other tensors."""
    import torch

    @contextmanager
    def float64_by_default() -> Iterator[None]:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)

    return float64_by_default, lambda: torch.device("meta"), torch.no_grad, torch.inference_mode


@dataclass(frozen=True, repr=False)
class InMode(Brief):
    """A call of attention or decode under one of `torch_modes`."""

    of: Case | PagedCase
    mode: int = 0


def in_mode(domain: Domain) -> st.SearchStrategy[InMode]:
    """Draw a call of attention, or of decode if the backend has it, and a mode."""
    either: st.SearchStrategy[Case | PagedCase] = strategies.cases(domain)
    if domain.has("decode_step"):
        either = st.one_of(strategies.cases(domain), strategies.paged_cases(domain))
    return st.builds(InMode, either, st.integers(0, 3))


def arrays_of(subject: Subject, of: Case | PagedCase) -> list[Any]:
    """The tensors of the call. They are made before the mode or the device changes."""
    if isinstance(of, PagedCase):
        return [subject.give(x, of.case.dtype) for x in (*of.queries, of.cache)]
    return [subject.give(x, of.dtype) for x in (*of.inputs.main, *of.inputs.index)]


def output_of(
    subject: Subject, of: Case | PagedCase, arrays: list[Any], align: bool = False
) -> Output:
    """Call decode or attention."""
    case = of.case if isinstance(of, PagedCase) else of
    if isinstance(of, PagedCase):
        return msa.decode(*arrays, config=case.config, **subject.public("decode"))
    borders = {f"cu_seqlens_{n}": getattr(case.sequences, f"cu_seqlens_{n}") for n in "qk"}
    kinds = borders | subject.public("attention")
    return msa.attention(*arrays, align=align, config=case.config, **kinds)


def results_of(subject: Subject, of: Case | PagedCase, arrays: list[Any]) -> Bits:
    """Call attention with its loss, or decode. Returns the results and their dtypes."""
    output = output_of(subject, of, arrays, align=True)
    found = {"out": output.out, "lse": output.lse, "indices": selected(output)}
    found |= {} if output.kl is None else {"kl": output.kl}
    dtypes = {f"dtype of {name}": np.array(str(x.dtype)) for name, x in found.items()}
    return dtypes | {name: subject.read(array) for name, array in found.items()}


@holds_for(in_mode, needs=("api", "tensors"))
def r21_the_defaults_of_torch_change_no_bit(subject: Subject, given: InMode) -> Measure:
    """Default dtype float64, default device meta, no_grad and inference_mode change no bit."""
    tensors = replace(subject, kind="torch")  # the results of the reference are tensors too
    arrays = arrays_of(tensors, given.of)
    want, mode = results_of(tensors, given.of, arrays), torch_modes()[given.mode]
    with mode():
        return same_bits(results_of(tensors, given.of, arrays), want)
