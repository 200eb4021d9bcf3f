"""`msa bench train`: refusal without a device, checks before times, its table."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console

from benchmarks import cases, train, train_stages
from benchmarks.checks import SCALE, Wrong
from benchmarks.reading import committed
from msa import torch_impl
from msa.ir import Sequences

FOUND = json.loads(committed("train").read_text())


def test_the_table_shows_the_committed_results():
    shown = io.StringIO()
    train.show(FOUND, Console(file=shown, width=120))
    for row in FOUND["steps"]:
        for sparse in row["sparse"]:
            assert f"{row['dense']['ms'] / sparse['step']['ms']:.2f}" in shown.getvalue()
    assert "Warm-up at 32K" in shown.getvalue()


@pytest.fixture
def step(monkeypatch):
    """A prompt of 256 tokens on the CPU, its gradients by the torch backend in float32."""
    sequences = Sequences.one(256, 256)
    random = torch.Generator().manual_seed(0)
    shapes = [(256, h, cases.DIM) for h in (cases.HEADS, cases.GROUPS, cases.GROUPS, cases.GROUPS)]
    tensors = [torch.randn(s, generator=random).requires_grad_() for s in shapes]
    k_idx = torch.randn(256, cases.DIM, generator=random).requires_grad_()
    x = cases.Inputs(*tensors, k_idx, sequences)
    chosen = cases.make_selection(sequences, 0.5, device="cpu")
    d_out = torch.randn(shapes[0], generator=random)
    output = torch_impl.attend_selection(x.q, x.k, x.v, chosen, SCALE)
    kl = torch_impl.align_index(x.q, x.k, x.q_idx, x.k_idx, chosen, sequences, cases.CONFIG)
    wanted = (x.q, x.k, x.v, x.q_idx, x.k_idx)
    got = torch.autograd.grad([output.out, kl], wanted, [d_out, torch.ones_like(kl)])
    monkeypatch.setattr(train_stages, "attend_selection", torch_impl.attend_selection)
    return x, chosen, d_out, got, kl


def test_right_gradients_pass(step):
    x, chosen, d_out, got, kl = step
    assert train_stages.check_query_gradients(x, chosen, d_out, got) < 1e-5
    assert train_stages.check_key_gradients(x, chosen, d_out, got) < 1e-5
    assert train_stages.check_loss(x, chosen, kl.detach()) < 1e-6


@pytest.mark.parametrize("which", range(4))
def test_wrong_gradients_do_not(step, which):
    x, chosen, d_out, got, _ = step
    wrong = [g * 1.02 if i == which else g for i, g in enumerate(got)]
    check = (
        train_stages.check_key_gradients
        if which in (1, 2)
        else (train_stages.check_query_gradients)
    )
    with pytest.raises(Wrong, match="off by"):
        check(x, chosen, d_out, wrong)


def test_a_wrong_loss_does_not_pass(step):
    x, chosen, _, _, kl = step
    with pytest.raises(Wrong, match="the loss"):
        train_stages.check_loss(x, chosen, kl.detach() * 1.001)
