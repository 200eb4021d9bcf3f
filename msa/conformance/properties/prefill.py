"""R2, R12, R19, R21: prefill over a paged cache is attention over the same keys in packed tensors.

All pages are drawn in any order, with NaN in places without a token and rubbish in the table behind
a sequence's last block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

import msa
from msa.conformance import strategies
from msa.conformance.backends import Domain, Subject
from msa.conformance.cases import Brief, Case, Inputs, PagedCase, round_to_e4m3
from msa.conformance.properties import holds_for
from msa.conformance.properties.places_pages import PAGES, PARTS, SCALES, LaidPages, page_parts
from msa.conformance.properties.places_strides import Bits, same_bits
from msa.conformance.run_stage import compare_output, dense, select_fused, selected, spec
from msa.conformance.strategies import Want
from msa.conformance.strides import strides
from msa.conformance.tolerances import Measure, same, worst
from msa.ir import Array, Output, PagedKV

MILD_EIGHT = Want(planted=False)


@st.composite
def prefill_cases(draw: DrawFn, domain: Domain, want: Want = strategies.EXACT_INDEX) -> PagedCase:
    """Sequences of new tokens behind any number of cached ones, in pages; some have none.

    Some cases have enough queries to fill a tile.
    """
    either = st.one_of(strategies.cases(domain, want), strategies.long_unions(domain, want))
    case = draw(either)
    return PagedCase(
        case=case,
        live=(True,) * case.sequences.batch,
        seed=draw(st.integers(0, 9999)),
        spare_pages=draw(st.integers(0, 2)),
        spare_columns=draw(st.integers(0, 2)),
    )


def orders(subject: Subject) -> list[dict[str, Any]]:
    """The loop orders that a prefill of this subject takes, as keyword arguments."""
    if not subject.domain.has("loop_order"):
        return [{}]
    return [{"loop_order": order} for order in subject.loop_orders]


def prefill(subject: Subject, paged: PagedCase, **options: str) -> Output:
    """Prefill the queries of a case over its cache."""
    inputs = paged.case.inputs
    args = (inputs.main[0], inputs.index[0], paged.cache, inputs.sequences, inputs.config)
    return subject.run("prefill_chunk", *args, cast=inputs.dtype, **options)


@holds_for(prefill_cases, needs=("prefill_chunk",), cost=2)
def r2_prefilling_is_the_same_rule(subject: Subject, paged: PagedCase) -> Measure:
    """Prefill over shuffled pages, in each loop order, equals attention over packed keys."""
    inputs = paged.case.inputs
    want = select_fused(spec(subject), inputs).indices
    found: list[Measure] = []
    for order in orders(subject):
        output = prefill(subject, paged, **order)
        same("selection", selected(output), want)
        assert output.selection is not None
        same("cu_seqlens_k", output.selection.sequences.cu_seqlens_k, inputs.sequences.cu_seqlens_k)
        found.append(compare_output(subject, inputs, output, dense(inputs, want)))
    return worst(*found)


@holds_for(prefill_cases, needs=("prefill_chunk",), cost=2)
def r19_prefilling_gives_the_same_bits(subject: Subject, paged: PagedCase) -> Measure:
    """Two prefills over the same cache give the same bits."""
    one, two = (prefill(subject, paged) for _ in range(2))
    same("selection", selected(one), selected(two))
    same("lse", one.lse, two.lse)
    return same("out", one.out, two.out)


# -- 8 bits ---------------------------------------------------------------------------------------
@dataclass(frozen=True, repr=False)
class EightBits(Brief):
    """A prefill over pages of 8 bits: which pages, and the seed of their factors."""

    paged: PagedCase
    pages: tuple[str, ...] = PAGES
    seed: int = 0

    def parts(self) -> tuple[dict[str, Array], Inputs]:
        """The arrays of the cache, and the numbers that they mean, in packed tensors.

        Factors of index keys are powers of two, so that scores stay exact. All factors are short,
        so that a number times its factor is exact in float32, where `PagedKV` rounds it.
        """
        case, cache = self.paged.case, self.paged.cache
        rng = np.random.default_rng(self.seed)
        parts = {n: getattr(cache, n) for n in (*PAGES, "page_table", "lengths")}
        for name, scales in zip(PAGES, SCALES):
            if name not in self.pages:
                continue
            pages = parts[name]
            factors = 2.0 ** rng.integers(-3, 4, (len(pages), *pages.shape[2:-1]))
            if name != "k_idx_pages":
                factors *= 1 + rng.integers(0, 64, factors.shape) / 64
            parts[scales] = factors
            parts[name] = round_to_e4m3(pages)
        return parts, self.meaning(case, parts)

    def meaning(self, case: Case, parts: dict[str, Array]) -> Inputs:
        """The inputs of the case with the numbers of the cache, times their factors."""
        block = case.config.block_size
        packed: list[Array] = []
        for name, scales in zip(PAGES, SCALES):
            factors = parts.get(scales)
            tokens = parts[name]
            if factors is not None:
                tokens = tokens * factors.reshape(len(factors), 1, *factors.shape[1:], 1)
            rows = [tokens[:0, 0]]
            for s, (_, keys) in enumerate(case.sequences.spans()):
                j = np.arange(keys.stop - keys.start)
                rows.append(tokens[parts["page_table"][s, j // block], j % block])
            packed.append(np.concatenate(rows))
        k, v, k_idx = packed
        inputs = case.inputs
        return replace(inputs, main=(inputs.main[0], k, v), index=(inputs.index[0], k_idx))


@st.composite
def eight_bits(draw: DrawFn, domain: Domain) -> EightBits:
    """K and V together, index keys, or all of them in 8 bits."""
    kinds = (PAGES, PAGES[:2], PAGES[2:])
    paged = draw(prefill_cases(domain, MILD_EIGHT))
    return EightBits(paged, draw(st.sampled_from(kinds)), draw(st.integers(0, 9999)))


@holds_for(eight_bits, needs=("api", "prefill_chunk", "eight_bits"), cost=2)
def r12_prefilling_8_bits_means_numbers_times_factors(
    subject: Subject, given: EightBits
) -> Measure:
    """Prefill over pages of 8 bits is attention over number * factor, in each loop order."""
    parts, inputs = given.parts()
    arrays: dict[str, Any] = {}
    for name, values in parts.items():
        floats = values.dtype.kind == "f"
        array = subject.give(values, "float32" if floats and name in SCALES else inputs.dtype)
        arrays[name] = array.to(subject.dtype("float8_e4m3fn")) if name in given.pages else array
    q, q_idx = (subject.give(x, inputs.dtype) for x in (inputs.main[0], inputs.index[0]))
    borders = inputs.sequences.cu_seqlens_q
    want = select_fused(spec(subject), replace(inputs, dtype="float64")).indices
    found: list[Measure] = []
    kinds: dict[str, Any] = {"config": inputs.config} | subject.public("prefill")
    for order in orders(subject):
        options = kinds | order
        output = msa.prefill(q, q_idx, PagedKV(**arrays), cu_seqlens_q=borders, **options)
        same("selection", subject.read(selected(output)), want)
        output = Output(subject.read(output.out), subject.read(output.lse))
        found.append(compare_output(subject, inputs, output, dense(inputs, want)))
    return worst(*found)


# -- strides --------------------------------------------------------------------------------------
@st.composite
def laid_prefills(draw: DrawFn, domain: Domain) -> LaidPages:
    """Draw a prefill, and for each array a way to lie in memory."""
    return LaidPages(
        paged=draw(prefill_cases(domain)),
        laid=tuple(draw(strides()) for _ in PARTS),
        eight_bits=domain.has("eight_bits") and draw(st.booleans()),
    )


@holds_for(laid_prefills, needs=("api", "prefill_chunk", "decode_step"), cost=2)
def r21_strides_of_pages_change_no_bit_of_a_prefill(subject: Subject, given: LaidPages) -> Measure:
    """Prefill gives the same bits for strided queries, pages, tables, lengths and scales."""

    def chunk(laid: bool) -> Bits:
        case = given.paged.case
        queries = case.inputs.main[0], case.inputs.index[0]
        parts = page_parts(subject, given, laid, queries)
        q, q_idx, cache = parts.pop("q"), parts.pop("q_idx"), PagedKV(**parts)
        kinds: dict[str, Any] = {"config": case.config} | subject.public("prefill")
        borders = case.sequences.cu_seqlens_q
        output = msa.prefill(q, q_idx, cache, cu_seqlens_q=borders, **kinds)
        found = {"out": output.out, "lse": output.lse, "indices": selected(output)}
        return {name: subject.read(array) for name, array in found.items()}

    return same_bits(chunk(laid=True), chunk(laid=False))
