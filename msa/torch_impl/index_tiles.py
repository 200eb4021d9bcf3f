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

CPU_PRODUCTS = 2**20
"""Products at a time: 4 MiB, so that they are still in the cache when reduced (measured)."""
GPU_PRODUCTS = 2**27
MAXIMA = 2**22
"""Block scores at a time."""


def scored_tiles(
    q_idx: Float[Tensor, "Tq Hkv Di"], k_idx: Float[Tensor, "Tk Di"],
    sequences: Sequences, block_size: int, scale: float,
) -> Iterator[tuple[QueryTile, BlockScores]]:  # fmt: skip
    """Tile after tile of queries, each with its block scores [t, Hkv, blocks visible to the tile].

    Keys that the tile cannot see are not multiplied. `scale` is positive and multiplies only the
    maxima: rounding keeps the order of scores.
    """
    dtype, on_cpu = working_dtype(q_idx, k_idx, scale), q_idx.device.type == "cpu"
    keys, groups = k_idx.to(dtype), q_idx.shape[1]
    size = (512 if on_cpu else 4096) // groups
    most = MAXIMA // (groups * max(1, sequences.max_blocks(block_size)))
    size = max(1, min(size, sequences.total_q, most))
    room = max(CPU_PRODUCTS if on_cpu else GPU_PRODUCTS, size * groups * block_size)
    room = min(room, size * groups * max(1, sequences.total_k))
    # One buffer for all products: writing to fresh memory costs as much as a product.
    buffer = keys.new_empty(room)
    for tile in sequence_tiles(sequences, size):
        queries = q_idx[tile.queries].to(dtype)
        maxima = block_maxima(queries, keys[tile.keys], block_size, buffer)
        yield tile, BlockScores(maxima * scale, tile.sequences, block_size)


def block_maxima(
    queries: Float[Tensor, "t Hkv Di"], keys: Float[Tensor, "n Di"], block_size: int,
    buffer: Float[Tensor, " room"],
) -> Float[Tensor, "t Hkv blocks"]:  # fmt: skip
    """Highest visible product in each block; the last of the n keys is the last query's own.

    `buffer` has room for the products of a tile with one block of keys or more.

    >>> keys = torch.tensor([[5.0], [torch.nan], [1.0], [3.0]])
    >>> block_maxima(torch.ones(2, 1, 1), keys, 2, torch.empty(8))
    tensor([[[5., 1.]],
    <BLANKLINE>
            [[5., 3.]]])
    """
    n_q, groups, dim = queries.shape
    rows = queries.reshape(n_q * groups, dim)
    first = len(keys) - n_q  # the first query's position: all earlier keys are visible
    step = max(1, len(buffer) // (len(rows) * block_size)) * block_size
    parts = []
    for start in range(0, len(keys), step):
        part = keys[start : start + step]
        products = buffer[: len(rows) * len(part)].view(len(rows), len(part))
        torch.mm(rows, part.T, out=products)
        if start + len(part) > first + 1:
            recent = max(first - start, 0)  # columns before are visible to all queries
            by_query = products.view(n_q, groups, len(part))
            hide_future(by_query[..., recent:], first - start - recent)
        parts.append(reduce_blocks(products, block_size))
    return torch.cat(parts, dim=1).view(n_q, groups, -1)


def hide_future(products: Float[Tensor, "t Hkv n"], first: int) -> None:
    """Set the products after each query to -inf, in place; query 0 is at column `first`.

    >>> products = torch.zeros(2, 1, 3)
    >>> hide_future(products, first=0)
    >>> products[:, 0]
    tensor([[0., -inf, -inf],
            [0., 0., -inf]])
    """
    positions = first + torch.arange(products.shape[0], device=products.device)
    future = torch.arange(products.shape[2], device=products.device) > positions[:, None]
    products.masked_fill_(future[:, None], -torch.inf)


def reduce_blocks(
    products: Float[Tensor, "rows n"], block_size: int
) -> Float[Tensor, "rows blocks"]:
    """The maximum of each block; NaN counts as -inf (R4)."""
    if missing := -products.shape[1] % block_size:
        products = functional.pad(products, (0, missing), value=-torch.inf)
    blocks = products.view(len(products), -1, block_size)
    maxima = blocks.amax(-1)
    if bool(maxima.isnan().any()):  # rare, and visible in the small result
        maxima = torch.where(blocks.isnan(), -torch.inf, blocks).amax(-1)
    return maxima
