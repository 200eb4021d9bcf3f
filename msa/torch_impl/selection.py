"""Index branch: the blocks that each query and group reads (eq. 7, R6-R8)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from msa.config import MSAConfig
from msa.ir import BlockScores, Selection, Sequences
from msa.torch_impl.index_tiles import scored_tiles
from msa.torch_impl.tiles import query_positions


@torch.no_grad()
def select_blocks(scores: BlockScores, config: MSAConfig) -> Selection:
    """The forced blocks, then the best of the others; ties to the lower id (eq. 7, R6-R8).

    Args:
        scores: values [Tq, Hkv, NB].

    Returns:
        indices int32 [Tq, Hkv, k].

    >>> values = torch.tensor([[[5.0, 7.0, 7.0, 1.0]]])
    >>> scores = BlockScores(values, Sequences.one(1, 8), block_size=2)
    >>> select_blocks(scores, MSAConfig(block_size=2, top_k=2)).indices
    tensor([[[1, 3]]], dtype=torch.int32)
    """
    values = scores.values
    own = query_positions(scores.sequences, values.device) // scores.block_size
    ids = torch.arange(values.shape[-1], device=values.device)
    visible = (ids <= own[:, None])[:, None]
    local = ids > (own - config.local_blocks)[:, None]
    forced = visible & (local | (ids < config.sink_blocks))[:, None]
    free = config.top_k - config.forced_blocks
    chosen = forced | best_blocks(values, visible & ~forced, free)
    # With at most k visible blocks there is nothing to choose: -inf scores get in as well (R7).
    chosen = torch.where((own < config.top_k)[:, None, None], visible, chosen)
    return Selection(ascending_ids(chosen, config.top_k), scores.sequences, scores.block_size)


def best_blocks(
    values: Float[Tensor, "Tq Hkv NB"], candidates: Bool[Tensor, "Tq #Hkv NB"], count: int
) -> Bool[Tensor, "Tq Hkv NB"]:
    """The `count` best candidates, ties to the lower id; undefined for rows with too few.

    topk promises no order among equals, but the *value* of the count-th best does not depend on
    that order. All blocks above this value are chosen, and of those equal to it the first ones.
    This takes a quarter of the time of a stable sort.
    """
    count = min(count, values.shape[-1])
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    values = torch.where(candidates & ~values.isnan(), values, -torch.inf)
    threshold = values.topk(count, sorted=False).values.amin(-1, keepdim=True)
    above = values > threshold
    equal = candidates & (values == threshold)
    room = count - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= room))


def ascending_ids(chosen: Bool[Tensor, "Tq Hkv NB"], top_k: int) -> Int[Tensor, "Tq Hkv k"]:
    """The ids of the True entries in canonical form (R8).

    >>> ascending_ids(torch.tensor([[[True, False, True, False]]]), top_k=3)
    tensor([[[ 0,  2, -1]]], dtype=torch.int32)
    """
    ids = torch.full((*chosen.shape[:2], top_k), -1, dtype=torch.int32, device=chosen.device)
    query, group, block = chosen.nonzero(as_tuple=True)
    slot = chosen.cumsum(-1)[query, group, block] - 1
    ids[query, group, slot] = block.int()
    return ids


@torch.no_grad()
def select_fused(
    q_idx: Float[Tensor, "Tq Hkv Di"], k_idx: Float[Tensor, "Tk Di"],
    sequences: Sequences, config: MSAConfig,
) -> Selection:  # fmt: skip
    """select_blocks(score_blocks(...)) in memory that grows with Tq * k, not Tq * NB.

    >>> config = MSAConfig(block_size=2, top_k=2)
    >>> keys = torch.tensor([1.0, 9.0, 2.0, 0.0, 7.0, 3.0])[:, None]
    >>> select_fused(torch.ones(1, 1, 1), keys, Sequences.one(1, 6), config).indices
    tensor([[[0, 2]]], dtype=torch.int32)
    """
    n_q, groups, dim = q_idx.shape
    indices = torch.empty((n_q, groups, config.top_k), dtype=torch.int32, device=q_idx.device)
    scale = config.index_scale_for(dim)
    for tile, scores in scored_tiles(q_idx, k_idx, sequences, config.block_size, scale):
        indices[tile.queries] = select_blocks(scores, config).indices
    return Selection(indices, sequences, config.block_size)
