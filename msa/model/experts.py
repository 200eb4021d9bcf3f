"""SwiGLU-OAI, the dense MLP made of it, and a mixture of experts chosen by a sigmoid router."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from msa.model.config import ModelConfig


def swiglu(
    gate_up: Float[Tensor, "*lead twice"], alpha: float, limit: float
) -> Float[Tensor, "*lead twice//2"]:
    """gate * sigmoid(alpha * gate) * (up + 1), with gate <= limit and -limit <= up <= limit.

    >>> swiglu(torch.tensor([100.0, -100.0]), alpha=1.702, limit=7.0).round()
    tensor([-42.])
    """
    gate, up = gate_up.chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


class MLP(nn.Module):
    """down(swiglu(gate_up(x))): the MLP of a dense layer, and the shared expert."""

    def __init__(self, config: ModelConfig, hidden: int) -> None:
        super().__init__()
        self.alpha, self.limit = config.swiglu_alpha, config.swiglu_limit
        self.gate_up = nn.Linear(config.width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, config.width, bias=False)

    def forward(self, x: Float[Tensor, "T width"]) -> Float[Tensor, "T width"]:
        """Each token is computed by itself."""
        return self.down(swiglu(self.gate_up(x), self.alpha, self.limit))


class Router(nn.Module):
    """Chooses the experts of each token, and their weights.

    The score of an expert is sigmoid(<weight, x>); it does not depend on the other experts. A bias
    is added to the scores for the choice, not for the weights. `balance` raises the bias of experts
    that got less than their share of tokens and lowers the others, in place of an auxiliary loss.
    Counts are integers and the bias is float32, whatever dtype the module has.
    """

    bias: Tensor
    load: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.chosen = config.experts_per_token
        self.weight = nn.Parameter(torch.zeros(config.experts, config.width))
        self.register_buffer("bias", torch.zeros(config.experts))
        load = torch.zeros(config.experts, dtype=torch.int64)
        self.register_buffer("load", load, persistent=False)

    def forward(
        self, x: Float[Tensor, "T width"]
    ) -> tuple[Int[Tensor, "T chosen"], Float[Tensor, "T chosen"]]:
        """Expert ids, and their weights in float32, which sum to 1."""
        with torch.autocast(x.device.type, enabled=False):  # rounding must not change the choice
            scores = F.linear(x.to(self.weight.dtype), self.weight).float().sigmoid()
        ids = (scores + self.bias).topk(self.chosen, dim=-1).indices
        weights = scores.gather(-1, ids)
        if self.training:
            self.load += torch.bincount(ids.flatten(), minlength=len(self.bias))
        return ids, weights / weights.sum(-1, keepdim=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """As in any module, but the bias stays float32: it is a sum of many small steps."""
        exact = self.bias
        super()._apply(fn, recurse)
        if self.bias.dtype != exact.dtype:
            self.bias = exact.to(self.bias.device)
        return self

    @torch.no_grad()
    def balance(self, rate: float) -> None:
        """Move each bias by `rate` against the load of its expert, then set the loads to zero.

        >>> from msa.training.presets import PRESETS
        >>> router = Router(PRESETS["tiny"].model)
        >>> _ = router.load.copy_(torch.tensor([9, 1, 5, 5]))
        >>> router.balance(0.5)
        >>> router.bias
        tensor([-0.5000,  0.5000,  0.0000,  0.0000])
        """
        self.bias += rate * (self.load.sum() - self.load * len(self.load)).sign()
        self.load.zero_()


class Experts(nn.Module):
    """The shared expert plus the weighted sum of the experts that the router chose."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.alpha, self.limit = config.swiglu_alpha, config.swiglu_limit
        self.scale = config.routed_scale
        self.router = Router(config)
        hidden, width = config.expert_width, config.width
        self.gate_up = nn.Parameter(torch.zeros(config.experts, 2 * hidden, width))
        self.down = nn.Parameter(torch.zeros(config.experts, width, hidden))
        self.shared = MLP(config, config.shared_width)

    def forward(self, x: Float[Tensor, "T width"]) -> Float[Tensor, "T width"]:
        """The tokens are sorted by expert, so that the tokens of an expert are one slice."""
        ids, weights = self.router(x)
        order = ids.flatten().argsort(stable=True)
        sorted_x = x.repeat_interleave(ids.shape[1], 0)[order]
        counts = torch.bincount(ids.flatten(), minlength=len(self.gate_up)).tolist()
        answers = torch.cat(
            [
                F.linear(swiglu(F.linear(own, gate_up), self.alpha, self.limit), down)
                for own, gate_up, down in zip(sorted_x.split(counts), self.gate_up, self.down)
            ]
        )
        answers = answers[order.argsort()].unflatten(0, ids.shape)
        routed = (weights.to(answers.dtype)[..., None] * answers).sum(1)
        return self.scale * routed + self.shared(x)
