"""R21: how the tensors of a call lie in memory changes no bit of its result."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

import msa
from msa.conformance import strategies
from msa.conformance.backends import Domain, Subject
from msa.conformance.cases import Brief, Case
from msa.conformance.gradients import pull_back
from msa.conformance.properties import holds_for
from msa.conformance.properties.training import upstream
from msa.conformance.run_stage import selected
from msa.conformance.strides import Stride, strides
from msa.conformance.tolerances import AGREES, Measure, same
from msa.ir import Array, Selection, Sequences

Bits = dict[str, Array]
INTEGERS = ("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64")
"""The dtypes of borders, page tables and lengths."""


@cache
def integers_for(largest: int) -> SearchStrategy[str]:
    """Draw a dtype that can hold the largest of some integers."""
    return st.sampled_from([name for name in INTEGERS if np.iinfo(name).max >= largest])


def same_bits(got: Bits, want: Bits) -> Measure:
    """Check that all results are equal to the last bit."""
    same("names of results", np.array(sorted(got)), np.array(sorted(want)))
    for name, array in want.items():
        same(name, got[name], array)
    return AGREES


PublicFunction = Literal["attention", "select", "sparse_attention", "align_index"]
ARGUMENTS: dict[PublicFunction, tuple[str, ...]] = {
    "attention": ("q", "k", "v", "q_idx", "k_idx"),
    "select": ("q_idx", "k_idx"),
    "sparse_attention": ("q", "k", "v"),
    "align_index": ("q", "k", "q_idx", "k_idx"),
}
STEPS = {"sparse_attention": ("attend_selection",), "align_index": ("align_index",)}
"""The functions of the contract without which a public function is not tried."""
NAMES = ("q", "k", "v", "q_idx", "k_idx", "lse", "d_out", "d_lse", "indices", "borders")


@dataclass(frozen=True, repr=False)
class LaidOut(Brief):
    """A call of a public function, and how each of its arguments lies in memory."""

    case: Case
    function: PublicFunction
    laid: tuple[Stride, ...]
    """In the order of NAMES."""
    batched: bool = False
    integers: str = "int32"
    """The dtype of cu_seqlens."""

    def of(self, name: str) -> Stride:
        """How an argument lies in memory."""
        return self.laid[NAMES.index(name)]


@st.composite
def laid_out(draw: DrawFn, domain: Domain) -> LaidOut:
    """Draw a function, and for each argument a way to lie in memory."""
    case, batched = draw(strategies.cases(domain)), draw(st.booleans())
    functions = [f for f in ARGUMENTS if domain.has(*STEPS.get(f, ()))]
    if batched:
        n_q, n_k = case.sequences.total_q, case.sequences.total_k
        case = replace(case, sequences=Sequences.uniform(2, min(n_q, 9), min(n_k, 9) + 7))
    return LaidOut(
        case=case,
        function=draw(st.sampled_from(functions)),
        laid=tuple(draw(strides()) for _ in NAMES),
        batched=batched,
        integers=draw(integers_for(case.sequences.total_k)),
    )


def call(subject: Subject, given: LaidOut, laid: bool) -> Bits:
    """Call the public function. Returns its results, and the gradients if the backend has them."""
    case, inputs = given.case, given.case.inputs
    (q, k, v), (q_idx, k_idx) = inputs.main, inputs.index
    d_out, d_lse = upstream(case)
    lse = np.abs(d_lse) + 9.0  # the value does not matter
    known = dict(zip(NAMES, (q, k, v, q_idx, k_idx, lse, d_out, d_lse)))

    def argument(name: str, dtype: str) -> Any:
        values = given.of(name).values(split(known[name], given.batched))
        array = subject.give(values, dtype)
        return given.of(name).lay(array, floats=True) if laid else array

    def borders(values: tuple[int, ...]) -> Any:
        array = subject.give(np.array(values, given.integers), case.dtype)
        stride = given.of("borders")
        kept = stride if stride.kind != "expanded" else Stride("every_second")
        return kept.lay(array, floats=False) if laid else array

    def indices() -> Any:
        stride = given.of("indices")
        if stride.kind == "expanded":  # every group reads the ids of the first one
            stride = replace(stride, dim=1)
        array = subject.give(stride.values(case.selection.indices, floats=False), case.dtype)
        return stride.lay(array, floats=False) if laid else array

    names = ARGUMENTS[given.function]
    args: list[Any] = [argument(name, case.dtype) for name in names]
    differs = subject.domain.has("backward") and given.function != "select"
    if differs:
        args = [x.detach().requires_grad_() for x in args]
    kinds = subject.public(given.function)
    if not given.batched and given.function in ("attention", "select"):
        kinds["cu_seqlens_q"] = borders(case.sequences.cu_seqlens_q)
        kinds["cu_seqlens_k"] = borders(case.sequences.cu_seqlens_k)
    selection = Selection(indices(), case.sequences, case.config.block_size)
    match given.function:
        case "attention":
            output = msa.attention(*args, config=case.config, align=True, **kinds)
            found = {"out": output.out, "lse": output.lse, "kl": output.kl}
            found["indices"] = selected(output)
        case "select":
            found = {"indices": msa.select(*args, config=case.config, **kinds).indices}
        case "sparse_attention":
            output = msa.sparse_attention(*args, selection=selection, **kinds)
            found = {"out": output.out, "lse": output.lse}
        case "align_index":
            kinds["lse"] = argument("lse", "float32")
            found = {"kl": msa.align_index(*args, selection=selection, config=case.config, **kinds)}
    bits = {name: subject.read(array) for name, array in found.items()}
    if differs and q.size:
        up = {"out": ("d_out", case.dtype), "lse": ("d_lse", "float32")}
        ends = [found[name] for name in ("out", "lse", "kl") if name in found]
        pulls = [argument(*up[name]) if name in up else None for name in found if name != "indices"]
        pull_back(ends, pulls)
        left = zip(names, args)
        bits |= {f"d{name}": subject.read(x.grad) for name, x in left if x.grad is not None}
    return bits


def split(array: Array, batched: bool) -> Array:
    """If batched, [2 T, ...] as [2, T, ...]."""
    return array.reshape(2, len(array) // 2, *array.shape[1:]) if batched else array


@holds_for(laid_out, needs=("api",))
def r21_strides_change_no_bit(subject: Subject, given: LaidOut) -> Measure:
    """Strided tensors give the same bits as contiguous ones, gradients included."""
    return same_bits(call(subject, given, laid=True), call(subject, given, laid=False))
