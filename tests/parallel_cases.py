"""What each rank computes in tests of msa.parallel. Ranks import this module by its name."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh

import msa
from msa.parallel import context_parallel_attention, shard, unshard

NAMES = ("q", "k", "v", "q_idx", "k_idx")


def tensors(total, heads, dtype, whole_numbers, seed=0):
    """q, k, v, q_idx and k_idx of all tokens, and a gradient for out; the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    (q_heads, kv_heads), dim, index_dim = heads, 8, 4
    shapes = (q_heads, dim), (kv_heads, dim), (kv_heads, dim), (kv_heads, index_dim), (index_dim,)
    made = [torch.randn(total, *shape, generator=generator, dtype=dtype) for shape in shapes]
    if whole_numbers:  # many ties, and scores without rounding
        made[3:] = [(2 * x).round() for x in made[3:]]
    d_out = torch.randn(total, q_heads, dim, generator=generator, dtype=dtype)
    return [x.requires_grad_() for x in made], d_out


def alone(case):
    """out, lse, kl, selected ids and gradients of one process."""
    whole, d_out = tensors(case["total"], case["heads"], case["dtype"], case["whole_numbers"])
    cu = case["cu_seqlens"]
    output = msa.attention(
        *whole, cu_seqlens_q=cu, cu_seqlens_k=cu, config=case["config"], align=True
    )
    ((output.out * d_out).sum() + output.lse.sum() + output.kl).backward()
    answer = {"out": output.out, "lse": output.lse, "ids": output.selection.indices}
    answer |= {f"d_{name}": x.grad for name, x in zip(NAMES, whole)}
    return {name: x.detach() for name, x in answer.items()} | {"kl": output.kl.item()}


def together(group, case):
    """The same, with tokens dealt out to the ranks: this rank's rows, put together again."""
    whole, d_out = tensors(case["total"], case["heads"], case["dtype"], case["whole_numbers"])
    cu, config = case["cu_seqlens"], case["config"]
    places = {"cu_seqlens": cu, "block_size": config.block_size}
    own = [shard(x.detach(), group, **places).requires_grad_() for x in whole]
    output = context_parallel_attention(*own, group=group, cu_seqlens=cu, config=config, align=True)
    d_own = shard(d_out, group, **places)
    ((output.out * d_own).sum() + output.lse.sum() + output.kl).backward()
    ids = [selection.indices for selection in output.selections]
    empty = torch.empty(0, case["heads"][1], config.top_k, dtype=torch.int32)
    answer = {"out": output.out, "lse": output.lse, "ids": torch.cat([empty, *ids])}
    answer |= {f"d_{name}": x.grad for name, x in zip(NAMES, own)}
    rows = {name: unshard(x.detach(), group, **places) for name, x in answer.items()}
    return rows | {"kl": output.kl.item()}


def call(group, changes, only=None):
    """A call with other arguments on rank `only`, or on all ranks."""
    whole, _ = tensors(24, (2, 1), torch.float32, False)
    config = msa.MSAConfig(block_size=4, top_k=2)
    own = dict(zip(NAMES, (shard(x.detach(), group, block_size=4) for x in whole)))
    own |= {"group": group, "config": config}
    if only is None or group.rank() == only:
        own |= {name: change(own) if callable(change) else change for name, change in changes}
    return context_parallel_attention(**own).out.sum().item()


def fewer_rows(own):
    return own["q"][1:]


def half_precision(own):
    return own["k"].half()


def on_a_mesh(group, heads):
    """Two ranks by context, two by heads: this rank's kl and rows of out and d_k."""
    whole, d_out = tensors(40, heads, torch.float64, False)
    config = msa.MSAConfig(block_size=4, top_k=3)
    mesh = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("context", "heads"))
    part = mesh["heads"].get_local_rank()
    context, places = mesh["context"], {"block_size": 4}
    own = [
        shard(x.detach() if i == 4 else x.detach().chunk(2, 1)[part], context, **places)
        for i, x in enumerate(whole)
    ]
    own = [x.requires_grad_() for x in own]
    output = context_parallel_attention(*own, group=context, config=config, align=True)
    d_own = shard(d_out.chunk(2, 1)[part], context, **places)
    ((output.out * d_own).sum() + output.kl).backward()
    out = unshard(output.out.detach(), context, **places)
    d_k = unshard(own[1].grad, context, **places)
    return part, out, d_k, output.kl.item()
