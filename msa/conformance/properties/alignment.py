"""R17: the KL loss of the index branch."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from msa.checks import dtype_name
from msa.config import MSAConfig
from msa.conformance import strategies
from msa.conformance.backends import Subject
from msa.conformance.cases import Case, Fill, Inputs, Picks
from msa.conformance.gradients import spec_alignment
from msa.conformance.properties import holds_for
from msa.conformance.run_stage import attend, selected
from msa.conformance.strategies import Want, mild
from msa.conformance.tolerances import LSE_STORED, Measure, compare, require, same, worst
from msa.conformance.yardstick import Attention, block_mask, causal_mask
from msa.conformance.yardstick_training import Alignment
from msa.ir import Array, Selection, Sequences

PLANTED = Want(main=("zeros", "ties"), index=("zeros", "ties"))
planted = partial(strategies.cases, want=PLANTED)
ONE_TOKEN = Case(
    config=MSAConfig(block_size=16, top_k=1),
    sequences=Sequences((0, 1, 2), (0, 1, 18)),
    groups=1,
    group=2,
    dims=(4, 4, 4),
    dtype="float32",
    q=Fill("normal", seed=1),
    k=Fill("normal", seed=2),
    q_idx=Fill("normal", seed=3),
    k_idx=Fill("normal", seed=4),
)
"""Each query sees one token: the first of a sequence, or for k = 1 the first of a block."""
TIES = replace(
    ONE_TOKEN,
    config=MSAConfig(block_size=16, top_k=2),
    sequences=Sequences.one(40, 40),
    q_idx=Fill(),
    k_idx=Fill(),
    picks=Picks("full"),
)
"""All scores of the index branch are equal."""


def alignment_yardstick(inputs: Inputs, selection: Selection | None, groups: int) -> Alignment:
    """The KL loss of the yardstick: both branches are attentions over the same support."""
    if selection is None:
        mask = causal_mask(inputs.sequences, groups)
    else:
        mask = block_mask(selection.indices, inputs.sequences, selection.block_size)
    q, k, v = inputs.main
    q_idx, k_idx = inputs.index
    keys = np.repeat(k_idx[:, None], groups, axis=1)
    student = Attention(q_idx, keys, keys, mask, inputs.index_scale)
    return Alignment(Attention(q, k, v, mask, inputs.scale), student)


def loss_of(
    subject: Subject, inputs: Inputs, selection: Selection | None, lse: Array | None = None
) -> Array:
    """Call align_index without gradients. lse keeps its dtype."""
    args = (*inputs.main[:2], *inputs.index, selection)
    given = [subject.give(x, inputs.dtype) for x in args]
    known = () if lse is None else (subject.give(lse, dtype_name(lse)),)
    args = (*given, inputs.sequences, inputs.config, *known)
    loss = subject.module.align_index(*args, **subject.option("align_index"))
    return subject.read(loss)


@holds_for(mild, needs=("align_index",), seeds=(ONE_TOKEN, TIES))
def r17_the_loss_is_the_kl_over_selected_tokens(subject: Subject, case: Case) -> Measure:
    """The loss is the KL of the heads' mean probabilities against the softmax of the scores."""
    inputs, selection = case.inputs, case.selection
    want = alignment_yardstick(inputs, selection, case.groups)
    bound = want.bound(subject.domain.precision(case.dtype))
    loss = loss_of(subject, inputs, selection)
    require(float(loss) >= -bound, f"a divergence must not be negative, got {loss}")
    return compare("loss", loss, np.float64(want.loss()), np.float64(bound))


@holds_for(mild, needs=("align_index",), seeds=(ONE_TOKEN, TIES))
def r17_the_warm_up_form_is_dense(subject: Subject, case: Case) -> Measure:
    """Without a selection both distributions are over all visible tokens."""
    want = alignment_yardstick(case.inputs, None, case.groups)
    bound = want.bound(subject.domain.precision(case.dtype))
    loss = loss_of(subject, case.inputs, None)
    return compare("loss", loss, np.float64(want.loss()), np.float64(bound))


@holds_for(planted, needs=("align_index",))
def r17_nan_scores_count_as_minus_infinity(subject: Subject, case: Case) -> Measure:
    """With NaN or infinities in the index branch the loss equals that of the reference."""
    found: list[Measure] = []
    precision = subject.domain.precision(case.dtype)
    plain = [replace(fill, planted=()) for fill in (case.q_idx, case.k_idx)]
    tame = replace(case, q_idx=plain[0], k_idx=plain[1]).inputs
    for selection in (case.selection, None):
        want = spec_alignment(case.inputs, selection, case.inputs.index)
        loss = loss_of(subject, case.inputs, selection)
        require(not np.isnan(loss), "the loss must be a number")
        # the student loses tokens, and its other logarithms grow by at most the growth of the loss
        bound = alignment_yardstick(tame, selection, case.groups).bound(precision) * (1 + abs(want))
        found.append(compare("loss", loss, np.float64(want), np.float64(bound)))
    return worst(*found)


@holds_for(mild, needs=("align_index",))
def r17_a_perfect_student_has_no_loss(subject: Subject, case: Case) -> Measure:
    """The loss is 0 if each group has one head and the index branch equals the main branch."""
    q, k, v = case.inputs.main
    q, k, v = q[:, :1], k[:, :1], v[:, :1]
    config = replace(case.config, index_scale=case.inputs.scale, softmax_scale=case.inputs.scale)
    inputs = replace(case.inputs, main=(q, k, v), index=(q, k[:, 0]), config=config)
    selection = replace(case.selection, indices=case.selection.indices[:, :1])
    bound = alignment_yardstick(inputs, selection, 1).bound(subject.domain.precision(case.dtype))
    return compare("loss", loss_of(subject, inputs, selection), np.float64(0), np.float64(bound))


@holds_for(mild, needs=("align_index",), seeds=(ONE_TOKEN, TIES))
def r17_a_known_lse_changes_nothing(subject: Subject, case: Case) -> Measure:
    """The loss is the same, up to rounding, if the LSE of the same support is given."""
    found: list[Measure] = []
    precision = subject.domain.precision(case.dtype)
    for selection in (case.selection, None):
        want = alignment_yardstick(case.inputs, selection, case.groups)
        for dtype, kept in (("float32", LSE_STORED), ("float64", 0.0)):
            loss = loss_of(subject, case.inputs, selection, want.attention.lse.astype(dtype))
            bound = replace(want, lse_kept=kept).bound(precision)
            found.append(compare("loss", loss, np.float64(want.loss()), np.float64(bound)))
    return worst(*found)


@holds_for(mild, needs=("attend", "align_index"))
def r17_one_call_gives_the_loss_too(subject: Subject, case: Case) -> Measure:
    """attend(align=True) adds kl over its selection, and changes no bit of the other results."""
    inputs = case.inputs
    plain, output = attend(subject, inputs), attend(subject, inputs, align=True)
    require(plain.kl is None, f"kl must be None where it was not asked for, got {plain.kl}")
    same("selection", selected(output), selected(plain))
    same("out", output.out, plain.out)
    same("lse", output.lse, plain.lse)
    dtype = "float64" if case.dtype == "float64" else "float32"
    require(dtype_name(output.kl) == dtype, f"kl must be {dtype}, got {dtype_name(output.kl)}")
    want = alignment_yardstick(inputs, output.selection, case.groups)
    bound = want.bound(subject.domain.precision(case.dtype))
    return compare("kl", output.kl, np.float64(want.loss()), np.float64(bound))
