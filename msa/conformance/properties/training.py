"""R17, R18: gradients of the alignment loss, and of attention with a fixed selection."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from msa.conformance.backends import Subject
from msa.conformance.cases import Case
from msa.conformance.gradients import (
    alignment_gradients,
    attention_and_alignment,
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
from msa.conformance.properties.alignment import ONE_TOKEN, TIES, alignment_yardstick, planted
from msa.conformance.strategies import double, mild
from msa.conformance.tolerances import (
    AGREES,
    LSE_STORED,
    Measure,
    Precision,
    compare,
    require,
    same,
    worst,
)
from msa.conformance.yardstick import Attention, block_mask
from msa.conformance.yardstick_training import Alignment, Gradients
from msa.ir import Array

INDEX = ("q_idx", "k_idx")


def upstream(case: Case) -> tuple[Array, Array]:
    """The upstream gradients d_out [Tq, Hq, Dv] and d_lse [Tq, Hq], exact in the case's dtype."""
    shape = (case.sequences.total_q, case.groups * case.group)
    fill = replace(case.v, kind="ties")
    return fill.make((*shape, case.dims[1]), case.dtype), fill.make(shape, case.dtype)


def require_no_gradient(name: str, grad: Array | None) -> None:
    """Check that a gradient is None or exactly 0."""
    require(grad is None or not grad.any(), f"{name} must get no gradient (R17)")


def compare_index_gradients(
    want: Alignment, grads: dict[str, Array | None], names: tuple[str, ...], precision: Precision,
) -> Measure:  # fmt: skip
    """Check each entry of the gradients of the alignment loss against its error bound."""
    values, bounds = want.gradients(), want.gradient_bounds(precision)
    found: list[Measure] = []
    for name in names:
        got = grads[name]
        if got is None:  # without queries there is no graph
            got = np.zeros_like(values[name])
        found.append(compare(f"gradient of {name}", got, values[name], bounds[name]))
    return worst(*found)


@holds_for(mild, needs=("align_index", "backward"), seeds=(ONE_TOKEN, TIES))
def r17_gradients_reach_the_index_branch_only(subject: Subject, case: Case) -> Measure:
    """The gradient in the scores is (student - teacher) / (Tq Hkv); q, k and lse get none."""
    found: list[Measure] = []
    inputs, precision = case.inputs, subject.domain.precision(case.dtype)
    for selection in (case.selection, None):
        want = alignment_yardstick(inputs, selection, case.groups)
        lse = want.attention.lse.astype(np.float32)
        for known, kept in ((None, 0.0), (lse, LSE_STORED)):
            _, grads = alignment_gradients(subject, inputs, selection, known)
            require_no_gradient("q", grads["q"])
            require_no_gradient("k", grads["k"])
            require_no_gradient("lse", grads.get("lse"))
            found.append(
                compare_index_gradients(replace(want, lse_kept=kept), grads, INDEX, precision)
            )
    return worst(*found)


@holds_for(planted, needs=("align_index", "backward"))
def r17_infinite_scores_have_finite_slopes(subject: Subject, case: Case) -> Measure:
    """NaN or infinities in q_idx leave the gradient of q_idx finite; the same for k_idx.

    The reason is that student - teacher stays a number. The gradient of the other tensor is not
    tested, because it is a sum over numbers that are not finite.
    """
    found: list[Measure] = []
    precision = subject.domain.precision(case.dtype)
    plain = {name: replace(getattr(case, name), planted=()) for name in INDEX}
    tame = replace(case, **plain)
    for name in INDEX:
        wild = replace(tame, **{name: getattr(case, name)})
        for selection in (case.selection, None):
            _, grads = alignment_gradients(subject, wild.inputs, selection)
            want = alignment_yardstick(tame.inputs, selection, case.groups)
            scores = alignment_yardstick(wild.inputs, selection, case.groups).index.logits
            found.append(
                compare_index_gradients(replace(want, scores=scores), grads, (name,), precision)
            )
    return worst(*found)


@holds_for(mild, needs=("attend", "align_index", "backward"))
def r17_one_call_gives_all_gradients(subject: Subject, case: Case) -> Measure:
    """With align=True kl has gradients in q_idx and k_idx only, and out and lse as without it."""
    inputs, d_outs = case.inputs, upstream(case)
    silent = tuple(np.zeros_like(x) for x in d_outs)
    _, grads = attention_and_alignment(subject, inputs, *silent, d_kl=1.0)
    for name in "qkv":
        require_no_gradient(name, grads[name])
    selection, grads = attention_and_alignment(subject, inputs, *d_outs, d_kl=1.0)
    direct = attention_gradients(subject, inputs, selection, *d_outs)
    for name in "qkv":
        same(f"d{name}", grads[name], direct[name])
    want = alignment_yardstick(inputs, selection, case.groups)
    return compare_index_gradients(want, grads, INDEX, subject.domain.precision(case.dtype))


@holds_for(double, needs=("align_index", "backward", "float64"))
def r17_gradients_are_those_of_the_spec(subject: Subject, case: Case) -> Measure:
    """Autograd in float64 agrees with finite differences of the reference in float64."""
    inputs = case.inputs
    found: list[Measure] = []
    for selection in (case.selection, None):
        _, grads = alignment_gradients(subject, inputs, selection)
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
    """The gradients dq, dk, dv of out and lse together lie within their error bounds."""
    inputs, (d_out, d_lse) = case.inputs, upstream(case)
    got = attention_gradients(subject, inputs, case.selection, d_out, d_lse)
    mask = block_mask(case.selection.indices, case.sequences, case.config.block_size)
    attention = Attention(*inputs.main, mask, inputs.scale, parts=case.config.top_k)
    want = Gradients(attention, d_out, d_lse)
    values, bounds = want.values(), want.bounds(subject.domain.precision(case.dtype))
    return worst(*(compare(f"d{n}", got[n], values[n], bounds[n]) for n in "qkv"))


@holds_for(double, needs=("attend_selection", "backward", "float64"))
def r18_gradients_are_those_of_the_spec(subject: Subject, case: Case) -> Measure:
    """Autograd with a fixed selection agrees with finite differences of the reference."""
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
    """The whole path has gradients in q, k and v, and none in q_idx and k_idx."""
    inputs = case.inputs
    tensors = leaves(subject, (*inputs.main, *inputs.index), inputs.dtype)
    named = subject.option("attend")
    output = subject.module.attend(*tensors, inputs.sequences, inputs.config, **named)
    d_out, d_lse = upstream(case)
    given = [subject.give(d_out, inputs.dtype), subject.give(d_lse, "float32")]
    pull_back([output.out, output.lse], given)
    for name, tensor in zip(("q_idx", "k_idx"), tensors[3:]):
        without = tensor.grad is None or not bool(tensor.grad.any())
        require(without, f"{name} must get no gradient through the selection (R18)")
    selection = subject.read(output.selection)
    direct = attention_gradients(subject, inputs, selection, d_out, d_lse)
    for name, tensor in zip("qkv", tensors):
        same(f"d{name}", subject.read(tensor.grad), direct[name])
    return AGREES
