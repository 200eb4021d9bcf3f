"""Index branch: a score for every block (eq. 6, R4-R5)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from msa.config import MSAConfig
from msa.ir import BlockScores, Sequences
from msa.torch_impl.index_tiles import scored_tiles
from msa.torch_impl.numerics import working_dtype


@torch.no_grad()
def score_blocks(
    q_idx: Float[Tensor, "Tq Hkv Di"], k_idx: Float[Tensor, "Tk Di"],
    sequences: Sequences, config: MSAConfig,
) -> BlockScores:  # fmt: skip
    """For every query, group and block the highest visible token score (eq. 6, R4-R5).

    NaN counts as -inf; -inf where no token of the block is visible. No gradient: selection has none
    (R18).

    Returns:
        values [Tq, Hkv, NB] in float32, or float64 if float32 might not hold the products.

    >>> config = MSAConfig(block_size=2, top_k=2)
    >>> keys = torch.arange(6.0)[:, None]
    >>> score_blocks(torch.ones(6, 1, 1), keys, Sequences.one(6, 6), config).values[4, 0]
    tensor([1., 3., 4.])
    """
    n_q, groups, dim = q_idx.shape
    block, scale = config.block_size, config.index_scale_for(dim)
    values = torch.full(
        (n_q, groups, sequences.max_blocks(block)),
        -torch.inf,
        dtype=working_dtype(q_idx, k_idx, scale),
        device=q_idx.device,
    )
    for tile, scores in scored_tiles(q_idx, k_idx, sequences, block, scale):
        values[tile.queries, :, : scores.values.shape[-1]] = scores.values
    return BlockScores(values, sequences, block)
