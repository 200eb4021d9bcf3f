"""Prefill over a paged cache: many queries of each sequence, keys and values in pages (R2).

The pages are gathered into packed tensors, one copy of the cached sequences, and these go the usual
way. The triton backend has kernels that read the pages where they lie.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from msa.config import MSAConfig
from msa.ir import Output, PagedKV, Sequences
from msa.torch_impl.attention import attend
from msa.torch_impl.decode import packed_keys


@torch.no_grad()
def prefill_chunk(
    q: Float[Tensor, "Tq Hq D"], q_idx: Float[Tensor, "Tq Hkv Di"],
    cache: PagedKV, sequences: Sequences, config: MSAConfig,
) -> Output:  # fmt: skip
    """MSA for the last tokens of each cached sequence (R2), which the cache holds already.

    Not recorded by autograd. Pages of 8 bits are widened to float32, which is exact.

    Returns:
        out [Tq, Hq, Dv] in q's dtype, lse float32 [Tq, Hq], the selection.

    >>> pages = torch.tensor([[9.0, 4.0], [2.0, 6.0]])  # tokens 2, 6, 9: page 1, then page 0
    >>> k_idx, k = pages[..., None], pages[..., None, None]
    >>> cache = PagedKV(k, k, k_idx, torch.tensor([[1, 0]]), torch.tensor([3]))
    >>> zero, sequences = torch.zeros(2, 1, 1), Sequences.one(2, 3)
    >>> config = MSAConfig(block_size=2, top_k=2)
    >>> prefill_chunk(zero, zero, cache, sequences, config).out.flatten()
    tensor([4.0000, 5.6667])
    """
    slots = torch.arange(sequences.batch, device=q.device)
    k, v, k_idx = (packed_keys(name, cache, slots, sequences) for name in ("k", "v", "k_idx"))
    return attend(q, k, v, q_idx, k_idx, sequences, config)
