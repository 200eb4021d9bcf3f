"""Gradients of a backend by autograd, and of the reference by finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from msa.conformance.backends import REFERENCE, Subject
from msa.conformance.cases import Inputs
from msa.conformance.yardstick import Attention
from msa.ir import Array, Selection


def pull_back(outputs: list[Any], upstream: list[Any]) -> None:
    """Run the backward pass from several outputs in one call."""
    import torch

    torch.autograd.backward(outputs, upstream)


def leaves(subject: Subject, arrays: tuple[Array, ...], dtype: str) -> list[Any]:
    """The arrays as leaf tensors that require gradients."""
    return [subject.give(x, dtype).requires_grad_() for x in arrays]


def attention_gradients(
    subject: Subject, inputs: Inputs, selection: Selection, d_out: Array, d_lse: Array
) -> dict[str, Array]:
    """The gradients of <out, d_out> + <lse, d_lse> in q, k and v; the selection is fixed (R18)."""
    tensors = leaves(subject, inputs.main, inputs.dtype)
    own = subject.give(selection, inputs.dtype)
    named = subject.option("attend_selection")
    output = subject.module.attend_selection(*tensors, own, inputs.scale, **named)
    upstream = [subject.give(d_out, inputs.dtype), subject.give(d_lse, "float32")]
    pull_back([output.out, output.lse], upstream)
    return {name: subject.read(x.grad) for name, x in zip("qkv", tensors)}


def alignment_gradients(
    subject: Subject, inputs: Inputs, selection: Selection | None, lse: Array | None = None
) -> tuple[float, dict[str, Array | None]]:
    """The loss and its gradients in all inputs; None for an input without a gradient (R17).

    lse is passed as float32, as an attention returns it, and requires a gradient too.
    """
    q, k, _ = inputs.main
    tensors = leaves(subject, (q, k, *inputs.index), inputs.dtype)
    known = leaves(subject, () if lse is None else (lse,), "float32")
    own = subject.give(selection, inputs.dtype)
    args = (*tensors, own, inputs.sequences, inputs.config, *known)
    loss = subject.module.align_index(*args, **subject.option("align_index"))
    if loss.requires_grad:
        loss.backward()
    grads = gradients_left(subject, [*tensors, *known])
    return float(loss.detach()), dict(zip(("q", "k", "q_idx", "k_idx", "lse"), grads))


def gradients_left(subject: Subject, tensors: list[Any]) -> list[Array | None]:
    """The gradient of each tensor, or None."""
    return [None if x.grad is None else subject.read(x.grad) for x in tensors]


def attention_and_alignment(
    subject: Subject, inputs: Inputs, d_out: Array, d_lse: Array, d_kl: float
) -> tuple[Selection, dict[str, Array | None]]:
    """The gradients of <out, d_out> + <lse, d_lse> + d_kl * kl in all five inputs (R17, R18).

    One call of attend with align=True makes all three outputs. The first result is its selection.
    """
    tensors = leaves(subject, (*inputs.main, *inputs.index), inputs.dtype)
    named = subject.option("attend")
    output = subject.module.attend(*tensors, inputs.sequences, inputs.config, align=True, **named)
    upstream = [subject.give(d_out, inputs.dtype), subject.give(d_lse, "float32")]
    upstream.append(output.kl.new_full((), d_kl))
    pull_back([output.out, output.lse, output.kl], upstream)
    grads = gradients_left(subject, tensors)
    names = ("q", "k", "v", "q_idx", "k_idx")
    return subject.read(output.selection), dict(zip(names, grads))


# -- finite differences of the reference ----------------------------------------------------------
STEP = 2.0**-10
"""The error of the five-point rule is STEP^4 / 30, about 3e-14, times the fifth derivative."""


def slope(function: Callable[[float], float]) -> float:
    """The derivative at 0 by the five-point rule.

    >>> slope(lambda t: (1 + t) ** 3)
    3.0
    """
    near = function(STEP) - function(-STEP)
    far = function(2 * STEP) - function(-2 * STEP)
    return (8 * near - far) / (12 * STEP)


def spec_attention(
    inputs: Inputs, selection: Selection, main: tuple[Array, ...], d_out: Array, d_lse: Array
) -> float:
    """<out, d_out> + <lse, d_lse> by the reference.

    lse comes from the yardstick in float64: in float32 its rounding would hide the differences.
    """
    out = REFERENCE.attend_selection(*main, selection, inputs.scale).out
    q, k, v = main
    lse = Attention(q, k, v, REFERENCE.mask_of(selection), inputs.scale).lse
    return float((out * d_out).sum() + (lse * d_lse).sum())


def spec_alignment(inputs: Inputs, selection: Selection | None, index: tuple[Array, ...]) -> float:
    """The KL loss by the reference."""
    args = (selection, inputs.sequences, inputs.config)
    return float(REFERENCE.align_index(*inputs.main[:2], *index, *args))


def directions(arrays: tuple[Array, ...], seed: int) -> list[Array]:
    """A random direction for each array, short enough that no score moves by much more than 1."""
    rng = np.random.default_rng(seed)
    made = []
    for array in arrays:
        direction = rng.standard_normal(array.shape)
        made.append(direction / (4 * max(1, array.shape[-1]) ** 0.5))
    return made


def moved(arrays: tuple[Array, ...], which: int, step: Array) -> tuple[Array, ...]:
    """The arrays with `step` added to one of them."""
    return tuple(x + step if i == which else x for i, x in enumerate(arrays))
