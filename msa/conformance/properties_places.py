"""R21: where a call runs and how its tensors lie in memory changes no bit of what it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from threading import Barrier
from typing import Any, Literal

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

import msa
from msa.conformance import strategies
from msa.conformance.backends import Domain, Subject
from msa.conformance.calls import selected
from msa.conformance.cases import Brief, Case, PagedCase
from msa.conformance.gradients import pull_back
from msa.conformance.properties import holds_for
from msa.conformance.properties_training import upstream
from msa.conformance.strides import Stride, strides
from msa.conformance.tolerances import AGREES, Measure, same
from msa.ir import Array, Output, PagedKV, Selection, Sequences

Bits = dict[str, Array]
THREADS = 4
INTEGERS = ("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64")
"""Dtypes of borders, page tables and lengths."""


def same_bits(got: Bits, want: Bits) -> Measure:
    """Each result, to the last bit."""
    same("names of results", np.array(sorted(got)), np.array(sorted(want)))
    for name, array in want.items():
        same(name, got[name], array)
    return AGREES


# -- strides --------------------------------------------------------------------------------------
Function = Literal["attention", "select", "sparse_attention", "align_index"]
ARGUMENTS: dict[Function, tuple[str, ...]] = {
    "attention": ("q", "k", "v", "q_idx", "k_idx"),
    "select": ("q_idx", "k_idx"),
    "sparse_attention": ("q", "k", "v"),
    "align_index": ("q", "k", "q_idx", "k_idx"),
}
NAMES = ("q", "k", "v", "q_idx", "k_idx", "lse", "d_out", "d_lse", "indices", "borders")


@dataclass(frozen=True, repr=False)
class LaidOut(Brief):
    """A call of a public function, and how each of its arguments lies."""

    case: Case
    function: Function
    laid: tuple[Stride, ...]
    """In the order of NAMES."""
    batched: bool = False
    integers: str = "int32"
    """The dtype of cu_seqlens."""

    def of(self, name: str) -> Stride:
        """How an argument lies."""
        return self.laid[NAMES.index(name)]


@st.composite
def laid_out(draw: DrawFn, domain: Domain) -> LaidOut:
    """Any function, each argument in a way of its own; batched where all lengths are the same."""
    case, batched = draw(strategies.cases(domain)), draw(st.booleans())
    if batched:
        n_q, n_k = case.sequences.total_q, case.sequences.total_k
        case = replace(case, sequences=Sequences.uniform(2, min(n_q, 9), min(n_k, 9) + 7))
    return LaidOut(
        case=case,
        function=draw(st.sampled_from(tuple(ARGUMENTS))),
        laid=tuple(draw(strides()) for _ in NAMES),
        batched=batched,
        integers=draw(st.sampled_from(INTEGERS)),
    )


def call(subject: Subject, given: LaidOut, laid: bool) -> Bits:
    """Everything that a public function gives, gradients included where the backend has them."""
    case, inputs = given.case, given.case.inputs
    (q, k, v), (q_idx, k_idx) = inputs.main, inputs.index
    d_out, d_lse = upstream(case)
    lse = np.abs(d_lse) + 9.0  # any would do
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
        if stride.kind == "expanded":  # every group reads what the first one reads
            stride = replace(stride, dim=1)
        array = subject.give(stride.values(case.selection.indices, floats=False), case.dtype)
        return stride.lay(array, floats=False) if laid else array

    names = ARGUMENTS[given.function]
    args: list[Any] = [argument(name, case.dtype) for name in names]
    differs = subject.domain.has("backward") and given.function != "select"
    if differs:
        args = [x.detach().requires_grad_() for x in args]
    kinds: dict[str, Any] = {"backend": subject.name}
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
    """[2 T, ...] as [2, T, ...]."""
    return array.reshape(2, len(array) // 2, *array.shape[1:]) if batched else array


@holds_for(laid_out, needs=("api",))
def r21_strides_change_no_bit(subject: Subject, given: LaidOut) -> Measure:
    """Tensors that lie in memory in any way give what contiguous ones give, gradients included."""
    return same_bits(call(subject, given, laid=True), call(subject, given, laid=False))


# -- pages ----------------------------------------------------------------------------------------
PAGES = ("k_pages", "v_pages", "k_idx_pages")
SCALES = ("k_scales", "v_scales", "k_idx_scales")
PARTS = ("q", "q_idx", *PAGES, "page_table", "lengths", *SCALES)


@dataclass(frozen=True, repr=False)
class LaidPages(Brief):
    """A decoding step, and how queries and each array of the cache lie."""

    paged: PagedCase
    laid: tuple[Stride, ...]
    """In the order of PARTS."""
    integers: str = "int32"
    """The dtype of page table and lengths."""
    eight_bits: bool = False
    shared: bool = False
    """Whether all sequences are one, by a stride of 0 in table and lengths."""


@st.composite
def laid_pages(draw: DrawFn, domain: Domain) -> LaidPages:
    """Each in a way of its own."""
    return LaidPages(
        paged=draw(strategies.paged_cases(domain)),
        laid=tuple(draw(strides()) for _ in PARTS),
        integers=draw(st.sampled_from(INTEGERS)),
        eight_bits=domain.has("eight_bits") and draw(st.booleans()),
        shared=draw(st.booleans()),
    )


def page_parts(subject: Subject, given: LaidPages, laid: bool) -> dict[str, Any]:
    """q, q_idx and the arrays of the cache by name; scales only beside pages of 8 bits."""
    paged, cache = given.paged, given.paged.cache
    known = dict(zip(("q", "q_idx"), paged.queries)) | {n: getattr(cache, n) for n in PAGES}
    rng = np.random.default_rng(paged.seed)
    if given.eight_bits:
        for name, pages in zip(SCALES, PAGES):
            shape = (len(known[pages]), *known[pages].shape[2:-1])
            known[name] = 2.0 ** rng.integers(-3, 4, shape)
    known |= {"page_table": cache.page_table, "lengths": cache.lengths}
    if given.shared and any(paged.live):
        first = paged.live.index(True)
        for name in ("page_table", "lengths"):
            known[name] = np.broadcast_to(known[name][first], known[name].shape).copy()
    parts: dict[str, Any] = {}
    for name, values in known.items():
        stride, floats = given.laid[PARTS.index(name)], values.dtype.kind == "f"
        if not floats:
            values = values.astype(given.integers)
            if stride.kind == "expanded":
                stride = Stride("expanded" if given.shared else "every_second", 0)
        array = subject.give(
            stride.values(values, floats), "float32" if name in SCALES else paged.case.dtype
        )
        if given.eight_bits and name in PAGES:
            array = array.to(subject.dtype("float8_e4m3fn"))
        parts[name] = stride.lay(array, floats) if laid else array
    return parts


@holds_for(laid_pages, needs=("api", "decode_step"))
def r21_strides_of_pages_change_no_bit(subject: Subject, given: LaidPages) -> Measure:
    """Decoding: queries, pages, table, lengths and scales may lie in any way."""

    def step(laid: bool) -> Bits:
        parts = page_parts(subject, given, laid)
        q, q_idx, cache = parts.pop("q"), parts.pop("q_idx"), PagedKV(**parts)
        kinds: dict[str, Any] = {"config": given.paged.case.config, "backend": subject.name}
        output = msa.decode(q, q_idx, cache, **kinds)
        found = {"out": output.out, "lse": output.lse, "indices": selected(output)}
        return {name: subject.read(array) for name, array in found.items()}

    return same_bits(step(laid=True), step(laid=False))


# -- threads, defaults ----------------------------------------------------------------------------
def whole_call(subject: Subject, case: Case) -> Bits:
    """The whole path, its loss, and gradients where there are any, from fresh tensors."""
    plain = LaidOut(case, "attention", tuple(Stride() for _ in NAMES))
    return call(subject, plain, laid=False)


@holds_for(strategies.cases, needs=("api", "threads"))
def r21_several_threads_get_the_same_bits(subject: Subject, case: Case) -> Measure:
    """The first calls of one shape, by several threads at once: what one thread gets."""
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
    """A CUDA stream of the thread's own; nothing without a GPU."""
    if not subject.domain.has("streams"):
        yield
        return
    import torch

    stream = torch.cuda.Stream(subject.device)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def torch_modes() -> tuple[Callable[[], AbstractContextManager[Any]], ...]:
    """What a caller may have set in torch: it is about the caller's own tensors."""
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
    """A call or a decoding step under one of `torch_modes`."""

    of: Case | PagedCase
    mode: int = 0


