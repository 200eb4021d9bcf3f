"""R1-R3: packed sequences, positions of queries, blocks."""

from __future__ import annotations

from dataclasses import astuple, replace
from functools import partial
from typing import Any

import numpy as np

import msa
from msa.conformance import strategies
from msa.conformance.backends import REFERENCE, Subject
from msa.conformance.cases import Case, Fill, PagedCase
from msa.conformance.properties import holds_for
from msa.conformance.run_stage import attend, compare_output, dense, select_fused, selected, spec
from msa.conformance.strategies import Want
from msa.conformance.tolerances import AGREES, Measure, compare, require, same, worst
from msa.conformance.yardstick import block_mask
from msa.ir import Output, Sequences

PREFILL = Want(shapes=("prefill",))
RAGGED = Want(batch=(2, 4), shapes=("prefill", "chunk"))
UNIFORM = Want(batch=(1, 1), shapes=("prefill", "chunk"))
TWO_OF_ONE = Case(
    config=msa.MSAConfig(block_size=16, top_k=1),
    sequences=Sequences((0, 1, 2), (0, 1, 2)),
    groups=1,
    group=1,
    dims=(1, 1, 1),
    dtype="float32",
)
"""For a bug with dense masks: 0 * NaN is NaN, so a NaN reached the other sequence."""


@holds_for(partial(strategies.cases, want=RAGGED), needs=("attend",))
def r1_a_packed_sequence_is_as_if_alone(subject: Subject, case: Case) -> Measure:
    """A sequence has the same selection and attention in a pack as alone."""
    inputs = case.inputs
    packed = attend(subject, inputs)
    found = [compare_output(subject, inputs, packed, dense(inputs, selected(packed)))]
    for qs, ks in case.sequences.spans():
        alone = inputs.take(qs, ks, Sequences.one(qs.stop - qs.start, ks.stop - ks.start))
        output = attend(subject, alone)
        same("selection", selected(packed)[qs], selected(output))
        found.append(compare_output(subject, alone, output, dense(alone, selected(output))))
    return worst(*found)


@holds_for(partial(strategies.cases, want=RAGGED), needs=("attend",), seeds=(TWO_OF_ONE,))
def r1_a_nan_in_one_sequence_stays_there(subject: Subject, case: Case) -> Measure:
    """NaN in all tensors of one sequence changes no other sequence."""
    inputs = case.inputs
    clean = selected(attend(subject, inputs))
    want = dense(inputs, clean)
    bound = want.out_bound(subject.domain.precision(case.dtype))
    for qs, ks in case.sequences.spans():
        output = attend(subject, inputs.change(qs, ks, np.nan))
        others = np.ones(case.sequences.total_q, bool)
        others[qs] = False
        same("selection", selected(output)[others], clean[others])
        compare("out", output.out[others], want.out[others], bound[others])
    return AGREES


