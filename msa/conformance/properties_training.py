"""R17, R18: the KL loss of the index branch, and gradients."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from msa.conformance import strategies
from msa.conformance.backends import Subject
from msa.conformance.cases import Case, Inputs
from msa.conformance.gradients import (
    alignment,
    attention_gradients,
    directions,
    leaves,
    moved,
    pull_back,
    slope,
    spec_alignment,
    spec_attention,
)
from msa.conformance.properties import holds_for
from msa.conformance.strategies import Want
from msa.conformance.tolerances import AGREES, Measure, compare, require, same, worst
from msa.conformance.yardstick import Attention, block_mask, causal_mask
from msa.conformance.yardstick_training import Alignment, Gradients
from msa.ir import Array, Selection

REAL = ("zeros", "ties", "normal")
MILD = Want(main=REAL, values=REAL, index=REAL, planted=False)
PLANTED = Want(main=("zeros", "ties"), index=("zeros", "ties"))
DOUBLE = Want(main=REAL, values=REAL, index=REAL, planted=False, dtypes=("float64",), tokens=16)
mild = partial(strategies.cases, want=MILD)
double = partial(strategies.cases, want=DOUBLE)


def yardstick(inputs: Inputs, selection: Selection | None, groups: int) -> Alignment:
    """The two branches over the same support; the index branch is one more attention."""
    if selection is None:
        mask = causal_mask(inputs.sequences, groups)
    else:
        mask = block_mask(selection.indices, inputs.sequences, inputs.config.block_size)
    q, k, v = inputs.main
    q_idx, k_idx = inputs.index
    keys = np.repeat(k_idx[:, None], groups, axis=1)
    student = Attention(q_idx, keys, keys, mask, inputs.index_scale)
    return Alignment(Attention(q, k, v, mask, inputs.scale), student)


def loss_of(subject: Subject, inputs: Inputs, selection: Selection | None) -> Array:
    """The stage, forward only."""
    args = (*inputs.main[:2], *inputs.index, selection, inputs.sequences, inputs.config)
    return subject.run("align_index", *args, cast=inputs.dtype)


def upstream(case: Case) -> tuple[Array, Array]:
    """d_out [Tq, Hq, Dv] and d_lse [Tq, Hq], exact in the case's dtype."""
    shape = (case.sequences.total_q, case.groups * case.group)
    fill = replace(case.v, kind="ties")
    return fill.make((*shape, case.dims[1]), case.dtype), fill.make(shape, case.dtype)


@holds_for(mild, needs=("align_index",))
def r17_the_loss_is_the_kl_over_selected_tokens(subject: Subject, case: Case) -> Measure:
    """Teacher: mean of the heads' probabilities; student: softmax of the scores (eq. 9-10)."""
    inputs, selection = case.inputs, case.selection
    want = yardstick(inputs, selection, case.groups)
    bound = want.bound(subject.domain.precision(case.dtype))
    loss = loss_of(subject, inputs, selection)
    require(float(loss) >= -bound, f"a divergence must not be negative, got {loss}")
    return compare("loss", loss, np.float64(want.loss()), np.float64(bound))


@holds_for(mild, needs=("align_index",))
def r17_the_warm_up_form_is_dense(subject: Subject, case: Case) -> Measure:
    """Without a selection both distributions run over all visible tokens."""
    want = yardstick(case.inputs, None, case.groups)
    bound = want.bound(subject.domain.precision(case.dtype))
    loss = loss_of(subject, case.inputs, None)
    return compare("loss", loss, np.float64(want.loss()), np.float64(bound))


@holds_for(partial(strategies.cases, want=PLANTED), needs=("align_index",))
def r17_nan_scores_count_as_minus_infinity(subject: Subject, case: Case) -> Measure:
    """Where the index branch has NaN or infinities the loss is the reference's, infinite or not."""
    found: list[Measure] = []
    precision = subject.domain.precision(case.dtype)
    plain = [replace(fill, planted=()) for fill in (case.q_idx, case.k_idx)]
    tame = replace(case, q_idx=plain[0], k_idx=plain[1]).inputs
    for selection in (case.selection, None):
        want = spec_alignment(case.inputs, selection, case.inputs.index)
        loss = loss_of(subject, case.inputs, selection)
        require(not np.isnan(loss), "the loss must be a number")
        # tokens drop out of the student; its other logarithms grow by no more than the loss does
        bound = yardstick(tame, selection, case.groups).bound(precision) * (1 + abs(want))
        found.append(compare("loss", loss, np.float64(want), np.float64(bound)))
    return worst(*found)


@holds_for(mild, needs=("align_index",))
def r17_a_perfect_student_has_no_loss(subject: Subject, case: Case) -> Measure:
    """One head per group and an index branch equal to the main branch: KL = 0."""
    q, k, v = case.inputs.main
    q, k, v = q[:, :1], k[:, :1], v[:, :1]
    config = replace(case.config, index_scale=case.inputs.scale, softmax_scale=case.inputs.scale)
    inputs = replace(case.inputs, main=(q, k, v), index=(q, k[:, 0]), config=config)
    selection = replace(case.selection, indices=case.selection.indices[:, :1])
    bound = yardstick(inputs, selection, 1).bound(subject.domain.precision(case.dtype))
    return compare("loss", loss_of(subject, inputs, selection), np.float64(0), np.float64(bound))


