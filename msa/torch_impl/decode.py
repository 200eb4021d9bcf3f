"""Decoding: the case of few queries, keys and values in pages (R2).

Every index key of a sequence is scored, but of keys and values only the selected pages are read.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from msa.config import MSAConfig
from msa.ir import Output, PagedKV, Selection, Sequences
from msa.torch_impl.numerics import working_dtype
from msa.torch_impl.scheduled_tiles import queries_per_tile, trimmed
from msa.torch_impl.selection import select_fused
from msa.torch_impl.tiles import borders, owners, query_positions


@torch.no_grad()
def decode_step(
    q: Float[Tensor, "B n Hq D"], q_idx: Float[Tensor, "B n Hkv Di"] | None,
    cache: PagedKV, config: MSAConfig, ids: Int[Tensor, "B n Hkv k"] | None = None,
) -> Output:  # fmt: skip
    """MSA for the last n tokens of each cached sequence (R2), which the cache holds already.

    The blocks are those of `ids`, or they are selected by q_idx. Not recorded by autograd.

    Returns:
        out [B, n, Hq, Dv] in q's dtype, lse float32 [B, n, Hq]: zeros and -inf for a sequence of
        length 0; the selection of the live sequences, packed.

    >>> pages = torch.tensor([[9.0, 4.0], [2.0, 6.0]])  # tokens 2, 6, 9: page 1, then page 0
    >>> k_idx, k = pages[..., None], pages[..., None, None]
    >>> table, lengths = torch.tensor([[1, 0], [0, 0]]), torch.tensor([3, 0])
    >>> cache, zero = PagedKV(k, k, k_idx, table, lengths), torch.zeros(2, 1, 1, 1)
    >>> decode_step(zero, zero, cache, MSAConfig(block_size=2, top_k=2)).out.flatten()
    tensor([5.6667, 0.0000])
    """
    batch, n, heads, _ = q.shape
    live, sequences = cache.live(n)
    slots = torch.tensor(live, dtype=torch.int64, device=q.device)
    queries = q[slots].flatten(0, 1)
    if ids is None:
        assert q_idx is not None
        k_idx = packed_keys("k_idx", cache, slots, sequences)
        selection = select_fused(q_idx[slots].flatten(0, 1), k_idx, sequences, config)
    else:
        selection = Selection(ids[slots].flatten(0, 1), sequences, config.block_size)
    tables = cache.page_table[slots].repeat_interleave(n, 0)
    positions, scale = query_positions(sequences, q.device), config.softmax_scale_for(q.shape[-1])
    value_dim = cache.v_pages.shape[-1]
    chosen = trimmed(selection).indices
    tokens = chosen[0].numel() * config.block_size if len(chosen) else 1
    size = queries_per_tile(tokens * (q.shape[-1] + value_dim), queries)
    tiles = zip(*(x.split(size) for x in (queries, chosen, tables, positions)))
    outs, lses = zip(*(attend_pages(q, i, t, p, cache, scale) for q, i, t, p in tiles))
    out = q.new_zeros(batch, n, heads, value_dim)
    lse = torch.full((batch, n, heads), -torch.inf, dtype=torch.float32, device=q.device)
    out[slots] = torch.cat(outs).to(q.dtype).unflatten(0, (len(live), n))
    lse[slots] = torch.cat(lses).float().unflatten(0, (len(live), n))
    return Output(out, lse, selection)


def packed_keys(
    name: Literal["k", "v", "k_idx"], cache: PagedKV, slots: Tensor, sequences: Sequences
) -> Float[Tensor, "Tk *dims"]:
    """Keys, values or index keys of the sequences in these slots, packed (R1)."""
    device, block = slots.device, cache.k_idx_pages.shape[1]
    owner = owners(sequences.cu_seqlens_k, device)
    token = torch.arange(sequences.total_k, device=device)
    token = token - borders(sequences.cu_seqlens_k, device)[owner]
    page = cache.page_table[slots[owner], token // block].long()
    return cache.read(name, (page, token % block))


def attend_pages(
    q: Float[Tensor, "t Hq D"],
    ids: Int[Tensor, "t Hkv k"], tables: Int[Tensor, "t table"], positions: Int[Tensor, " t"],
    cache: PagedKV, softmax_scale: float,
) -> tuple[Float[Tensor, "t Hq Dv"], Float[Tensor, "t Hq"]]:  # fmt: skip
    """One dense softmax over the k * Bk tokens of the blocks that each query and group selected.

    `tables` and `positions` are those of the sequence that the query belongs to. A place without a
    block reads block 0 of the sequence and is masked, as are the places after the last token, which
    may hold NaN.

    Returns:
        out [t, Hq, Dv] and lse [t, Hq] in the working precision.

    >>> pages, tables = torch.tensor([[9.0, torch.nan], [2.0, 6.0]]), torch.tensor([[1, 0]])
    >>> cache = PagedKV(pages[..., None, None], pages[..., None, None], pages[..., None],
    ...                 tables, torch.tensor([3]))
    >>> q, ids = torch.zeros(1, 1, 1), torch.tensor([[[0, 1, -1]]], dtype=torch.int32)
    >>> attend_pages(q, ids, tables, torch.tensor([2]), cache, 1.0)[0].flatten()
    tensor([5.6667])
    """
    groups, block, ids = ids.shape[1], cache.k_pages.shape[1], ids.long()
    page = tables.gather(1, ids.clamp(min=0).flatten(1)).view_as(ids)[..., None].long()
    place = torch.arange(block, device=q.device)
    group = torch.arange(groups, device=q.device)[:, None, None]
    token = ids[..., None] * block + place
    hidden = ((ids < 0)[..., None] | (token > positions[:, None, None, None])).flatten(2)
    k, v = (
        cache.read(name, (page, place, group)).flatten(2, 3).masked_fill(hidden[..., None], 0.0)
        for name in ("k", "v")
    )
    dtype = working_dtype(q, k, softmax_scale)
    lanes = q.to(dtype).unflatten(1, (groups, -1))
    logits = (lanes @ k.to(dtype).mT * softmax_scale).masked_fill(hidden[:, :, None], -torch.inf)
    out = logits.softmax(-1) @ v.to(dtype)
    return out.flatten(1, 2), logits.logsumexp(-1).flatten(1, 2)
