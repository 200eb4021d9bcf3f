"""Gemma-style RMSNorm, and rotary position embedding (RoPE) of the first numbers of a head."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight), computed in float32. The weight starts at 0.

    >>> RMSNorm(2, eps=0.0)(torch.tensor([[3.0, 4.0]])) * 12.5**0.5
    tensor([[3., 4.]], grad_fn=<MulBackward0>)
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*lead width"]) -> Float[Tensor, "*lead width"]:
        """x normalised over its last dimension, in the dtype of x."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * (1.0 + self.weight.float())).to(x.dtype)


class Turns:
    """The angles by which RoPE turns each token, as cosines and sines [T, 1, R / 2], float32.

    Numbers i and i + R / 2 of a head are one pair, for i < R / 2. Numbers from R on do not change.

    >>> turns = Turns(torch.tensor([[0.0], [torch.pi / 2]]))  # two tokens, one pair
    >>> turns(torch.tensor([1.0, 2.0, 3.0]).repeat(2, 1, 1)).round()
    tensor([[[ 1.,  2.,  3.]],
    <BLANKLINE>
            [[-2.,  1.,  3.]]])
    """

    def __init__(self, angles: Float[Tensor, "T pairs"]) -> None:
        self.cos, self.sin = angles.cos()[:, None], angles.sin()[:, None]

    def __call__(self, x: Float[Tensor, "T H D"]) -> Float[Tensor, "T H D"]:
        """Every head of x, turned, in the dtype of x."""
        pairs = self.cos.shape[-1]
        a, b, rest = x.split([pairs, pairs, x.shape[-1] - 2 * pairs], dim=-1)
        turned = a * self.cos - b * self.sin, b * self.cos + a * self.sin
        return torch.cat([*(part.to(x.dtype) for part in turned), rest], dim=-1)


def frequencies(dims: int, theta: float, device: torch.device) -> Float[Tensor, " pairs"]:
    """theta ** (-2i / dims) for each of the dims / 2 pairs."""
    steps = torch.arange(0, dims, 2, dtype=torch.float32, device=device) / dims
    return 1.0 / theta**steps


def text_turns(positions: Tensor, rotary_dim: int, theta: float) -> Turns:
    """RoPE of text: the token at position p turns by p times each frequency."""
    return Turns(positions.float()[:, None] * frequencies(rotary_dim, theta, positions.device))


def picture_turns(places: Tensor, head_dim: int, theta: float) -> Turns:
    """RoPE of pictures: a third of the pairs turn by the frame, a third by row, a third by column.

    `places` are (frame, row, column) of each patch [N, 3]. The three parts of a head have the same
    even size. The numbers left over do not change: 2 of 80 in the released model.

    >>> picture_turns(torch.tensor([[0, 1, 2]]), 14, 10_000.0).cos.shape  # two pairs an axis
    torch.Size([1, 1, 6])
    """
    rates = frequencies(2 * (head_dim // 6), theta, places.device)
    return Turns((places.float()[..., None] * rates).flatten(1))