@holds_for(partial(strategies.cases, want=UNIFORM), needs=("attend", "api"))
def r1_batched_is_packed_with_equal_lengths(subject: Subject, case: Case) -> Measure:
    """A batch [B, T, H, D] gives the same bits as [B * T, H, D] with cu_seqlens."""
    twice = Sequences.uniform(2, case.sequences.total_q, case.sequences.total_k)
    case = replace(case, sequences=twice)
    inputs = case.inputs
    packed = [subject.give(x, case.dtype) for x in (*inputs.main, *inputs.index)]
    batched = [x.reshape(2, len(x) // 2, *x.shape[1:]) for x in packed]
    kinds: dict[str, Any] = {"config": case.config} | subject.public("attention")
    one = msa.attention(*batched, **kinds)
    other = msa.attention(
        *packed, cu_seqlens_q=twice.cu_seqlens_q, cu_seqlens_k=twice.cu_seqlens_k, **kinds
    )
    require(one.out.shape[:2] == batched[0].shape[:2], "out must have the layout of q")
    same("out", subject.read(one.out).reshape(other.out.shape), subject.read(other.out))
    same("lse", subject.read(one.lse).reshape(other.lse.shape), subject.read(other.lse))
    return same("selection", *(subject.read(selected(o)) for o in (one, other)))


@holds_for(partial(strategies.cases, want=PREFILL), needs=("attend",))
def r2_a_chunk_is_the_tail_of_the_whole(subject: Subject, case: Case) -> Measure:
    """The last queries of a sequence get the same results alone as with all queries."""
    inputs = case.inputs
    whole = attend(subject, inputs)
    kept: list[int] = []
    cu_q = [0]
    for s, (qs, _) in enumerate(case.sequences.spans()):
        n = min(qs.stop - qs.start, 1 + (case.tile_size + s) % 5)
        kept += range(qs.stop - n, qs.stop)
        cu_q.append(cu_q[-1] + n)
    tail = Sequences(tuple(cu_q), case.sequences.cu_seqlens_k)
    chunk = inputs.take(kept, slice(None), tail)
    output = attend(subject, chunk)
    same("selection", selected(output), selected(whole)[kept])
    return worst(
        compare_output(subject, chunk, output, dense(chunk, selected(output))),
        compare_output(subject, inputs, whole, dense(inputs, selected(whole))),
    )


LOW_PAGES = PagedCase(
    case=replace(
        TWO_OF_ONE,
        q=Fill(planted=((0, 1e17), (1, 1e17))),
        k=Fill(planted=((0, -1e17), (1, -1e17))),
        v=Fill("integers", seed=1),
    ),
    live=(True, True),
    seed=0,
    spare_pages=0,
    spare_columns=0,
)
"""All logits are -1e34."""


@holds_for(strategies.paged_cases, needs=("decode_step",), seeds=(LOW_PAGES,))
def r2_decoding_is_the_same_rule(subject: Subject, paged: PagedCase) -> Measure:
    """Decoding from shuffled pages equals attention over packed keys; no rubbish is read."""
    inputs, live = paged.case.inputs, np.array(paged.live, bool)
    args = (*paged.queries, paged.cache, inputs.config)
    stepped = subject.run("decode_step", *args, cast=inputs.dtype)
    want = dense(inputs, selected(attend(spec(subject), inputs)))
    same("selection", selected(stepped), selected(attend(spec(subject), inputs)))
    assert stepped.selection is not None
    same("cu_seqlens", *(astuple(s) for s in (stepped.selection.sequences, inputs.sequences)))
    same("out of empty slots", stepped.out[~live], np.zeros_like(stepped.out[~live]))
    same("lse of empty slots", stepped.lse[~live], np.full_like(stepped.lse[~live], -np.inf))
    flat = Output(
        stepped.out[live].reshape(want.out.shape), stepped.lse[live].reshape(want.lse.shape)
    )
    return compare_output(subject, inputs, flat, want)


@holds_for(strategies.paged_cases, needs=("decode_step", "select_fused"), seeds=(LOW_PAGES,))
def r2_decoding_takes_given_blocks(subject: Subject, paged: PagedCase) -> Measure:
    """With ids decoding attends to just these blocks; it reads no index key and no empty slot.

    The ids are the forced blocks and every second one of the others that a query selected.
    """
    inputs, live = paged.case.inputs, np.array(paged.live, bool)
    chosen = selected(attend(spec(subject), inputs))
    thinned = np.full_like(chosen, -1)
    for row, ids in zip(*(x.reshape(-1, chosen.shape[-1]) for x in (thinned, chosen))):
        kept = ids[ids >= 0][::-2][::-1]  # the own block is the last
        row[: len(kept)] = kept
    given = np.full((len(live), paged.n, *chosen.shape[1:]), 10**6, np.int32)
    given[live] = thinned.reshape(-1, *given.shape[1:])
    blind = replace(paged.cache, k_idx_pages=np.full_like(paged.cache.k_idx_pages, np.nan))
    args = (paged.queries[0], None, blind, inputs.config, given)
    stepped = subject.run("decode_step", *args, cast=inputs.dtype)
    same("selection", selected(stepped), thinned)
    same("out of empty slots", stepped.out[~live], np.zeros_like(stepped.out[~live]))
    same("lse of empty slots", stepped.lse[~live], np.full_like(stepped.lse[~live], -np.inf))
    want = dense(inputs, thinned)
    flat = Output(
        stepped.out[live].reshape(want.out.shape), stepped.lse[live].reshape(want.lse.shape)
    )
    return compare_output(subject, inputs, flat, want)


@holds_for(strategies.cases, needs=("attend",))
def r3_the_future_does_not_matter(subject: Subject, case: Case) -> Measure:
    """Changes of keys, values and index keys after a position change no result up to it."""
    inputs = changed = case.inputs
    positions = np.array(case.sequences.positions(), int)
    early = np.zeros(case.sequences.total_q, bool)
    for qs, ks in case.sequences.spans():
        cut = case.chunk_size % max(1, ks.stop - ks.start)
        early[qs] = positions[qs] <= cut
        changed = changed.change(slice(0), slice(ks.start + cut + 1, ks.stop), 3.0)
    before, after = attend(subject, inputs), attend(subject, changed)
    same("selection", selected(after)[early], selected(before)[early])
    return compare_output(subject, inputs, after, dense(inputs, selected(before)), early)


@holds_for(strategies.cases, needs=("select_fused",))
def r3_a_selection_means_the_visible_tokens_of_its_blocks(subject: Subject, case: Case) -> Measure:
    """mask_of(selection) is true where block j // Bk is selected and j <= p."""
    selection = select_fused(subject, case.inputs)
    mask = block_mask(selection.indices, case.sequences, case.config.block_size)
    require(bool(mask.any(-1).all()), "every query must read at least its own token (R6, R9)")
    return same("mask", REFERENCE.mask_of(selection), mask)