@holds_for(mild, needs=("align_index", "backward"))
def r17_gradients_reach_the_index_branch_only(subject: Subject, case: Case) -> Measure:
    """d KL / d scores = (student - teacher) / (Tq Hkv) for q_idx and k_idx; none for q and k."""
    found: list[Measure] = []
    precision = subject.domain.precision(case.dtype)
    for selection in (case.selection, None):
        _, grads = alignment(subject, case.inputs, selection)
        for name in ("q", "k"):
            grad = grads[name]
            require(grad is None or not grad.any(), f"{name} must get no gradient (R17)")
        want = yardstick(case.inputs, selection, case.groups)
        values, bounds = want.gradients(), want.gradient_bounds(precision)
        for name in ("q_idx", "k_idx"):
            got = grads[name]
            if got is None:  # no query, so no graph
                got = np.zeros_like(values[name])
            found.append(compare(f"gradient of {name}", got, values[name], bounds[name]))
    return worst(*found)


@holds_for(double, needs=("align_index", "backward"))
def r17_gradients_are_those_of_the_spec(subject: Subject, case: Case) -> Measure:
    """Finite differences of the reference in float64 against autograd in float64."""
    inputs = case.inputs
    found: list[Measure] = []
    for selection in (case.selection, None):
        _, grads = alignment(subject, inputs, selection)
        for which, direction in enumerate(directions(inputs.index, case.q.seed)):
            grad = grads[("q_idx", "k_idx")[which]]
            got = 0.0 if grad is None else float((grad * direction).sum())
            want = slope(
                lambda t, s=selection, w=which, d=direction: spec_alignment(
                    inputs, s, moved(inputs.index, w, t * d)
                )
            )
            bound = 1e-11 * (1 + np.abs(direction).sum())
            found.append(compare("slope", np.float64(got), np.float64(want), np.float64(bound)))
    return worst(*found)


@holds_for(mild, needs=("attend_selection", "backward"))
def r18_gradients_in_every_dtype(subject: Subject, case: Case) -> Measure:
    """dq, dk, dv of out and lse together, within the budget carried through the chain rule."""
    inputs, (d_out, d_lse) = case.inputs, upstream(case)
    got = attention_gradients(subject, inputs, case.selection, d_out, d_lse)
    mask = block_mask(case.selection.indices, case.sequences, case.config.block_size)
    attention = Attention(*inputs.main, mask, inputs.scale, parts=case.config.top_k)
    want = Gradients(attention, d_out, d_lse)
    values, bounds = want.values(), want.bounds(subject.domain.precision(case.dtype))
    return worst(*(compare(f"d{n}", got[n], values[n], bounds[n]) for n in "qkv"))


@holds_for(double, needs=("attend_selection", "backward"))
def r18_gradients_are_those_of_the_spec(subject: Subject, case: Case) -> Measure:
    """Finite differences of the reference in float64, selection fixed, against autograd."""
    inputs, selection = case.inputs, case.selection
    d_out, d_lse = upstream(case)
    grads = attention_gradients(subject, inputs, selection, d_out, d_lse)
    found: list[Measure] = []
    for which, direction in enumerate(directions(inputs.main, case.q.seed)):
        got = float((grads["qkv"[which]] * direction).sum())
        want = slope(
            lambda t, w=which, d=direction: spec_attention(
                inputs, selection, moved(inputs.main, w, t * d), d_out, d_lse
            )
        )
        bound = 1e-11 * (1 + np.abs(direction).sum() * (1 + np.abs(inputs.main[2]).max(initial=0)))
        found.append(compare("slope", np.float64(got), np.float64(want), np.float64(bound)))
    return worst(*found)


@holds_for(mild, needs=("attend", "backward"))
def r18_selection_has_no_gradient(subject: Subject, case: Case) -> Measure:
    """Through the whole path q, k and v get gradients; q_idx and k_idx get none."""
    inputs = case.inputs
    tensors = leaves(subject, (*inputs.main, *inputs.index), inputs.dtype)
    output = subject.module.attend(*tensors, inputs.sequences, inputs.config)
    d_out, d_lse = upstream(case)
    given = [subject.give(d_out, inputs.dtype), subject.give(d_lse, "float32")]
    pull_back([output.out, output.lse], given)
    for name, tensor in zip(("q_idx", "k_idx"), tensors[3:]):
        nothing = tensor.grad is None or not bool(tensor.grad.any())
        require(nothing, f"{name} must get no gradient through the selection (R18)")
    selection = subject.read(output.selection)
    direct = attention_gradients(subject, inputs, selection, d_out, d_lse)
    for name, tensor in zip("qkv", tensors):
        same(f"d{name}", subject.read(tensor.grad), direct[name])
    return AGREES
