"""What each rank computes in tests of msa.parallel. Ranks import this module by its name."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.distributed.device_mesh import DeviceMesh

import msa
from msa.parallel import (
    context_parallel_align_index,
    context_parallel_attention,
    context_parallel_decode,
    key_prefixes,
    shard,
    unshard,
)


def far_pages(cache):
    return cache.page_table + 99


def no_table(cache):
    return None


def narrow_values(cache):
    return cache.v_pages[..., :7]


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


def cache_of(lengths, block, groups, dtype, seed, whole_numbers):
    """Whole keys, values and index keys of each sequence, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        k, v = (torch.randn(length, groups, 8, generator=generator, dtype=dtype) for _ in "kv")
        k_idx = torch.randn(length, 4, generator=generator, dtype=dtype)
        k_idx = (2 * k_idx).round() if whole_numbers else k_idx
        k_idx[block : 2 * block] = torch.nan  # a NaN score counts as -inf (R4)
        made.append((k, v, k_idx))
    return made


def dealt_out(sequences, block, rank, count, groups, dtype, columns):
    """This rank's blocks of each sequence in pages in reverse order; unused places hold NaN."""
    blocks = [range(rank, -(-len(k) // block), count) for k, _, _ in sequences]
    total = sum(map(len, blocks)) + 1
    k, v = (torch.full((total, block, groups, 8), torch.nan, dtype=dtype) for _ in "kv")
    k_idx = torch.full((total, block, 4), torch.nan, dtype=dtype)
    table = torch.full((len(sequences), columns), total - 1, dtype=torch.int32)
    page = total - 1
    for s, (own, tensors) in enumerate(zip(blocks, sequences)):
        for column, b in enumerate(own):
            page -= 1
            table[s, column] = page
            for pages, whole in zip((k, v, k_idx), tensors):
                part = whole[b * block : (b + 1) * block]
                pages[page, : len(part)] = part
    lengths = torch.zeros(len(sequences), dtype=torch.int32)
    return msa.PagedKV(k, v, k_idx, table, lengths)


def step_of(case):
    """The queries of a step and the whole cache of a case, the same on every rank."""
    generator = torch.Generator().manual_seed(1)
    batch, n, (heads, groups) = len(case["lengths"]), case["n"], case["heads"]
    q = torch.randn(batch, n, heads, 8, generator=generator, dtype=case["dtype"])
    q_idx = torch.randn(batch, n, groups, 4, generator=generator, dtype=case["dtype"])
    if case["whole_numbers"]:
        q_idx = (2 * q_idx).round()
    block = case["config"].block_size
    sequences = cache_of(case["lengths"], block, groups, case["dtype"], 2, case["whole_numbers"])
    return q, q_idx, sequences, 1 + max(-(-length // block) for length in case["lengths"])


def decode_alone(case):
    """out and lse of one process, and the ids of the live sequences."""
    q, q_idx, sequences, columns = step_of(case)
    config, groups = case["config"], case["heads"][1]
    cache = dealt_out(sequences, config.block_size, 0, 1, groups, case["dtype"], columns)
    cache.lengths.copy_(torch.tensor(case["lengths"]))
    output = msa.decode(q, q_idx, cache, config=config, backend="torch")
    return output.out, output.lse, output.selection.indices


def decode_together(group, case):
    """The same by all ranks: out, lse and ids of every slot."""
    q, q_idx, sequences, columns = step_of(case)
    config, groups = case["config"], case["heads"][1]
    rank, count = group.rank(), group.size()
    cache = dealt_out(sequences, config.block_size, rank, count, groups, case["dtype"], columns)
    lengths = torch.tensor(case["lengths"])
    cache = replace(cache, page_table=cache.page_table.to(case.get("table", torch.int32)))
    return context_parallel_decode(
        q, q_idx, cache, lengths, group=group, config=config, backend=case.get("backend", "torch")
    )


def decode_with_changes(group, changes):
    """Rank 1 has other lengths, another page, or other values than the other ranks."""
    case = {"lengths": (9, 5), "n": 1, "heads": (2, 1), "dtype": torch.float32,
            "whole_numbers": False, "config": msa.MSAConfig(block_size=4, top_k=2)}  # fmt: skip
    q, q_idx, sequences, columns = step_of(case)
    cache = dealt_out(sequences, 4, group.rank(), group.size(), 1, torch.float32, columns)
    lengths = torch.tensor([9, 5])
    if group.rank() == 1:
        lengths = torch.tensor(changes.pop("lengths", [9, 5]))
        cache = replace(cache, **{name: change(cache) for name, change in changes.items()})
    return context_parallel_decode(q, q_idx, cache, lengths, group=group, config=case["config"])


def warm_up(group, rows, softmax_scale=None):
    """The loss of the warm-up; rank 1 has other rows of q, or another scale."""
    whole, _ = tensors(24, (2, 1), torch.float32, False)
    own = [shard(x.detach(), group, block_size=4) for x in whole]
    config = msa.MSAConfig(block_size=4, top_k=2)
    if group.rank() == 1:
        own[0] = own[0][:rows]
        config = msa.MSAConfig(block_size=4, top_k=2, softmax_scale=softmax_scale)
    args = own[0], own[1], own[3], own[4]
    return float(context_parallel_align_index(*args, group=group, config=config))


def uneven_prefixes(group):
    """Two tensors with other numbers of rows."""
    return key_prefixes(torch.ones(8, 2), torch.ones(7, 2), group=group)
