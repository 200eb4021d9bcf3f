"""Kernels address every argument by its strides, in 64 bits.

A strided argument holds the same numbers as a contiguous one, so every result is equal to the bit.
What lies between the numbers is NaN, or an absurd integer. `far` puts the entries of one dim so far
apart that the last one lies beyond 2^31 numbers: in a sparse file, of which only what is touched
takes memory, or on a GPU.
"""

from __future__ import annotations

import ast
import inspect
from dataclasses import replace
from itertools import count

import pytest
import strided
import torch
from strided import (
    BLOCK,
    CONFIG,
    CUDA,
    DEVICE,
    DIM,
    GROUPS,
    HEADS,
    TOKENS,
    columns,
    far,
    normal,
    same,
    spaced,
    transposed,
    turned,
)

import msa
from msa import triton_impl
from msa.ir import Selection, Sequences

pytestmark = [pytest.mark.gpu] * CUDA
folder = strided.folder


def packed():
    return {
        "q": normal(0, TOKENS, HEADS, DIM), "k": normal(1, TOKENS, GROUPS, DIM),
        "v": normal(2, TOKENS, GROUPS, DIM), "q_idx": normal(3, TOKENS, GROUPS, DIM),
        "k_idx": normal(4, TOKENS, DIM),
    }  # fmt: skip


BORDERS = (0, TOKENS - 4, TOKENS)


def attend(tensors, order):
    """What comes out of attention."""
    output = msa.attention(
        **tensors, cu_seqlens_q=BORDERS, cu_seqlens_k=BORDERS, config=CONFIG, backend="triton",
        loop_order=order,
    )  # fmt: skip
    return [output.out, output.lse, output.selection.indices]


