"""R9-R12: attention over a selection, its LSE, the dense limit, dtypes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from msa.checks import dtype_name
from msa.config import MSAConfig
from msa.conformance import strategies
from msa.conformance.backends import Subject
from msa.conformance.cases import Case, Fill, Picks
from msa.conformance.properties import holds_for
from msa.conformance.run_stage import (
    attend,
    attend_selection,
    compare_output,
    dense,
    select_fused,
    selected,
    spec,
)
from msa.conformance.tolerances import Measure, compare, require, same
from msa.conformance.yardstick import Attention, causal_mask
from msa.ir import Sequences, TileUnion

HUGE_LOGIT = Case(
    MSAConfig(block_size=16, top_k=1), Sequences.one(1, 1),
    groups=1, group=1, dims=(1, 1, 1), dtype="float32",
    q=Fill(kind="ties"), k=Fill(kind="enormous"),
)  # fmt: skip
"""On a GPU a fused multiply-add gave a logit minus its maximum as half an ulp of 1e14, not 0."""
LOW_LOGITS = replace(
    HUGE_LOGIT,
    sequences=Sequences.one(2, 2),
    q=Fill(planted=((0, 1e17), (1, 1e17))),
    k=Fill(planted=((0, -1e17), (1, -1e17))),
    v=Fill("integers", seed=1),
)
"""Every logit of a row is -1e34. A running maximum that starts above this loses all of them."""
EQUAL_LOGITS = replace(
    HUGE_LOGIT,
    config=MSAConfig(block_size=16, top_k=3, softmax_scale=2.0**24),
    sequences=Sequences.one(48, 48),
    q=Fill("ones"),
    k=Fill("ones"),
    picks=Picks("full"),
)
"""All logits are 2^24. In float32 their LSE is the same for 3 tokens as for 48."""

wild = partial(strategies.cases, want=strategies.WILD)


@holds_for(wild, needs=("attend_selection",), seeds=(HUGE_LOGIT, LOW_LOGITS))
def r9_attention_over_a_selection_is_the_definition(subject: Subject, case: Case) -> Measure:
    """Attention over any canonical selection is the softmax over its visible tokens."""
    output = attend_selection(subject, case.inputs, case.selection)
    return compare_output(subject, case.inputs, output, dense(case.inputs, case.selection.indices))


@holds_for(wild, needs=("attend",))
def r9_the_whole_path_is_the_definition(subject: Subject, case: Case) -> Measure:
    """attend gives the selection of the spec, and the softmax over its visible tokens."""
    output = attend(subject, case.inputs)
    want = select_fused(spec(subject), case.inputs)
    same("selection", selected(output), want.indices)
    return compare_output(subject, case.inputs, output, dense(case.inputs, want.indices))


@holds_for(wild, needs=("attend_selection",), seeds=(HUGE_LOGIT, LOW_LOGITS, EQUAL_LOGITS))
def r9_the_weights_of_a_query_sum_to_1(subject: Subject, case: Case) -> Measure:
    """If all values are 1, out is 1, even if large logits are rounded coarsely."""
    inputs = case.inputs
    q, k, v = inputs.main
    inputs = replace(inputs, main=(q, k, np.ones_like(v)))
    output = attend_selection(subject, inputs, case.selection)
    return compare_output(subject, inputs, output, dense(inputs, case.selection.indices))


@holds_for(strategies.cases, needs=("attend_selection",))
def r9_blocks_not_selected_do_not_matter(subject: Subject, case: Case) -> Measure:
    """Changes of keys and values in blocks that a query did not select do not change its result."""
    inputs, selection = case.inputs, case.selection
    block = case.config.block_size
    victim = case.chunk_size % max(1, case.sequences.max_blocks(block))
    changed = inputs
    for _, ks in case.sequences.spans():
        start = min(ks.start + victim * block, ks.stop)
        changed = changed.change(slice(0), slice(start, min(start + block, ks.stop)), 3.0)
    output = attend_selection(subject, changed, selection)
    spared = ~(selection.indices == victim).any(-1).repeat(case.group, axis=1)
    return compare_output(subject, inputs, output, dense(inputs, selection.indices), spared)


@holds_for(wild, needs=("unite_tiles", "attend_union"), seeds=(HUGE_LOGIT, LOW_LOGITS))
def r9_the_union_walk_is_the_definition(subject: Subject, case: Case) -> Measure:
    """The running softmax along the union of neighbouring queries' blocks gives the same result."""
    inputs = case.inputs
    union: TileUnion = spec(subject).run(
        "unite_tiles", case.selection, case.tile_size, cast=case.dtype
    )
    args = (*inputs.main, union, inputs.scale)
    output = subject.run("attend_union", *args, cast=case.dtype)
    return compare_output(subject, inputs, output, dense(inputs, case.selection.indices))


