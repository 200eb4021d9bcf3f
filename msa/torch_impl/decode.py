"""Decoding: the case of few queries, keys and values in pages (R2)."""

from __future__ import annotations

from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from msa.config import MSAConfig
from msa.ir import Output, PagedKV, Sequences
from msa.torch_impl.attention import attend
from msa.torch_impl.tiles import borders, owners


def decode_step(
    q: Float[Tensor, "B n Hq D"],
    q_idx: Float[Tensor, "B n Hkv Di"],
    cache: PagedKV,
    config: MSAConfig,
) -> Output:
    """MSA for the last n tokens of each cached sequence (R2), which the cache holds already.

    The pages of the live sequences are laid out flat and attended to as ever.

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
    lengths = cache.lengths.tolist()
    live = [s for s in range(batch) if lengths[s] > 0]
    sequences = Sequences(
        tuple(n * s for s in range(len(live) + 1)),
        tuple(accumulate((lengths[s] for s in live), initial=0)),
    )
    slots = torch.tensor(live, dtype=torch.int64, device=q.device)
    k, v, k_idx = packed(cache, slots, sequences)
    packed_out = attend(
        q[slots].flatten(0, 1), k, v, q_idx[slots].flatten(0, 1), k_idx, sequences, config
    )
    out = q.new_zeros(batch, n, heads, v.shape[-1])
    lse = torch.full((batch, n, heads), -torch.inf, device=q.device)
    out[slots] = packed_out.out.unflatten(0, (len(live), n))
    lse[slots] = packed_out.lse.unflatten(0, (len(live), n))
    return Output(out, lse, packed_out.selection)


def packed(
    cache: PagedKV, slots: Tensor, sequences: Sequences
) -> tuple[Float[Tensor, "Tk Hkv D"], Float[Tensor, "Tk Hkv Dv"], Float[Tensor, "Tk Di"]]:
    """Keys, values and index keys of the live sequences behind one another (R1)."""
    device, block = slots.device, cache.k_pages.shape[1]
    owner = owners(sequences.cu_seqlens_k, device)
    token = torch.arange(sequences.total_k, device=device)
    token = token - borders(sequences.cu_seqlens_k, device)[owner]
    page, place = cache.page_table[slots[owner], token // block].long(), token % block
    return cache.k_pages[page, place], cache.v_pages[page, place], cache.k_idx_pages[page, place]
