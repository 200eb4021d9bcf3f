"""R21: how a paged cache and its queries lie in memory changes no bit of a decoding step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

import msa
from msa.conformance import strategies
from msa.conformance.backends import Domain, Subject
from msa.conformance.cases import Brief, PagedCase
from msa.conformance.properties import holds_for
from msa.conformance.properties.places_strides import Bits, integers_for, same_bits
from msa.conformance.run_stage import selected
from msa.conformance.strides import Stride, strides
from msa.conformance.tolerances import Measure
from msa.ir import Array, PagedKV

PAGES = ("k_pages", "v_pages", "k_idx_pages")
SCALES = ("k_scales", "v_scales", "k_idx_scales")
PARTS = ("q", "q_idx", *PAGES, "page_table", "lengths", *SCALES)


@dataclass(frozen=True, repr=False)
class LaidPages(Brief):
    """A decoding step, and how the queries and each array of the cache lie in memory."""

    paged: PagedCase
    laid: tuple[Stride, ...]
    """In the order of PARTS."""
    integers: str = "int32"
    """The dtype of the page table and the lengths."""
    eight_bits: bool = False
    shared: bool = False
    """Whether all sequences are the same one, by a stride of 0 in the table and the lengths."""


@st.composite
def laid_pages(draw: DrawFn, domain: Domain) -> LaidPages:
    """Draw a decoding step, and for each array a way to lie in memory."""
    paged = draw(strategies.paged_cases(domain))
    slots = paged.case.sequences.total_k + len(paged.live) + 9  # at least as many as pages
    return LaidPages(
        paged=paged,
        laid=tuple(draw(strides()) for _ in PARTS),
        integers=draw(integers_for(slots)),
        eight_bits=domain.has("eight_bits") and draw(st.booleans()),
        shared=draw(st.booleans()),
    )


def page_parts(
    subject: Subject, given: LaidPages, laid: bool, queries: tuple[Array, Array]
) -> dict[str, Any]:
    """q, q_idx and the arrays of the cache by name; scales only for pages of 8 bits."""
    paged, cache = given.paged, given.paged.cache
    known = dict(zip(("q", "q_idx"), queries)) | {n: getattr(cache, n) for n in PAGES}
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
    """Decoding gives the same bits for strided queries, pages, tables, lengths and scales."""

    def step(laid: bool) -> Bits:
        parts = page_parts(subject, given, laid, given.paged.queries)
        q, q_idx, cache = parts.pop("q"), parts.pop("q_idx"), PagedKV(**parts)
        kinds: dict[str, Any] = {"config": given.paged.case.config} | subject.public("decode")
        output = msa.decode(q, q_idx, cache, **kinds)
        found = {"out": output.out, "lse": output.lse, "indices": selected(output)}
        return {name: subject.read(array) for name, array in found.items()}

    return same_bits(step(laid=True), step(laid=False))