def in_mode(domain: Domain) -> st.SearchStrategy[InMode]:
    """Any call, step and mode."""
    either = st.one_of(strategies.cases(domain), strategies.paged_cases(domain))
    return st.builds(InMode, either, st.integers(0, 3))


def arrays_of(subject: Subject, of: Case | PagedCase) -> list[Any]:
    """The arguments of `run`, all of them made before the place changes."""
    if isinstance(of, PagedCase):
        return [subject.give(x, of.case.dtype) for x in (*of.queries, of.cache)]
    return [subject.give(x, of.dtype) for x in (*of.inputs.main, *of.inputs.index)]


def output_of(
    subject: Subject, of: Case | PagedCase, arrays: list[Any], align: bool = False
) -> Output:
    """By decode or attention."""
    case = of.case if isinstance(of, PagedCase) else of
    kinds: dict[str, Any] = {"config": case.config, "backend": subject.name}
    if isinstance(of, PagedCase):
        return msa.decode(*arrays, **kinds)
    borders = {f"cu_seqlens_{n}": getattr(case.sequences, f"cu_seqlens_{n}") for n in "qk"}
    return msa.attention(*arrays, align=align, **borders, **kinds)


def run(subject: Subject, of: Case | PagedCase, arrays: list[Any]) -> Bits:
    """attention with its loss, or decode; what comes out, and its dtypes."""
    output = output_of(subject, of, arrays, align=True)
    found = {"out": output.out, "lse": output.lse, "indices": selected(output)}
    found |= {} if output.kl is None else {"kl": output.kl}
    dtypes = {f"dtype of {name}": np.array(str(x.dtype)) for name, x in found.items()}
    return dtypes | {name: subject.read(array) for name, array in found.items()}


