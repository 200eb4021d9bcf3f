"""R13-R16: every step of the lowering keeps the meaning of the form before it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from msa.conformance import strategies
from msa.conformance.backends import REFERENCE, Subject
from msa.conformance.cases import Case
from msa.conformance.properties import holds_for
from msa.conformance.run_stage import compare_output, dense, spec
from msa.conformance.tolerances import Measure, compare, require, same, worst
from msa.ir import Array, Output, Partials, ReverseIndex, Schedule, Selection, TileUnion
from msa.pipeline import Trace, lower

wild = partial(strategies.cases, want=strategies.WILD)
mask_of = REFERENCE.mask_of


def spec_schedule(case: Case) -> Schedule:
    """The schedule of the reference, the input of later stages."""
    index = REFERENCE.reverse_selection(case.selection)
    return REFERENCE.schedule_chunks(index, case.chunk_size)


def own_partials(subject: Subject, case: Case) -> Partials:
    """The partial results of the subject on the schedule of the reference."""
    args = (*case.inputs.main, spec_schedule(case), case.inputs.scale)
    return subject.run("attend_chunks", *args, cast=case.dtype)


def valid_slots(case: Case) -> Array:
    """The slots that belong to an edge: [Tq, Hq, k]."""
    return (case.selection.indices >= 0).repeat(case.group, axis=1)


@holds_for(strategies.cases, needs=("reverse_selection",))
def r13_the_reverse_index_means_the_selection(subject: Subject, case: Case) -> Measure:
    """The reverse index has the mask of the selection, and its arrays equal those of the spec."""
    index: ReverseIndex = subject.run("reverse_selection", case.selection, cast="float32")
    same("mask", mask_of(index), mask_of(case.selection))
    want = REFERENCE.reverse_selection(case.selection)
    for name in ("row_offsets", "query_ids", "slots", "counts"):
        same(name, getattr(index, name), getattr(want, name))
    return same("block size and k", (index.block_size, index.top_k), (want.block_size, want.top_k))


@holds_for(strategies.cases, needs=("reverse_selection",))
def r13_slots_are_ranks_and_queries_ascend(subject: Subject, case: Case) -> Measure:
    """The queries of a row ascend, and each slot is the place of the block in the query's ids."""
    index: ReverseIndex = subject.run("reverse_selection", case.selection, cast="float32")
    ids, cu_blocks = case.selection.indices, case.sequences.cu_blocks(case.config.block_size)
    offsets = index.row_offsets.tolist()
    same("rows", len(offsets) - 1, case.groups * cu_blocks[-1])
    for row, (start, stop) in enumerate(zip(offsets, offsets[1:])):
        r, block = divmod(row, cu_blocks[-1])
        first = max(b for b in cu_blocks[:-1] if b <= block)
        queries, slots = index.query_ids[start:stop], index.slots[start:stop]
        require(bool((np.diff(queries) > 0).all()), f"row {row} must ascend, got {queries}")
        found = ids[queries, r, slots]
        require(bool((found == block - first).all()), f"row {row} must hold its block, got {found}")
    return same("edges", offsets[-1], int((ids >= 0).sum()))


@holds_for(strategies.cases, needs=("schedule_chunks",))
def r14_the_schedule_means_the_reverse_index(subject: Subject, case: Case) -> Measure:
    """The schedule has the mask of the reverse index, and its arrays equal those of the spec."""
    index = REFERENCE.reverse_selection(case.selection)
    schedule: Schedule = subject.run("schedule_chunks", index, case.chunk_size, cast="float32")
    same("mask", mask_of(schedule), mask_of(index))
    want = REFERENCE.schedule_chunks(index, case.chunk_size)
    for name in ("rows", "starts", "stops"):
        same(name, getattr(schedule, name), getattr(want, name))
    return same("chunk_size", schedule.chunk_size, case.chunk_size)


@holds_for(strategies.cases, needs=("schedule_chunks",))
def r14_items_are_bounded_and_cover_each_edge_once(subject: Subject, case: Case) -> Measure:
    """An item has at most C edges of one row, and every edge is in exactly one item."""
    index = REFERENCE.reverse_selection(case.selection)
    schedule: Schedule = subject.run("schedule_chunks", index, case.chunk_size, cast="float32")
    lengths = schedule.stops - schedule.starts
    require(
        bool(((lengths >= 1) & (lengths <= case.chunk_size)).all()),
        f"items must have 1 to {case.chunk_size} edges, got {lengths}",
    )
    offsets = index.row_offsets
    first, last = offsets[schedule.rows], offsets[schedule.rows + 1]
    inside = (schedule.starts >= first) & (schedule.stops <= last)
    require(bool(inside.all()), "no item may cross a row")
    covered = np.zeros(offsets[-1], int)
    for start, stop in zip(schedule.starts.tolist(), schedule.stops.tolist()):
        covered[start:stop] += 1
    return same("times each edge is covered", covered, np.ones_like(covered))


