"""The start of every call: check its arguments, choose a backend, and call it.

    read the layout, check the arguments    enter, enter_prefill, enter_cache, enter_append
    choose the backend                      Entry
    call it, convert the result             Entry.run

Public functions and operators use it. No function of a backend is called before all checks have
passed, including those of the kernels' limits.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

from msa import cache_checks, checks, chips, kernel_choice
from msa.config import MSAConfig
from msa.dispatch import BackendName, Carrier, load_backend, resolve
from msa.ir import Array, Output, PagedKV, Selection, Sequences
from msa.layout import Layout, read_layout
from msa.pipeline import Trace
from msa.selection import check_selection_for, mark_canonical


class Entry:
    """The backend of a call with checked arguments; it converts arrays for the backend and back.

    Args:
        backend: its name, or "auto".
        model: the argument whose kind, dtype and device the result has.
        options: those of the triton backend.
    """

    def __init__(
        self, backend: BackendName, model: Array, options: dict[str, Any] | None = None
    ) -> None:
        self.name = resolve(backend, model)
        self.module = load_backend(self.name)
        checks.check_options(self.name, model, **options or {})
        if options and options.get("index_dtype"):
            chips.check_eight_bits("index_dtype", "None", "'fp8_e4m3'", model.device)
        self.options = (options or {}) if self.name == "triton" else {}
        self.carrier = Carrier(self.name, model)
        self.layout: Layout | None = None

    def check_kernels(self, block_size: int, top_k: int, arrays: dict[str, Array]) -> None:
        """If triton was chosen, check that it has kernels for the call; they read any lse."""
        if self.name == "triton":
            read = {name: array for name, array in arrays.items() if name != "lse"}
            checks.check_kernels(block_size, top_k, **read)

    def check_choice(
        self, arrays: dict[str, Array], config: MSAConfig | None, selection: Selection | None
    ) -> None:
        """Check that the kernels that were named can make a selection, or attend to one."""
        if self.options.get("kernels") != "hopper":
            return
        if config is not None:
            call = kernel_choice.call_of(arrays["q_idx"], arrays["k_idx"], config)
            kernel_choice.choose("hopper", call)
        elif selection is not None:
            q, k, v = (arrays[name] for name in "qkv")
            order = self.options["loop_order"]
            walk = kernel_choice.walk_call_of(q, k, v, selection, q.shape[-1] ** -0.5, order)
            kernel_choice.choose("hopper", walk)  # no scale is refused

    def run(self, function: Callable[..., Any], *args: Any, **others: Any) -> Any:
        """Call a function of the backend; the result has the caller's kind, dtype and layout."""
        with self.carrier.exactly():
            answer = self.carrier.give(function(*args, **others))
        if isinstance(answer, Output) and self.layout is not None:
            answer = self.layout.unpack(answer)
        made = answer if isinstance(answer, Selection) else None
        if isinstance(answer, Output | Trace):
            made = answer.selection
        if made is not None:
            mark_canonical(made)
        return answer


class TensorEntry(Entry):
    """The entry of a call whose tensors hold sequences."""

    sequences: Sequences
    arrays: list[Any]
    """The tensors of the call, packed, of the backend's kind."""
    selection: Selection | None

    def take(self, arrays: dict[str, Array], layout: Layout, selection: Selection | None) -> None:
        """Pack the checked arguments, and convert them for the backend."""
        self.layout, self.sequences = layout, layout.sequences
        packed = {name: layout.pack(array) for name, array in arrays.items()}
        self.arrays = self.carrier.take(**packed)
        (self.selection,) = self.carrier.take(selection=selection)


def enter(
    arrays: dict[str, Array], backend: BackendName, cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None, *, config: MSAConfig | None = None,
    selection: Selection | None = None, options: dict[str, Any] | None = None,
    top_k: int | None = None,
) -> TensorEntry:  # fmt: skip
    """Check a call of packed or batched tensors.

    Args:
        arrays: some of q, k, v, q_idx, k_idx and lse.
        backend: as in the public functions.
        cu_seqlens_q, cu_seqlens_k: as in the public functions.
        config: says the block size and top_k, unless a selection does.
        selection: brings its sequences, its block size and its top_k.
        options: those of the triton backend.
        top_k: how many blocks a query reads, if it is not that of the selection or config.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came (R20).
    """
    if config is not None or selection is None:
        checks.check_type("config", config, MSAConfig)
    if selection is not None:
        checks.check_type("selection", selection, Selection)
    known = None if selection is None else selection.sequences
    layout = read_layout(arrays, cu_seqlens_q, cu_seqlens_k, known)
    if selection is not None:
        check_selection_for(selection, arrays["q"], arrays["k"])
    entry = TensorEntry(backend, next(iter(arrays.values())), options)
    blocks = config if selection is None else selection
    if blocks is not None:
        entry.check_kernels(blocks.block_size, top_k or blocks.top_k, arrays)
    entry.check_choice(arrays, config, selection)
    entry.take(arrays, layout, selection)
    return entry