@holds_for(in_mode, needs=("api", "tensors", "decode_step"))
def r21_the_defaults_of_torch_change_no_bit(subject: Subject, given: InMode) -> Measure:
    """Default dtype float64, default device meta, no_grad, inference_mode: results as without."""
    tensors = replace(subject, kind="torch")  # the spec's answers are tensors then, too
    arrays = arrays_of(tensors, given.of)
    want, mode = run(tensors, given.of, arrays), torch_modes()[given.mode]
    with mode():
        return same_bits(run(tensors, given.of, arrays), want)


# -- on a GPU -------------------------------------------------------------------------------------
def long_work(subject: Subject) -> None:
    """Tens of milliseconds for the GPU: whoever does not wait for it comes too early."""
    import torch

    square = torch.ones(4096, 4096, device=subject.device)
    for _ in range(20):
        square = square @ square


@holds_for(strategies.cases, needs=("api", "streams"))
def r21_any_stream_gives_the_same_bits(subject: Subject, case: Case) -> Measure:
    """The first call of a shape on a stream that is busy, the next at once on another one."""
    import torch

    streams = [torch.cuda.Stream(subject.device) for _ in range(2)]
    found: list[Bits] = []
    with ThreadPoolExecutor(1) as pool:  # a call reads its results back, which waits for them

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


@holds_for(in_mode, needs=("api", "decode_step", "devices"))
def r21_any_device_gives_the_same_bits(subject: Subject, given: InMode) -> Measure:
    """Tensors on another device than the current one, whichever of the two is the first."""
    import torch

    def results(device: str) -> Bits:
        there = replace(subject, device=device)
        bits = run(there, given.of, arrays_of(there, given.of))
        return bits if isinstance(given.of, PagedCase) else bits | whole_call(there, given.of)

    want = results("cuda:0")
    same_bits(results("cuda:1"), want)
    with torch.cuda.device(1):
        return same_bits(results("cuda:0"), want)


@holds_for(in_mode, needs=("api", "decode_step", "graphs"))
def r21_a_graph_gives_the_same_bits(subject: Subject, given: InMode) -> Measure:
    """attention or decode captured in a CUDA graph, and replayed over results that were spoiled."""
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
