"""What both backends in torch, and the operators, tell autograd about their gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a backward that cannot be differentiated again, so that trying it is an error.

    torch's own mark raises only if an incoming gradient requires a gradient. Under
    create_graph=True none does, and second derivatives would be left out silently.
    """
    marked = once_differentiable(backward)

    @wraps(backward)
    def run(ctx: Any, *gradients: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            gradients = tuple(g if g is None else g.detach().requires_grad_() for g in gradients)
        return marked(ctx, *gradients)

    return run


def align_with_gradients(
    align: Callable[..., tuple[Tensor, Tensor, Tensor]], q: Tensor, k: Tensor, q_idx: Tensor,
    k_idx: Tensor, selection: Any, sequences: Any, config: Any, lse: Tensor | None,
) -> Tensor:  # fmt: skip
    """The alignment loss, which autograd can differentiate for q_idx and k_idx alone (R17).

    Args:
        align: gives the loss and its gradients for q_idx and k_idx. It takes the arguments that
            follow, and whether the gradients are wanted.
    """
    q, k, lse = q.detach(), k.detach(), None if lse is None else lse.detach()
    wants_gradient = torch.is_grad_enabled() and (q_idx.requires_grad or k_idx.requires_grad)
    others = (selection, sequences, config, lse, wants_gradient)
    return Alignment.apply(q_idx, k_idx, align, q, k, others)


class Alignment(torch.autograd.Function):
    """The loss is a scalar, so the forward computes its gradient too and keeps nothing else."""

    @staticmethod
    def forward(
        ctx: Any, q_idx: Tensor, k_idx: Tensor, align: Callable[..., Any], q: Tensor, k: Tensor,
        others: tuple[Any, ...],
    ) -> Tensor:  # fmt: skip
        """Keep the two small gradients, never a score."""
        loss, *gradients = align(q, k, q_idx, k_idx, *others)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = q_idx.dtype, k_idx.dtype
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the two gradients."""
        grads = ((x * d_loss).to(dtype) for x, dtype in zip(ctx.saved_tensors, ctx.dtypes))
        return *grads, None, None, None, None