def check_shapes(
    q: Array, q_idx: Array | None, cache: PagedKV, config: MSAConfig, lead: str,
    ids: Array | None = None,
) -> dict[str, int]:  # fmt: skip
    """Queries, and given block ids, fit a cache; give the sizes.

    `lead` names the dims of q before its heads. Either q_idx or ids is given.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came (R20).
    """
    checks.check_type("cache", cache, PagedKV)
    checks.check_type("config", config, MSAConfig)
    if ids is not None:
        checks.check_absent("q_idx", q_idx, "a selection is given")
    for name, array in queries_of(q, q_idx, ids).items():
        checks.check_array(name, array)
    sizes: dict[str, int] = {"Bk": config.block_size}
    checks.check_shape("q", q, f"{lead} Hq D", sizes)
    cache_checks.check_cache(cache, sizes)
    if ids is None:
        checks.check_shape("q_idx", q_idx, f"{lead} Hkv Di", sizes)
    checks.check_heads(sizes["Hq"], sizes["Hkv"])
    cache_checks.check_queries(cache, q, q_idx)
    if ids is not None:
        cache_checks.check_given_ids(ids, q, sizes)
    return sizes


def queries_of(q: Array, q_idx: Array | None, ids: Array | None) -> dict[str, Array]:
    """The queries by name, without index queries where ids are given."""
    return {"q": q} if ids is not None else {"q": q, "q_idx": q_idx}


def enter_cache(
    q: Array, q_idx: Array | None, cache: PagedKV, backend: BackendName, config: MSAConfig,
    options: dict[str, Any], ids: Array | None,
) -> tuple[Entry, list[Any]]:  # fmt: skip
    """Check a step of decoding; give its entry, and q, q_idx, cache and ids of the backend's kind.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came (R20).
    """
    sizes = check_shapes(q, q_idx, cache, config, "B n", ids)
    entry = Entry(backend, q, options)
    if checks.is_captured(q):
        checks.check_capturable(entry.name)
    else:
        lengths = cache_checks.check_contents(cache, sizes)
        if ids is not None:
            cache_checks.check_id_contents(ids, lengths, config.block_size)
    top_k = config.top_k if ids is None else sizes["k"]
    entry.check_kernels(config.block_size, top_k, queries_of(q, q_idx, ids))
    if entry.name == "triton":
        cache_checks.check_chip(cache)
    if entry.options.get("kernels") == "hopper":
        if q_idx is None:
            raise ValueError(
                "kernels must be 'auto' or 'portable' where a selection is given, got 'hopper': "
                "no block is scored"
            )
        kernel_choice.choose("hopper", kernel_choice.page_call_of(q_idx, cache))
    cache = cache_checks.with_index_dtypes(cache)
    return entry, entry.carrier.take(q=q, q_idx=q_idx, cache=cache, ids=ids)


def enter_prefill(
    q: Array, q_idx: Array, cache: PagedKV, cu_seqlens_q: Any, backend: BackendName,
    config: MSAConfig, options: dict[str, Any],
) -> tuple[Entry, list[Any]]:  # fmt: skip
    """Check a prefill over a cache; give its entry and all arguments of `prefill_chunk` but config.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came (R20).
    """
    checks.check_array("q", q)
    batched = checks.check_layout("q", q, "Tq Hq D", None)
    sizes = check_shapes(q, q_idx, cache, config, "B n" if batched else "Tq")
    borders = cache_checks.read_query_borders(cu_seqlens_q, batched, sizes)
    entry = Entry(backend, q, options)
    if options["index_dtype"] is not None:
        cache_checks.check_index_pages(cache)
    checks.check_not_captured(q)
    counts = [stop - start for start, stop in zip(borders, borders[1:])]
    lengths = cache_checks.check_contents(cache, sizes, counts)
    sequences = Sequences(borders, tuple(accumulate(lengths, initial=0)))
    entry.layout = Layout(sequences, q.shape[:-2])
    entry.check_kernels(config.block_size, config.top_k, {"q": q, "q_idx": q_idx})
    if entry.name == "triton":
        cache_checks.check_chip(cache)
    cache = cache_checks.with_index_dtypes(cache)
    packed = {name: entry.layout.pack(array) for name, array in (("q", q), ("q_idx", q_idx))}
    return entry, [*entry.carrier.take(**packed, cache=cache), sequences]


def enter_append(cache: PagedKV, tokens: dict[str, Array]) -> Entry:
    """Check tokens that the triton backend is to write into a cache.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came (R20).
    """
    checks.check_type("cache", cache, PagedKV)
    sizes: dict[str, int] = {}
    cache_checks.check_cache(cache, sizes, checks.INDEX_DTYPES)
    cache_checks.check_tokens(cache, True, sizes["B"], tokens)
    entry = Entry("triton", cache.k_pages)
    entry.check_kernels(sizes["Bk"], 1, tokens)
    cache_checks.check_chip(cache)
    cache_checks.check_written(cache)
    return entry
