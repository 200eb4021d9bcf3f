"""One training step of an attention layer whose sequence lies on several processes.

    torchrun --nproc-per-node 2 examples/context_parallel.py

Runs on GPUs if there is one for each process, else on the CPU. The first process also computes the
whole layer alone, and prints how far the two are apart. Read from `main` upwards.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn

import msa
from msa.parallel import context_parallel_attention, shard, unshard

TOKENS, WIDTH, GROUPS, DIM, INDEX_DIM = 1024, 64, 2, 16, 8
CONFIG = msa.MSAConfig(block_size=32, top_k=4)


class Layer(nn.Module):
    """Projections, one call of MSA over the tokens of all processes, and the output projection."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (2 * GROUPS * DIM, GROUPS * DIM, GROUPS * DIM, GROUPS * INDEX_DIM, INDEX_DIM)
        self.q, self.k, self.v, self.q_idx, self.k_idx = (
            nn.Linear(WIDTH, size, bias=False) for size in sizes
        )
        self.out = nn.Linear(2 * GROUPS * DIM, WIDTH, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the loss of the index. A real model also gives tokens their positions."""
        q, k, v = (f(x).unflatten(-1, (-1, DIM)) for f in (self.q, self.k, self.v))
        q_idx = self.q_idx(x.detach()).unflatten(-1, (-1, INDEX_DIM))
        k_idx = self.k_idx(x.detach())
        if dist.is_initialized():
            found = context_parallel_attention(q, k, v, q_idx, k_idx, config=CONFIG, align=True)
        else:
            found = msa.attention(q, k, v, q_idx, k_idx, config=CONFIG, align=True)
        assert found.kl is not None  # as align is True
        return self.out(found.out.flatten(1)), found.kl


def step(layer: Layer, x: Tensor, tokens: int) -> Tensor:
    """Gradients of a mean over all tokens, of which x may be a part; returns the output."""
    y, kl = layer(x)
    (y.square().sum() / tokens + kl).backward()
    return y


def gradients(layer: Layer) -> list[Tensor]:
    """Those of all weights."""
    return [weight.grad for weight in layer.parameters() if weight.grad is not None]


def main() -> None:
    """Compare the processes together with one process alone."""
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    on_gpu = torch.cuda.device_count() >= count
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    torch.manual_seed(0)  # the same weights and tokens in every process
    layer, x = Layer().to(device), torch.randn(TOKENS, WIDTH).to(device)
    alone = step(layer, x, TOKENS).detach()
    wanted = gradients(layer)
    layer.zero_grad()  # new gradients get new tensors

    dist.init_process_group("nccl" if on_gpu else "gloo")
    own = shard(x, block_size=CONFIG.block_size)
    y = step(layer, own, TOKENS)
    for gradient in gradients(layer):  # or wrap the model in DistributedDataParallel
        dist.all_reduce(gradient)
    y = unshard(y.detach(), block_size=CONFIG.block_size)
    if rank == 0:
        gaps = [
            float((found - gradient).norm() / gradient.norm())
            for found, gradient in zip(gradients(layer), wanted)
        ]
        print(f"{count} processes on {device.type}, {len(own)} of {TOKENS} tokens in the first")
        print(
            f"output    ‖together - alone‖ / ‖alone‖ = {float((y - alone).norm() / y.norm()):.1e}"
        )
        print(f"gradients ‖together - alone‖ / ‖alone‖ = {max(gaps):.1e}, the largest")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
