"""Small calls of the operators, and a layer that trains on them; for several files of tests."""

from __future__ import annotations

import torch
from torch import nn

import msa
import msa.ops

CONFIG = msa.MSAConfig(block_size=8, top_k=3)
BORDERS = (0, 11, 11, 30), (0, 15, 15, 40)  # a chunk, an empty sequence, a chunk
NAMES = "q", "k", "v", "q_idx", "k_idx"
OPS = torch.ops.msa


def make(dtype=torch.float32, n_q=30, n_k=40, lead=(), grad=False):
    """The tensors q, k, v, q_idx and k_idx."""
    rng = torch.Generator().manual_seed(1)
    shapes = (n_q, 4, 16), (n_k, 2, 16), (n_k, 2, 12), (n_q, 2, 8), (n_k, 8)
    return [
        torch.randn((*lead, *s), generator=rng, dtype=torch.float64).to(dtype).requires_grad_(grad)
        for s in shapes
    ]


def numbers(config=CONFIG):
    return config.block_size, config.top_k, config.sink_blocks, config.local_blocks


def decode_args():
    rng = torch.Generator().manual_seed(2)

    def draw(*shape):
        return torch.randn(shape, generator=rng)

    table = torch.tensor([[4, 2, 0], [1, 0, 0], [3, 5, 0]], dtype=torch.int32)
    lengths = torch.tensor([20, 0, 13], dtype=torch.int32)
    pages = draw(6, 8, 2, 16), draw(6, 8, 2, 12), draw(6, 8, 8)
    return draw(3, 2, 4, 16), draw(3, 2, 2, 8), msa.PagedKV(*pages, table, lengths)


class Layer(nn.Module):
    """A layer of MSA with its projections: the index reads a detached hidden state (R18)."""

    def __init__(self, config=CONFIG):
        super().__init__()
        torch.manual_seed(0)
        self.config = config
        self.qkv = nn.Linear(32, 64 + 2 * 32, bias=False)
        self.index = nn.Linear(32, 2 * 8 + 8, bias=False)
        self.out = nn.Linear(64, 32, bias=False)

    def forward(self, x):
        """x [B, T, 32] to x of the same shape, and the loss of the index."""
        q, k, v = self.qkv(x).split((64, 32, 32), -1)
        q_idx, k_idx = self.index(x.detach()).split((16, 8), -1)
        q, k, v, q_idx = (t.unflatten(-1, (h, -1)) for t, h in ((q, 4), (k, 2), (v, 2), (q_idx, 2)))
        output = msa.ops.attention(q, k, v, q_idx, k_idx, config=self.config, align=True)
        return x + self.out(output.out.flatten(-2)), output.kl


def loss_and_gradients(layer, call, x):
    out, kl = call(x)
    loss = out.square().mean() + kl
    layer.zero_grad()
    loss.backward()
    return [loss.detach(), *(p.grad for p in layer.parameters())]


def assert_all_close(mine, theirs):
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
