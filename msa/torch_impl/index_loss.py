"""The loss of the index branch, KL(main || index), and its gradient (eq. 9-10, R17)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def index_loss(
    logits: Float[Tensor, "*rows G n"],
    scores: Float[Tensor, "*rows n"],
    support: Bool[Tensor, "#*rows n"],
    lse: Float[Tensor, "*rows G"] | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, "*rows n"]]:
    """The summed KL of the rows and its gradient with respect to the scores.

    The teacher is the mean of the heads' probabilities. `logits` hold -inf outside the support;
    `lse` is their log-sum-exp, where it is known. d KL / d scores = student - teacher, so autograd
    need not record anything.

    >>> support = torch.ones(1, 2, dtype=torch.bool)
    >>> loss, slope = index_loss(torch.zeros(1, 3, 2), torch.tensor([[1.0, 1.0]]), support)
    >>> loss.item(), slope
    (0.0, tensor([[0., 0.]]))
    """
    per_head = logits.softmax(-1) if lse is None else (logits - lse[..., None]).exp_()
    teacher = per_head.mean(-2)
    log_student = log_softmax(scores, support)
    loss = divergence(teacher, log_student).sum(dtype=torch.float64)
    return loss, log_student.exp_().sub_(teacher)


def log_softmax(
    scores: Float[Tensor, "*rows n"], support: Bool[Tensor, "#*rows n"]
) -> Float[Tensor, "*rows n"]:
    """Logarithm of the student, -inf outside the support; NaN counts as -inf (R4).

    Scores of +inf share all the mass; if every score is -inf, the whole support shares it.

    >>> scores = torch.tensor([[0.0, torch.inf, torch.inf, torch.nan], [-torch.inf] * 4])
    >>> log_softmax(scores, torch.tensor([True, True, True, False])).exp()
    tensor([[0.0000, 0.5000, 0.5000, 0.0000],
            [0.3333, 0.3333, 0.3333, 0.0000]])
    """
    scores = torch.where(support & ~scores.isnan(), scores, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    tied = torch.where(support & (scores == top), 0.0, -torch.inf).to(scores.dtype)
    shifted = torch.where(top.isinf(), tied, scores - torch.where(top.isinf(), 0.0, top))
    return shifted.log_softmax(-1)


def divergence(
    teacher: Float[Tensor, "*rows n"], log_student: Float[Tensor, "*rows n"]
) -> Float[Tensor, "*rows"]:
    """KL(P || P_idx) = sum of P (log P - log P_idx); terms with P = 0 are 0. NaN in P stays NaN.

    >>> divergence(torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.75, 0.0]).log())
    tensor(0.1438)
    """
    terms = teacher * (teacher.log() - log_student)
    return torch.where(teacher == 0, 0.0, terms).sum(-1)
