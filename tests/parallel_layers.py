"""A layer under DistributedDataParallel, under `fully_shard`, and with sharded heads.

Ranks import this module by its name.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import local_map
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import msa
import msa.ops

TOKENS, WIDTH, GROUPS, DIM = 24, 16, 2, 8
CONFIG = msa.MSAConfig(block_size=4, top_k=3)


class Layer(nn.Module):
    """Projections, one call of the operator, and the loss of the index as a second output."""

    def __init__(self, recompute=False):
        super().__init__()
        sizes = (2 * GROUPS * DIM, GROUPS * DIM, GROUPS * DIM, GROUPS * DIM, DIM)
        self.projections = nn.ModuleList(nn.Linear(WIDTH, size, bias=False) for size in sizes)
        self.out = nn.Linear(2 * GROUPS * DIM, WIDTH, bias=False)
        self.unused = nn.Linear(WIDTH, WIDTH)
        self.recompute = recompute

    def forward(self, x):
        if self.recompute:
            return checkpoint(self.attend, x, use_reentrant=False)
        return self.attend(x)

    def attend(self, x):
        q, k, v, q_idx, k_idx = (f(x) for f in self.projections)
        q, k, v, q_idx = (y.unflatten(-1, (-1, DIM)) for y in (q, k, v, q_idx))
        found = msa.ops.attention(q, k, v, q_idx, k_idx, config=CONFIG)
        kl = msa.ops.align_index(q, k, q_idx, k_idx, found.indices, lse=found.lse, config=CONFIG)
        return x + self.out(found.out.flatten(-2)), kl


def made(recompute=False):
    """The layer and the texts of all ranks, the same on every rank, in float64."""
    torch.manual_seed(3)
    return Layer(recompute).double(), torch.randn(4, TOKENS, WIDTH, dtype=torch.float64)


def loss_of(layer, x):
    y, kl = layer(x)
    return y.square().mean() + kl


def gradients(layer):
    """Those of all weights that have one, whole."""
    return {
        name: (w.grad.full_tensor() if isinstance(w.grad, DTensor) else w.grad).clone()
        for name, w in layer.named_parameters()
        if w.grad is not None
    }


def alone():
    """Gradients of the mean loss of four texts, each of which is a batch of its own."""
    layer, texts = made()
    (sum(loss_of(layer, text) for text in texts) / len(texts)).backward()
    return gradients(layer)


def replicated(group, recompute):
    """DistributedDataParallel, which looks for weights without a gradient."""
    layer, texts = made(recompute)
    model = DistributedDataParallel(layer, process_group=group, find_unused_parameters=True)
    loss_of(model, texts[group.rank()]).backward()
    return gradients(layer)


def fully_sharded(group, recompute):
    """FSDP2: every weight lies in parts on the ranks."""
    layer, texts = made(recompute)
    mesh = init_device_mesh("cpu", (group.size(),))
    fully_shard(layer, mesh=mesh)
    loss_of(layer, texts[group.rank()]).backward()
    return gradients(layer)


def sharded_heads(group):
    """Whole tensors whose heads lie on the ranks, through `local_map`: out and gradients."""
    mesh = init_device_mesh("cpu", (group.size(),))
    torch.manual_seed(5)
    heads = (2 * GROUPS, GROUPS, GROUPS, GROUPS)
    whole = [torch.randn(TOKENS, h, DIM, dtype=torch.float64) for h in heads]
    whole.append(torch.randn(TOKENS, DIM, dtype=torch.float64))
    by_head, same = (Shard(1),), (Replicate(),)
    placed = [distribute_tensor(x, mesh, by_head).requires_grad_() for x in whole[:4]]
    placed.append(distribute_tensor(whole[4], mesh, same).requires_grad_())

    def attend(*x):
        found = msa.ops.attention(*x, config=CONFIG)
        kl = msa.ops.align_index(x[0], x[1], *x[3:], found.indices, lse=found.lse, config=CONFIG)
        return found.out, kl / group.size()  # the mean over all heads is the sum of the parts

    on_heads = local_map(
        attend, out_placements=(by_head, (Partial(),)),
        in_placements=(*[by_head] * 4, same),
        in_grad_placements=(*[by_head] * 4, (Partial(),)),  # k_idx has gradients from all heads
        device_mesh=mesh,
    )  # fmt: skip
    out, kl = on_heads(*placed)
    (out.square().sum() + kl).full_tensor().backward()
    found = [out.full_tensor().detach(), kl.full_tensor().detach()]
    return found + [x.grad.full_tensor() for x in placed], whole


def heads_alone(whole):
    whole = [x.requires_grad_() for x in whole]
    output = msa.attention(*whole, config=CONFIG, align=True)
    (output.out.square().sum() + output.kl).backward()
    return [output.out.detach(), output.kl.detach(), *(x.grad for x in whole)]
