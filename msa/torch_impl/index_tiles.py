"""Block scores for one tile of queries: the inner step of scoring and selecting (R4, R5)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from msa.ir import BlockScores, Sequences
from msa.torch_impl.numerics import working_dtype
from msa.torch_impl.tiles import QueryTile, sequence_tiles


def scored_tiles(
    q_idx: Float[Tensor, "Tq Hkv Di"],
    k_idx: Float[Tensor, "Tk Di"],
    sequences: Sequences,
    block_size: int,
    scale: float,
) -> Iterator[tuple[QueryTile, BlockScores]]:
    """Tile after tile of queries, each with its block scores [t, Hkv, blocks visible to the tile].

    One product reads all visible keys for all groups of a tile and is reduced while still in the
    cache; what the tile cannot see is never multiplied. `scale` is positive, so that it may wait
    until only the maxima are left: rounding keeps the order.
    """
    dtype = working_dtype(q_idx, k_idx)
    keys, groups = k_idx.to(dtype), q_idx.shape[1]
    budget = 2**20 if q_idx.device.type == "cpu" else 2**27
    buffer = keys.new_empty(0)  # one memory for all products: fresh memory costs as much as a product
    for tile in sequence_tiles(sequences, groups, budget):
        queries = q_idx[tile.queries].to(dtype)
        needed = queries.shape[0] * groups * tile.sequences.total_k
        buffer = buffer if buffer.numel() >= needed else keys.new_empty(needed)
        maxima = block_maxima(queries, keys[tile.keys], block_size, buffer)
        yield tile, BlockScores(maxima * scale, tile.sequences, block_size)


def block_maxima(
    queries: Float[Tensor, "t Hkv Di"],
    keys: Float[Tensor, "n Di"],
    block_size: int,
    buffer: Float[Tensor, " room"],
) -> Float[Tensor, "t Hkv blocks"]:
    """Highest visible product in each block; the last of the n keys is the last query's own.

    `buffer` is memory for t x Hkv x n products or more.

    >>> keys = torch.tensor([[5.0], [torch.nan], [1.0], [3.0]])
    >>> block_maxima(torch.ones(2, 1, 1), keys, 2, torch.empty(8))
    tensor([[[5., 1.]],
    <BLANKLINE>
            [[5., 3.]]])
    """
    n_q, groups, dim = queries.shape
    n_keys = len(keys)
    products = buffer[: n_q * groups * n_keys].view(n_q * groups, n_keys)
    torch.mm(queries.reshape(n_q * groups, dim), keys.T, out=products)
    products = products.view(n_q, groups, n_keys)
    first = n_keys - n_q  # the first query's position: before it, all is visible
    future = torch.ones(n_q, n_q, dtype=torch.bool, device=keys.device).triu(1)
    products[..., first:].masked_fill_(future[:, None], -torch.inf)
    if missing := -n_keys % block_size:
        products = functional.pad(products, (0, missing), value=-torch.inf)
    blocks = products.view(n_q, groups, -1, block_size)
    maxima = blocks.amax(-1)
    if bool(maxima.isnan().any()):  # rare, and amax tells: so look at the small result only
        maxima = torch.where(blocks.isnan(), -torch.inf, blocks).amax(-1)
    return maxima
