"""The one way in: every public call and every operator is checked here once, and leaves here.

    read the layout, check the arguments    enter, enter_cache
    choose the backend                      Entry
    call it, hand back                      Entry.run

Checks of what the triton backend has kernels for are its own: each of its functions makes them for
its arguments. A call of several stages makes them for all of them before the first one
(`Entry.check_kernels`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msa import checks, paged_kv
from msa.config import MSAConfig
from msa.dispatch import BackendName, Carrier, load_backend, resolve
from msa.ir import Array, Output, PagedKV, Selection
from msa.layout import Layout, read_layout
from msa.pipeline import Trace
from msa.selection import check_selection_for, mark_canonical


class Entry:
    """The backend of a call whose arguments are checked, and the way there and back.

    Args:
        backend: its name, or "auto".
        model: the argument whose kind, dtype and device the answer has.
        layout: that of the tensors; None where the answer needs no other layout.
        options: those of the triton backend.
    """

    def __init__(
        self,
        backend: BackendName,
        model: Array,
        layout: Layout | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.name = resolve(backend, model)
        self.module = load_backend(self.name)
        checks.check_options(self.name, model, **options or {})
        self.options = (options or {}) if self.name == "triton" else {}
        self.layout = layout
        self.carrier = Carrier(self.name, model)

    def check_kernels(self, block_size: int, top_k: int, arrays: dict[str, Array]) -> None:
        """Check all arguments of a call of several stages before the first stage."""
        if self.name == "triton":
            checks.check_kernels(block_size, top_k, **arrays)

    def run(self, function: Callable[..., Any], *args: Any, **others: Any) -> Any:
        """Call a function of the backend; its answer in the caller's kind, dtype and layout."""
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
    """The entry of a call whose tensors hold sequences: packed, of the backend's kind."""

    def __init__(
        self,
        backend: BackendName,
        arrays: dict[str, Array],
        layout: Layout,
        selection: Selection | None,
        options: dict[str, Any] | None,
    ) -> None:
        super().__init__(backend, next(iter(arrays.values())), layout, options)
        self.sequences = layout.sequences
        self.arrays = self.carrier.take(**{n: layout.pack(array) for n, array in arrays.items()})
        (self.selection,) = self.carrier.take(selection=selection)


def enter(
    arrays: dict[str, Array],
    backend: BackendName,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    *,
    config: MSAConfig | None = None,
    selection: Selection | None = None,
    options: dict[str, Any] | None = None,
) -> TensorEntry:
    """Check a call of packed or batched tensors, whose names are those of `msa.layout.DIMS`.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came (R20).
    """
    if config is not None:
        checks.check_type("config", config, MSAConfig)
    if selection is not None:
        checks.check_type("selection", selection, Selection)
    known = None if selection is None else selection.sequences
    layout = read_layout(arrays, cu_seqlens_q, cu_seqlens_k, known)
    if selection is not None:
        check_selection_for(selection, arrays["q"], arrays["k"])
    return TensorEntry(backend, arrays, layout, selection, options)


def enter_cache(
    q: Array, q_idx: Array, cache: PagedKV, backend: BackendName, config: MSAConfig
) -> tuple[Entry, list[Any]]:
    """Check a step of decoding; give its entry, and q, q_idx and cache of the backend's kind.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came (R20).
    """
    checks.check_type("cache", cache, PagedKV)
    checks.check_type("config", config, MSAConfig)
    for name, array in (("q", q), ("q_idx", q_idx)):
        checks.check_array(name, array)
    sizes: dict[str, int] = {"Bk": config.block_size}
    checks.check_shape("q", q, "B n Hq D", sizes)
    paged_kv.check_cache(cache, sizes)
    checks.check_shape("q_idx", q_idx, "B n Hkv Di", sizes)
    checks.check_heads(sizes["Hq"], sizes["Hkv"])
    paged_kv.check_queries(cache, q, q_idx)
    entry = Entry(backend, q)
    if checks.is_captured(q):
        checks.check_capturable(entry.name)
    else:
        paged_kv.check_contents(cache, sizes)
    cache = paged_kv.with_index_dtypes(cache)
    return entry, entry.carrier.take(q=q, q_idx=q_idx, cache=cache)


def enter_append(cache: PagedKV, tokens: dict[str, Array]) -> Entry:
    """Check tokens that the triton backend is to write into a cache.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came (R20).
    """
    checks.check_type("cache", cache, PagedKV)
    sizes: dict[str, int] = {}
    paged_kv.check_cache(cache, sizes, checks.INDEX_DTYPES)
    paged_kv.check_tokens(cache, True, sizes["B"], tokens)
    entry = Entry("triton", cache.k_pages)
    entry.check_kernels(sizes["Bk"], 1, tokens)
    paged_kv.check_written(cache)
    return entry
