"""One layer of MSA learns to look up needles, along the same curve in float32 as in float64.

Every token carries a code, a wanted code and a payload; its target is the payload of the earlier
token whose code it wants. The layer learns one text of this kind by heart.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch

import msa
from msa.conformance import subjects

HEADS, GROUPS, DIM, STEP = 4, 2, 16, 1.0
LEARNERS = [
    pytest.param(s, id=s.label, marks=[pytest.mark.gpu] * (s.device != "cpu"))
    for s in subjects()
    if s.domain.has("attend", "align_index", "backward")
]


@dataclass(frozen=True)
class Size:
    """A problem, and the factors by which its steps reduce the losses."""

    tokens: int
    steps: int
    config: msa.MSAConfig
    task_falls: float
    kl_falls: float


FULL = Size(64, 200, msa.MSAConfig(block_size=16, top_k=2), task_falls=100, kl_falls=10)
TINY = Size(36, 3, msa.MSAConfig(block_size=16, top_k=2), task_falls=2, kl_falls=1.05)
"""The small problem, for Triton's interpreter, which takes seconds for a step."""


@dataclass(frozen=True)
class Curve:
    """One entry per step."""

    task: list[float]
    kl: list[float]
    chosen: list[torch.Tensor]


def needles(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [T, 48] = (code, wanted code, payload), and the wanted payloads [T, 16]."""
    generator = torch.Generator().manual_seed(1)
    code, payload = torch.randn(2, tokens, DIM, generator=generator, dtype=torch.float64)
    code = code / code.norm(dim=-1, keepdim=True)
    wanted = (torch.rand(tokens, generator=generator) * torch.arange(1, tokens + 1)).long()
    return torch.cat([code, code[wanted], payload], -1), payload[wanted]


def initial_weights() -> dict[str, torch.Tensor]:
    """Random weights, except for the main branch, which compares wanted codes with codes."""
    generator = torch.Generator().manual_seed(2)
    shapes = {"q": HEADS, "k": GROUPS, "v": GROUPS, "q_idx": GROUPS, "k_idx": 1}
    made = {
        name: 0.1 * torch.randn(3 * DIM, heads, DIM, generator=generator, dtype=torch.float64)
        for name, heads in shapes.items()
    }
    eye = torch.eye(DIM, dtype=torch.float64)[:, None]
    made["q"][DIM : 2 * DIM] += 6 * eye
    made["k"][:DIM] += 4 * eye
    made["out"] = 0.1 * torch.randn(HEADS * DIM, DIM, generator=generator, dtype=torch.float64)
    return made


@cache
def train(size: Size, backend: str, device: str, dtype: torch.dtype, share: float = 1.0) -> Curve:
    """Plain gradient descent on the mean of (answer - target)^2, plus share * KL."""
    hidden, target = (x.to(device, dtype) for x in needles(size.tokens))
    weights = {n: w.to(device, dtype).requires_grad_() for n, w in initial_weights().items()}
    curve = Curve([], [], [])
    for _ in range(size.steps):
        q, k, v = (torch.einsum("te,ehd->thd", hidden, weights[n]) for n in "qkv")
        seen = hidden.detach()  # eq. 11
        q_idx, k_idx = (torch.einsum("te,ehd->thd", seen, weights[n]) for n in ("q_idx", "k_idx"))
        output = msa.attention(
            q, k, v, q_idx, k_idx[:, 0], config=size.config, align=True, backend=backend
        )
        answer = output.out.flatten(1) @ weights["out"]
        task = (answer - target).square().mean()
        (task + share * output.kl).backward()
        curve.task.append(task.item())
        curve.kl.append(output.kl.item())
        curve.chosen.append(output.selection.indices.cpu())
        with torch.no_grad():
            for weight in weights.values():
                weight -= STEP * weight.grad
                weight.grad = None
    return curve


@pytest.mark.parametrize("subject", LEARNERS)
def test_the_curve_is_that_of_float64(subject):
    """The loss differs by at most N u times the first loss; sums have at most N = T Hq terms.

    One step's gradient has a relative error of N u or less. The errors of many steps do not add up,
    because later steps correct the errors of earlier ones when the loss falls this far. This holds
    while both select the same blocks, which is checked first.
    """
    size = TINY if subject.name == "triton" and subject.device == "cpu" else FULL
    want = train(size, "torch", "cpu", torch.float64)
    got = train(size, subject.name, subject.device, torch.float32)
    differs = [n for n, (a, b) in enumerate(zip(got.chosen, want.chosen)) if not torch.equal(a, b)]
    assert not differs, f"float32 chose other blocks from step {differs[0]} on"

    bound = size.tokens * HEADS * subject.domain.precision("float32").work
    for name in ("task", "kl"):
        one, other = np.array(getattr(got, name)), np.array(getattr(want, name))
        ratio = np.abs(one - other) / (bound * other[0])
        assert ratio.max() <= 1, f"{name} leaves the curve at step {int((ratio > 1).argmax())}"
    assert got.task[0] / got.task[-1] > size.task_falls
    assert got.kl[0] / got.kl[-1] > size.kl_falls


def test_the_index_learns_from_the_alignment_loss_alone():
    """Without the KL the selection never changes (R18), since the index has no other loss."""
    short = replace(FULL, steps=10)
    taught, untaught = (train(short, "torch", "cpu", torch.float32, s) for s in (1.0, 0.0))
    assert not torch.equal(taught.chosen[-1], taught.chosen[0])
    assert all(torch.equal(chosen, untaught.chosen[0]) for chosen in untaught.chosen)
