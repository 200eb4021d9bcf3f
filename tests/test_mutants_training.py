"""The properties of training can fail: bugs are planted in the torch backend's gradients.

Each keeps the values and changes a gradient, like bugs in backward passes. The properties' own
seeds are tried first, then a search.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import Phase
from test_mutants import attempt

from msa import torch_impl
from msa.conformance import as_module, subjects
from msa.torch_impl import attention, gradients, index_loss


def as_if(value, slope):
    """The value of one tensor with the gradient of the other."""
    return slope + (value - slope).detach()


def patched(owner, name, change):
    """Replace a function inside the torch backend by `change` of it, for a with statement."""
    return lambda: mock.patch.object(owner, name, change(getattr(owner, name)))


# -- functions of the contract --------------------------------------------------------------------
def k_counted_twice(q, k, v, selection, softmax_scale):
    return torch_impl.attend_selection(q, as_if(k, 2 * k), v, selection, softmax_scale)


def noisy_attention(q, k, v, selection, softmax_scale):
    """Sums are added in a random order, which changes the last bits."""
    noise = 1 + 1e-6 * torch.rand(())
    return torch_impl.attend_selection(q * noise, k, v, selection, softmax_scale)


def sign_turned(*args):
    loss = torch_impl.align_index(*args)
    return as_if(loss, -loss)


def noisy_alignment(*args):
    loss = torch_impl.align_index(*args)
    return as_if(loss, (1 + 1e-6 * torch.rand(())) * loss)


def leak_to(place):
    """The teacher is not detached, or lse is not."""

    def leaking(*args):
        loss = torch_impl.align_index(*args)
        return as_if(loss, loss + args[place].sum()) if len(args) > place else loss

    return leaking


def leak_in_one_call(*args, align=False):
    """The loss gets the main branch's tensors without detaching them."""
    output = torch_impl.attend(*args, align=align)
    return replace(output, kl=as_if(output.kl, output.kl + args[1].sum())) if align else output


# -- inside the backward pass ---------------------------------------------------------------------
def an_item_left_out(add_to_rows):
    """dK and dV lack the last work item of a batch."""
    return lambda total, rows, addends: add_to_rows(total, rows[:-1], addends[:-1])


def delta_without_d_lse(selection_gradients):
    def spoiled(inputs, outputs, d_outputs, selection, scale):
        d_out, d_lse = d_outputs
        return selection_gradients(inputs, outputs, (d_out, 0 * d_lse), selection, scale)

    return spoiled


def infinities_subtracted(log_softmax):
    """The student computes inf - inf."""
    return lambda scores, support: torch.where(support, scores, -torch.inf).log_softmax(-1)


SEEDS_FIRST = (Phase.explicit, Phase.generate)
REACH, SLOPES = "r17_gradients_reach_the_index_branch_only", "r17_gradients_are_those_of_the_spec"
MAIN = ("r18_gradients_in_every_dtype", "r18_gradients_are_those_of_the_spec")
MUTANTS = {  # the property that finds it; changed functions of the contract, or a patch below
    "k_counted_twice": (MAIN, {"attend_selection": k_counted_twice}),
    "noisy_attention": (
        ("r19_gradients_have_the_same_bits",), {"attend_selection": noisy_attention}
    ),
    "sign_turned": ((REACH, SLOPES), {"align_index": sign_turned}),
    "noisy_alignment": (("r19_alignment_has_the_same_bits",), {"align_index": noisy_alignment}),
    "leak_to_q": ((REACH,), {"align_index": leak_to(0)}),
    "leak_to_k": ((REACH,), {"align_index": leak_to(1)}),
    "leak_to_lse": ((REACH,), {"align_index": leak_to(7)}),
    "leak_in_one_call": (("r17_one_call_gives_all_gradients",), {"attend": leak_in_one_call}),
    "item_left_out": (MAIN, patched(gradients, "add_to_rows", an_item_left_out)),
    "delta_without_d_lse": (MAIN, patched(attention, "selection_gradients", delta_without_d_lse)),
    "infinities_subtracted": (
        ("r17_infinite_scores_have_finite_slopes",),
        patched(index_loss, "log_softmax", infinities_subtracted),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("properties", "bug"), MUTANTS.values(), ids=MUTANTS)
def test_a_planted_bug_is_found(properties, bug):
    (subject, *_) = subjects(("torch",))
    functions, spoil = (bug, nullcontext) if isinstance(bug, dict) else ({}, bug)
    mutant = replace(subject, name="mutant", module=as_module(functions, like=subject.module))
    for name in properties:
        with spoil():
            tally = attempt(name, mutant, phases=SEEDS_FIRST)
        assert isinstance(tally.error, AssertionError), f"{name} let it pass: {tally.error!r}"
        assert attempt(name, subject, 5, SEEDS_FIRST).error is None
