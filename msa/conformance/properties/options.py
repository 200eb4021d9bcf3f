"""R7, R9, R10, R19 for the options of a backend: loop orders, and 8-bit index tensors."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from msa.config import MSAConfig
from msa.conformance import strategies
from msa.conformance.backends import Subject
from msa.conformance.cases import Case, Fill, round_to_e4m3
from msa.conformance.properties import holds_for
from msa.conformance.properties.attention import LOW_LOGITS
from msa.conformance.properties.index import REAL, require_equal_up_to_rounding
from msa.conformance.run_stage import attend_selection, compare_output, dense, select_fused, spec
from msa.conformance.tolerances import Measure, same, worst
from msa.ir import Sequences

CONTESTED = strategies.Want(tokens=160, batch=(1, 2))  # usually more blocks than k
contested = partial(strategies.cases, want=CONTESTED)
contested_reals = partial(strategies.cases, want=replace(REAL, tokens=160, batch=(1, 2)))
ONE_INFINITY = Case(
    MSAConfig(block_size=16, top_k=2), Sequences.one(8, 130),
    groups=1, group=1, dims=(1, 1, 4), dtype="float32",
    q_idx=Fill("integers", seed=1),
    k_idx=Fill("integers", seed=2, planted=((0, np.inf),)),
)  # fmt: skip
"""If the infinity sets the scale of the 8-bit numbers, all finite numbers become 0."""


@holds_for(strategies.long_unions, needs=("attend_selection", "loop_order"), seeds=(LOW_LOGITS,))
def r9_every_loop_order_is_the_definition(subject: Subject, case: Case) -> Measure:
    """Every loop order is the definition, whether neighbours select the same blocks or not."""
    want = dense(case.inputs, case.selection.indices)
    outputs = [
        attend_selection(subject, case.inputs, case.selection, loop_order=order)
        for order in subject.loop_orders(case.group)
    ]
    return worst(*(compare_output(subject, case.inputs, output, want) for output in outputs))


@holds_for(strategies.long_unions, needs=("attend_selection", "loop_order"))
def r19_every_loop_order_gives_the_same_bits(subject: Subject, case: Case) -> Measure:
    """Two calls with one loop order give the same bits."""
    orders = subject.loop_orders(case.group)
    order = orders[case.picks.seed % len(orders) if case.picks else 0]
    one, two = (
        attend_selection(subject, case.inputs, case.selection, loop_order=order) for _ in range(2)
    )
    same(f"out of {order}", one.out, two.out)
    return same(f"lse of {order}", one.lse, two.lse)


def in_eight_bits(case: Case) -> Case:
    """The same call with its index tensors rounded to 8 bits."""
    q_idx, k_idx = (round_to_e4m3(x) for x in case.inputs.index)
    rounded = replace(case)
    vars(rounded)["inputs"] = replace(case.inputs, index=(q_idx, k_idx))
    return rounded


@holds_for(contested, needs=("select_fused", "index_dtype"), seeds=(ONE_INFINITY,))
def r7_eight_bits_select_by_the_rounded_tensors(subject: Subject, case: Case) -> Measure:
    """The selection equals that of the spec on rounded index tensors: integers, NaN, infinities."""
    got = select_fused(subject, case.inputs, index_dtype="fp8_e4m3")
    want = select_fused(spec(subject), in_eight_bits(case).inputs)
    return same("selection", got.indices, want.indices)


@holds_for(contested_reals, needs=("select_fused", "index_dtype"))
def r7_eight_bits_differ_only_within_rounding(subject: Subject, case: Case) -> Measure:
    """For real numbers the selection is that of rounded index tensors, up to rounding of sums."""
    got = select_fused(subject, case.inputs, index_dtype="fp8_e4m3")
    precision = subject.domain.precision("float8_e4m3fn")
    return require_equal_up_to_rounding(subject, in_eight_bits(case), got, precision)


@holds_for(contested, needs=("select_fused", "index_dtype"))
def r19_eight_bits_select_the_same_twice(subject: Subject, case: Case) -> Measure:
    """Two selections from 8-bit index tensors are equal, so their scales are too."""
    one, two = (select_fused(subject, case.inputs, index_dtype="fp8_e4m3") for _ in range(2))
    return same("selection", one.indices, two.indices)
