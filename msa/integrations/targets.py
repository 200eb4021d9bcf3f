"""MiniMax-M3 of transformers as targets of `msa verify --target`, convention `transformers`.

    msa verify --convention transformers --target msa.integrations.targets:transformers_select
    msa verify --convention transformers --kind sparse_attention \\
        --target msa.integrations.targets:transformers_sparse_attention

The code under test is MiniMaxM3VLIndexer itself. Its projections are replaced by modules that
return the given tensors, its norms by identities, and its rotation has the angle 0. The attention
is also that of transformers: its block mask and its softmax.

>>> position_ids = torch.arange(6)[None]
>>> k_idx = torch.tensor([3.0, 0, 9, 0, 1, 0]).reshape(1, 1, 6, 1)
>>> sizes = {"block_size": 2, "topk_blocks": 2, "local_blocks": 1}
>>> ids = transformers_select(torch.ones(1, 1, 6, 1), k_idx, position_ids, None, **sizes)
>>> ids[0, 0, 5]  # the own block first
tensor([2, 1])
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MiniMaxM3VLTextConfig
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import (
    MiniMaxM3VLIndexer,
    eager_attention_forward,
)


class Given(nn.Module):
    """A projection that returns a given tensor for every input."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor

    def forward(self, _: Tensor) -> Tensor:
        """The given tensor."""
        return self.tensor


def indexer_of(
    heads: int, dim: int, block_size: int, topk_blocks: int, local_blocks: int
) -> MiniMaxM3VLIndexer:
    """An indexer of these sizes. It has as many query heads as index heads."""
    config = MiniMaxM3VLTextConfig(
        hidden_size=1, num_hidden_layers=1, num_attention_heads=heads, num_key_value_heads=heads,
        index_n_heads=heads, index_head_dim=dim, index_block_size=block_size,
        index_topk_blocks=topk_blocks, index_local_blocks=local_blocks,
    )  # fmt: skip
    return MiniMaxM3VLIndexer(config, layer_idx=0)


def transformers_select(
    q_idx: Tensor, k_idx: Tensor, position_ids: Tensor, attention_mask: Tensor | None, *,
    block_size: int, topk_blocks: int, local_blocks: int,
) -> Tensor:  # fmt: skip
    """The block_indices of the indexer. As in the model, it does not use the mask."""
    batch, heads, n_q, dim = q_idx.shape
    indexer: Any = indexer_of(heads, dim, block_size, topk_blocks, local_blocks)
    indexer.q_proj = Given(q_idx.transpose(1, 2))
    indexer.k_proj = Given(k_idx[:, 0, :n_q])  # all index keys, these too, come from the cache
    indexer.q_norm = indexer.k_norm = nn.Identity()
    cache: Any = SimpleNamespace(layers=[SimpleNamespace(update_index=Given(k_idx))])
    still = (torch.ones_like(q_idx[:, 0]), torch.zeros_like(q_idx[:, 0]))  # cos, sin
    return indexer(q_idx.new_zeros(batch, n_q, 1), still, cache, position_ids)


def transformers_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, block_indices: Tensor, position_ids: Tensor, *,
    block_size: int, scaling: float,
) -> Tensor:  # fmt: skip
    """Attention by the block mask and the eager attention of transformers."""
    heads, groups = query.shape[1], key.shape[1]
    indexer = indexer_of(groups, 1, block_size, block_indices.shape[-1], 1)
    indexer.config.num_attention_heads = heads
    mask = indexer.build_block_mask(
        block_indices, None, key.shape[2], query.dtype, query.device, position_ids
    )
    module: Any = SimpleNamespace(num_key_value_groups=heads // groups, training=False)
    return eager_attention_forward(module, query, key, value, mask, scaling)[0]