def train(tensors):
    """The same with the loss, and all gradients."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    output = msa.attention(
        **leaves, cu_seqlens_q=BORDERS, cu_seqlens_k=BORDERS, config=CONFIG, align=True,
        backend="triton",
    )  # fmt: skip
    parts = (output.out, output.lse, output.kl)
    upstream = (normal(5, *output.out.shape), *(torch.ones_like(x) for x in parts[1:]))
    grads = torch.autograd.grad(parts, list(leaves.values()), upstream)
    return [*parts, output.selection.indices, *grads]


@pytest.fixture(scope="module")
def wanted():
    """Of contiguous tensors."""
    return {
        "train": train(packed()), "warm up": warm_up(packed()),
        "kv_outer": attend(packed(), "kv_outer"), "union": attend(packed(), "union"),
    }  # fmt: skip


def check_all(tensors, wanted):
    """Every way through the kernels of prefill and training."""
    same(train(tensors), wanted["train"])
    same(warm_up(tensors), wanted["warm up"])
    for order in ("kv_outer", "union"):
        same(attend(tensors, order), wanted[order])


@pytest.mark.parametrize("layout", [spaced, turned])
def test_attention_and_its_gradients(wanted, layout):
    check_all({name: layout(x) for name, x in packed().items()}, wanted)


@pytest.mark.large
@pytest.mark.parametrize("dim", [0, 1])
def test_attention_and_its_gradients_beyond_2_31(wanted, dim, folder):
    """Tokens far apart; heads far apart, as in a view of head-major tensors."""
    check_all(
        {n: far(x, dim, folder) if x.dim() > dim + 1 else x for n, x in packed().items()}, wanted
    )


@pytest.mark.parametrize("dim", [0, 1])
def test_attention_and_its_gradients_of_expanded_tensors(dim):
    """Tokens or heads that share their memory; gradients have a place for each."""
    tensors = {
        name: x.narrow(dim, 0, 1).expand(x.shape) if x.dim() > dim + 1 else x
        for name, x in packed().items()
    }
    assert all(x.stride(dim) == 0 for x in tensors.values() if x.dim() > dim + 1)
    same(train(tensors), train({name: x.contiguous() for name, x in tensors.items()}))


def warm_up(tensors):
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items() if name != "v"}
    loss = msa.align_index(
        **leaves, cu_seqlens_q=BORDERS, cu_seqlens_k=BORDERS, config=CONFIG, backend="triton"
    )
    index = [leaves["q_idx"], leaves["k_idx"]]
    return [loss, *torch.autograd.grad(loss, index)]


@pytest.mark.parametrize("layout", [columns, transposed])
def test_a_selection_and_a_known_lse(wanted, layout):
    tensors, (out, lse, kl, indices, *_) = packed(), wanted["train"]
    chosen = Selection(layout(indices), Sequences(BORDERS, BORDERS), BLOCK)
    q, k, v, q_idx, k_idx = tensors.values()
    output = msa.sparse_attention(q, k, v, chosen, backend="triton")
    same((output.out, output.lse), (out, lse))
    loss = msa.align_index(
        q, k, q_idx, k_idx, chosen, lse=spaced(lse.detach()), config=CONFIG, backend="triton"
    )
    same([loss], [kl])


@pytest.mark.parametrize("layout", [columns, transposed])
def test_upstream_gradients(layout):
    tensors = {name: x.requires_grad_() for name, x in packed().items() if name in "qkv"}
    chosen = triton_impl.select_fused(
        *list(packed().values())[3:], Sequences(BORDERS, BORDERS), CONFIG
    )
    output = msa.sparse_attention(**tensors, selection=chosen, backend="triton")
    upstream = normal(5, *output.out.shape), normal(6, *output.lse.shape).float()
    grads = [
        torch.autograd.grad(
            (output.out, output.lse), list(tensors.values()), given, retain_graph=True
        )
        for given in (upstream, tuple(layout(x) for x in upstream))
    ]
    same(*grads)


def loosened(form):
    """The same form with every tensor in every second entry of a larger one."""
    changes = {n: columns(x) for n, x in vars(form).items() if isinstance(x, torch.Tensor)}
    changes |= {n: loosened(x) for n, x in vars(form).items() if n == "reverse_index"}
    return replace(form, **changes)


def test_every_form_of_the_lowering():
    """What a user makes of a stage's output, the next stage takes."""
    q, k, v, q_idx, k_idx = packed().values()
    sequences = Sequences(BORDERS, BORDERS)
    scores = triton_impl.score_blocks(q_idx, k_idx, sequences, CONFIG)
    chosen = triton_impl.select_blocks(scores, CONFIG)
    index = triton_impl.reverse_selection(chosen)
    schedule = triton_impl.schedule_chunks(index, 5)
    partials = triton_impl.attend_chunks(q, k, v, schedule, 0.1)
    united = triton_impl.unite_tiles(chosen, 4)
    walked = triton_impl.attend_union(q, k, v, united, 0.1)
    slots = torch.arange(chosen.top_k, device=DEVICE) < chosen.counts[..., None]
    slots = slots.repeat_interleave(HEADS // GROUPS, 1)  # what was written: [Tq, Hq, k]

    def tensors(form):
        return [x for x in vars(form).values() if isinstance(x, torch.Tensor)]

    same(tensors(triton_impl.select_blocks(loosened(scores), CONFIG)), tensors(chosen))
    same(tensors(triton_impl.reverse_selection(loosened(chosen))), tensors(index))
    same(tensors(triton_impl.schedule_chunks(loosened(index), 5)), tensors(schedule))
    again = triton_impl.attend_chunks(q, k, v, loosened(schedule), 0.1)
    same((again.out[slots], again.lse[slots]), (partials.out[slots], partials.lse[slots]))
    same(tensors(triton_impl.unite_tiles(loosened(chosen), 4)), tensors(united))
    same(tensors(triton_impl.attend_union(q, k, v, loosened(united), 0.1)), tensors(walked))
    whole, loose = (triton_impl.combine_partials(x) for x in (partials, loosened(partials)))
    same((loose.out, loose.lse), (whole.out, whole.lse))


@pytest.mark.large
@pytest.mark.parametrize("dim", [0, 1])
def test_scores_that_are_written_out_beyond_2_31(dim, folder):
    q_idx, k_idx = list(packed().values())[3:]
    sequences = Sequences(BORDERS, BORDERS)
    want = triton_impl.score_blocks(q_idx, k_idx, sequences, CONFIG).values
    q_idx, k_idx = far(q_idx, dim, folder), k_idx if dim else far(k_idx, 0, folder)
    assert torch.equal(triton_impl.score_blocks(q_idx, k_idx, sequences, CONFIG).values, want)


# -- the rule itself ------------------------------------------------------------------------------
def test_no_kernel_multiplies_a_stride_itself():
    """Strides are arguments of `along`, of other kernels, and nothing else."""
    found, names = count(), []
    for module in sorted({m for m in vars(triton_impl).values() if inspect.ismodule(m)}, key=str):
        tree = ast.parse(inspect.getsource(module))
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef) or function.name == "along":
                continue
            given = {id(a) for c in ast.walk(function) if isinstance(c, ast.Call) for a in c.args}
            for name in ast.walk(function):
                if isinstance(name, ast.Name) and name.id.startswith("stride"):
                    next(found)
                    if id(name) not in given:
                        names.append(f"{module.__name__}:{name.lineno}: {name.id}")
    assert not names
    assert next(found) > 50  # the test has seen them