@holds_for(wild, needs=("attend_selection", "lse"), seeds=(HUGE_LOGIT, LOW_LOGITS))
def r10_lse_is_the_natural_logarithm_in_float32(subject: Subject, case: Case) -> Measure:
    """lse is the log of the sum of exp of the scaled scores, in float32 for every dtype."""
    output = attend_selection(subject, case.inputs, case.selection)
    require(output.lse.dtype == np.float32, f"lse must be float32, got {output.lse.dtype}")
    want = dense(case.inputs, case.selection.indices)
    bound = want.lse_bound(subject.domain.precision(case.dtype))
    return compare("lse", output.lse, want.lse, bound)


@holds_for(strategies.cases, needs=("attend", "lse"))
def r10_lse_of_the_whole_path_too(subject: Subject, case: Case) -> Measure:
    """The lse of the whole path is that of the selected blocks, in float32."""
    output = attend(subject, case.inputs)
    require(output.lse.dtype == np.float32, f"lse must be float32, got {output.lse.dtype}")
    want = dense(case.inputs, selected(output))
    bound = want.lse_bound(subject.domain.precision(case.dtype))
    return compare("lse", output.lse, want.lse, bound)


@holds_for(strategies.cases, needs=("attend",))
def r11_with_many_places_it_is_causal_attention(subject: Subject, case: Case) -> Measure:
    """If k is at least the number of blocks, the result is dense causal attention (GQA)."""
    blocks = max(1, case.sequences.max_blocks(case.config.block_size))
    config = replace(case.config, top_k=max(blocks, case.config.forced_blocks))
    inputs = replace(case.inputs, config=config)
    mask = causal_mask(case.sequences, case.groups)
    want = Attention(*inputs.main, mask, inputs.scale, parts=config.top_k)
    return compare_output(subject, inputs, attend(subject, inputs), want)


@holds_for(strategies.cases, needs=("attend",))
def r12_out_has_the_dtype_of_q(subject: Subject, case: Case) -> Measure:
    """The backend returns out in the dtype of q, lse in float32 and indices in int32."""
    inputs = case.inputs
    given = [subject.give(x, case.dtype) for x in (*inputs.main, *inputs.index)]
    named = subject.option("attend")
    output = subject.module.attend(*given, inputs.sequences, inputs.config, **named)
    heads = case.groups * case.group
    for name, array, shape, dtype in (
        ("out", output.out, (case.sequences.total_q, heads, case.dims[1]), case.dtype),
        ("lse", output.lse, (case.sequences.total_q, heads), "float32"),
        ("indices", selected(output), (*inputs.index[0].shape[:2], case.config.top_k), "int32"),
    ):
        require(dtype_name(array) == dtype, f"{name} must be {dtype}, got {dtype_name(array)}")
        same(f"shape of {name}", tuple(array.shape), shape)
    read = subject.read(output)
    return compare_output(subject, inputs, read, dense(inputs, selected(read)))
