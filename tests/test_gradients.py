"""What the gradient properties rest on, and what is too large for them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings

import msa
from msa.conformance import subjects
from msa.conformance.cases import Case
from msa.conformance.gradients import (
    directions,
    moved,
    slope,
    spec_alignment,
    spec_attention,
)
from msa.conformance.properties_alignment import yardstick
from msa.conformance.properties_training import upstream
from msa.conformance.strategies import double
from msa.conformance.yardstick import Attention, block_mask
from msa.conformance.yardstick_training import Gradients

(REFERENCE,) = subjects(("reference",))
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@given(double(REFERENCE.domain))
def test_the_yardstick_has_the_slopes_of_the_spec(case: Case):
    """The analytic gradients that every dtype is judged by, against finite differences."""
    inputs, (d_out, d_lse) = case.inputs, upstream(case)
    mask = block_mask(case.selection.indices, case.sequences, case.config.block_size)
    grads = Gradients(Attention(*inputs.main, mask, inputs.scale), d_out, d_lse).values()
    for which, step in enumerate(directions(inputs.main, seed=1)):
        want = slope(
            lambda t, w=which, d=step: spec_attention(
                inputs, case.selection, moved(inputs.main, w, t * d), d_out, d_lse
            )
        )
        assert float((grads["qkv"[which]] * step).sum()) == pytest.approx(want, abs=1e-9, rel=1e-9)


@given(double(REFERENCE.domain))
def test_the_yardstick_has_the_slopes_of_the_loss(case: Case):
    inputs = case.inputs
    for selection in (case.selection, None):
        grads = yardstick(inputs, selection, case.groups).gradients()
        for which, step in enumerate(directions(inputs.index, seed=1)):
            want = slope(
                lambda t, s=selection, w=which, d=step: spec_alignment(
                    inputs, s, moved(inputs.index, w, t * d)
                )
            )
            got = float((grads[("q_idx", "k_idx")[which]] * step).sum())
            assert got == pytest.approx(want, abs=1e-9, rel=1e-9)


def test_finite_differences_see_a_wrong_gradient():
    """The five-point rule is sharp enough to tell 2 from 2 + 1e-9."""
    assert slope(lambda t: np.sin(2 * t)) == pytest.approx(2, abs=1e-10)
    assert slope(lambda t: np.sin(2 * t)) != pytest.approx(2 + 1e-9, abs=1e-10)


def tensors(tokens: int, device: str, dtype=torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, 4, 16), (tokens, 2, 16), (tokens, 2, 16), (tokens, 2, 8), (tokens, 8)]
    made = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    return [x.requires_grad_() for x in made]


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_a_long_sequence_repeat_to_the_bit(device):
    """Long enough for several tiles and threads, whose sums must not depend on who is first."""
    config = msa.MSAConfig(block_size=32, top_k=4)

    def once():
        q, k, v, q_idx, k_idx = tensors(1500, device)
        borders = [0, 900, 900, 1500]
        kept = {"cu_seqlens_q": borders, "cu_seqlens_k": borders, "config": config}
        output = msa.attention(q, k, v, q_idx, k_idx, backend="torch", **kept)
        loss = msa.align_index(q, k, q_idx, k_idx, output.selection, config=config, backend="torch")
        warm_up = msa.align_index(q, k, q_idx, k_idx, backend="torch", **kept)
        (output.out.square().sum() + output.lse.sum() + loss + warm_up).backward()
        return [output.out, output.lse, loss, warm_up, *(x.grad for x in (q, k, v, q_idx, k_idx))]

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for first, second in zip(once(), once()):
            assert torch.equal(first, second)
    finally:
        torch.set_num_threads(threads)


def test_autograd_agrees_with_itself():
    """torch.autograd.gradcheck, which looks at every entry of every Jacobian."""
    q, k, v, q_idx, k_idx = tensors(7, "cpu", torch.float64)
    q, k, v = (x.detach()[..., :2].contiguous().requires_grad_() for x in (q, k, v))
    config = msa.MSAConfig(block_size=2, top_k=2)
    selection = msa.select(q_idx.detach(), k_idx.detach(), config=config)

    def attend(q, k, v):
        return msa.sparse_attention(q, k, v, selection).out

    def align(q_idx, k_idx):
        return msa.align_index(q.detach(), k.detach(), q_idx, k_idx, selection, config=config)

    assert torch.autograd.gradcheck(attend, (q, k, v))
    assert torch.autograd.gradcheck(align, (q_idx, k_idx))


def test_tokens_that_nobody_reads_get_no_gradient():
    q, k, v, _, _ = tensors(8, "cpu")
    ids = torch.tensor([[0, -1]] * 4 + [[1, -1]] * 4, dtype=torch.int32)[:, None].repeat(1, 2, 1)
    own = msa.Selection(ids[4:], msa.Sequences.one(4, 8), block_size=4)  # only the second block
    msa.sparse_attention(q[4:].detach().requires_grad_(), k, v, own).out.sum().backward()
    assert (k.grad[:4] == 0).all() and (v.grad[:4] == 0).all()
    assert (v.grad[4:] != 0).any()


@settings(max_examples=5)
@given(double(REFERENCE.domain))
def test_no_graph_is_kept_without_need(case: Case):
    """Inputs that need no gradient give outputs that need none."""
    (subject, *_) = subjects(("torch",))
    given_ = [subject.give(x, case.dtype) for x in (*case.inputs.main, *case.inputs.index)]
    output = subject.module.attend(*given_, case.sequences, case.config)
    assert not output.out.requires_grad and not output.lse.requires_grad