@holds_for(wild, needs=("attend_chunks",))
def r15_partials_are_softmaxes_over_one_block(subject: Subject, case: Case) -> Measure:
    """Each edge's slot holds the output and LSE of attention over the tokens of its block."""
    partials, valid = own_partials(subject, case), valid_slots(case)
    same("counts", partials.counts, case.selection.counts)
    precision = subject.domain.precision(case.dtype)
    found: list[Measure] = []
    for s in range(case.config.top_k):
        mine = valid[..., s]
        want = dense(case.inputs, case.selection.indices[..., s : s + 1])
        out, lse = want.out_bound(precision), want.lse_bound(precision)
        found += [
            compare(f"out of slot {s}", partials.out[..., s, :][mine], want.out[mine], out[mine]),
            compare(f"lse of slot {s}", partials.lse[..., s][mine], want.lse[mine], lse[mine]),
        ]
    return worst(*found)


@holds_for(strategies.cases, needs=("attend_chunks",))
def r15_the_cut_into_items_does_not_matter(subject: Subject, case: Case) -> Measure:
    """Each slot holds the same partial result for every C, within the error bound."""
    whole = replace(case, chunk_size=10_000)
    small, large = own_partials(subject, case), own_partials(subject, whole)
    valid, precision = valid_slots(case), subject.domain.precision(case.dtype)
    found: list[Measure] = []
    for s in range(case.config.top_k):
        mine = valid[..., s]
        bound = dense(case.inputs, case.selection.indices[..., s : s + 1]).out_bound(precision)
        got, want = (p.out[..., s, :][mine] for p in (small, large))
        found.append(compare(f"out of slot {s}", got, want, 2 * bound[mine]))
    return worst(*found)


@holds_for(wild, needs=("combine_partials",))
def r16_combining_is_the_definition(subject: Subject, case: Case) -> Measure:
    """The LSE-weighted mean of exact partials is the attention; unused slots may hold NaN."""
    exact = replace(case, dtype="float64")
    vars(exact)["inputs"] = replace(case.inputs, dtype="float64")
    partials = own_partials(spec(subject), exact)
    valid = valid_slots(case)
    poisoned = replace(
        partials,
        out=np.where(valid[..., None], partials.out, np.nan),
        lse=np.where(valid, partials.lse, np.nan),
    )
    cast = "float64" if case.dtype == "float64" else "float32"
    dtype = subject.dtype(case.dtype)
    output: Output = subject.run("combine_partials", poisoned, cast=cast, dtype=dtype)
    return compare_output(subject, case.inputs, output, dense(case.inputs, case.selection.indices))


@holds_for(wild, needs=("attend_chunks", "combine_partials"))
def r16_the_lowering_ends_at_the_definition(subject: Subject, case: Case) -> Measure:
    """All steps of this backend, in both loop orders, end at the definition of attention."""
    inputs = case.inputs
    q, k, v, q_idx, k_idx = (subject.give(x, case.dtype) for x in (*inputs.main, *inputs.index))
    args = (inputs.sequences, inputs.config, case.chunk_size, case.tile_size)
    trace: Trace = subject.read(lower(subject.module, q, k, v, q_idx, k_idx, *args))
    selection: Selection = spec(subject).run(
        "select_fused", *inputs.index, *args[:2], cast=case.dtype
    )
    same("selection", trace.selection.indices, selection.indices)
    for form in (trace.reverse_index, trace.schedule, trace.tile_union):
        same(f"mask of {type(form).__name__}", mask_of(form), mask_of(selection))
    want = dense(inputs, selection.indices)
    outputs = (trace.output, trace.union_output)
    return worst(*(compare_output(subject, inputs, output, want) for output in outputs))


@holds_for(strategies.cases, needs=("unite_tiles",))
def r9_the_union_of_a_tile_means_the_selection(subject: Subject, case: Case) -> Measure:
    """The tile union has the mask of the selection, and its arrays equal those of the spec."""
    union: TileUnion = subject.run("unite_tiles", case.selection, case.tile_size, cast="float32")
    same("mask", mask_of(union), mask_of(case.selection))
    want = REFERENCE.unite_tiles(case.selection, case.tile_size)
    for name in ("starts", "stops", "block_ids", "row_masks", "tile_size", "block_size"):
        same(name, getattr(union, name), getattr(want, name))
    return same("sequences", union.sequences.cu_seqlens_q, want.sequences.cu_seqlens_q)
