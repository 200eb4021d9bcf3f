"""Positions of queries and blocks, and how a long problem is cut into tiles of queries.

Neighbouring queries with the keys up to the last of them are a chunked prefill (R2). So every stage
takes a tile as it is, and memory grows with the tile instead of the sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from msa.ir import Sequences


@dataclass(frozen=True)
class QueryTile:
    """Consecutive packed queries, all keys that they may see, and the Sequences that these form."""

    queries: slice
    keys: slice
    sequences: Sequences


def sequence_tiles(sequences: Sequences, size: int) -> Iterator[QueryTile]:
    """Runs of `size` queries inside one sequence each, for dense products with all earlier keys.

    >>> [t.keys for t in sequence_tiles(Sequences((0, 3, 4), (0, 3, 9)), size=2)]
    [slice(0, 2, None), slice(0, 3, None), slice(3, 9, None)]
    """
    for qs, ks in sequences.spans():
        for start in range(qs.start, qs.stop, size):
            stop = min(start + size, qs.stop)
            last_key = ks.stop - (qs.stop - stop)
            part = Sequences.one(stop - start, last_key - ks.start)
            yield QueryTile(slice(start, stop), slice(ks.start, last_key), part)


def borders(values: tuple[int, ...], device: torch.device) -> Int[Tensor, " batch_plus_1"]:
    """Sequence or block borders as an int64 tensor."""
    return torch.tensor(values, dtype=torch.int64, device=device)


def owners(cu: tuple[int, ...], device: torch.device) -> Int[Tensor, " total"]:
    """For each packed entry the sequence that it belongs to.

    >>> owners((0, 2, 2, 3), torch.device("cpu"))
    tensor([0, 0, 2])
    """
    return torch.repeat_interleave(borders(cu, device).diff(), output_size=cu[-1])


def query_positions(sequences: Sequences, device: torch.device) -> Int[Tensor, " Tq"]:
    """The position of every packed query in its own sequence (R2).

    >>> query_positions(Sequences((0, 2, 5), (0, 7, 10)), torch.device("cpu"))
    tensor([5, 6, 0, 1, 2])
    """
    cu_q, cu_k = (borders(c, device) for c in (sequences.cu_seqlens_q, sequences.cu_seqlens_k))
    shift = cu_k.diff() - cu_q[1:]
    owner = owners(sequences.cu_seqlens_q, device)
    return torch.arange(sequences.total_q, device=device) + shift[owner]


def block_positions(
    sequences: Sequences, block_size: int, device: torch.device
) -> Int[Tensor, " blocks"]:
    """For every block of all sequences, the position of its first token (R3).

    >>> block_positions(Sequences((0, 1, 2), (0, 5, 8)), 4, torch.device("cpu"))
    tensor([0, 4, 0])
    """
    cu_blocks = sequences.cu_blocks(block_size)
    number = torch.arange(cu_blocks[-1], device=device)
    return (number - borders(cu_blocks, device)[owners(cu_blocks, device)]) * block_size
