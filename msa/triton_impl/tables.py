"""Tables of the places of tiles, which programs read.

Tables are small int32 tensors. The host makes them from the borders of the sequences, one for each
(sequences, block size, device), and keeps them (see `places`), so a second call with the same
borders copies nothing.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from msa.ir import Sequences
from msa.triton_impl.places import device_table
from msa.triton_impl.step_sequences import lower, to_device


def _spread(values: np.ndarray, borders: tuple[int, ...]) -> np.ndarray:
    """values[s] repeated for every member of sequence s."""
    return np.repeat(values, np.diff(np.array(borders, np.int64)))


def _first_keys(sequences: Sequences, block_size: int) -> np.ndarray:
    """The first packed key of each block of all sequences."""
    cu_k = np.array(sequences.cu_seqlens_k, np.int64)
    cu_blocks = sequences.cu_blocks(block_size)
    blocks = np.arange(cu_blocks[-1]) - _spread(np.array(cu_blocks[:-1], np.int64), cu_blocks)
    return _spread(cu_k[:-1], cu_blocks) + blocks * block_size


@device_table
def query_table(sequences: Sequences, block_size: int, device: torch.device) -> Int[Tensor, "3 Tq"]:
    """For each query: the packed index of its own key, its position (R2), its first block's number.

    A key j of the same sequence is visible exactly when j <= the own key.

    >>> query_table(Sequences((0, 2, 3), (0, 5, 6)), 2, torch.device("cpu")).tolist()
    [[3, 4, 5], [3, 4, 0], [0, 0, 3]]
    """
    cu_q, cu_k = (np.array(b, np.int64) for b in (sequences.cu_seqlens_q, sequences.cu_seqlens_k))
    cu_blocks = np.array(sequences.cu_blocks(block_size), np.int64)
    index = np.arange(sequences.total_q)
    own = index + _spread(cu_k[1:] - cu_q[1:], sequences.cu_seqlens_q)
    position = own - _spread(cu_k[:-1], sequences.cu_seqlens_q)
    first_block = _spread(cu_blocks[:-1], sequences.cu_seqlens_q)
    table = to_device(np.stack([own, position, first_block]), device)
    lower(table[:2], sequences, _spread(np.arange(sequences.batch), sequences.cu_seqlens_q))
    return table


@device_table
def block_table(
    sequences: Sequences, block_size: int, device: torch.device
) -> Int[Tensor, "2 blocks"]:
    """For each block of all sequences: its first packed key, and the end of its sequence.

    >>> block_table(Sequences((0, 2, 3), (0, 5, 6)), 2, torch.device("cpu")).tolist()
    [[0, 2, 4, 5], [5, 5, 5, 6]]
    """
    cu_k = np.array(sequences.cu_seqlens_k, np.int64)
    cu_blocks = sequences.cu_blocks(block_size)
    stops = _spread(cu_k[1:], cu_blocks)
    table = to_device(np.stack([_first_keys(sequences, block_size), stops]), device)
    lower(table[1], sequences, _spread(np.arange(sequences.batch), cu_blocks))
    return table


@device_table
def own_key_table(
    sequences: Sequences, block_size: int, device: torch.device
) -> Int[Tensor, "2 blocks"]:
    """For each block of all sequences: its first packed key, and own key less query.

    The second number is the same for all queries of a sequence.

    >>> own_key_table(Sequences((0, 2, 3), (0, 5, 6)), 2, torch.device("cpu")).tolist()
    [[0, 2, 4, 5], [3, 3, 3, 3]]
    """
    cu_q, cu_k = (np.array(b, np.int64) for b in (sequences.cu_seqlens_q, sequences.cu_seqlens_k))
    cu_blocks = sequences.cu_blocks(block_size)
    ahead = _spread(cu_k[1:] - cu_q[1:], cu_blocks)
    table = to_device(np.stack([_first_keys(sequences, block_size), ahead]), device)
    lower(table[1], sequences, _spread(np.arange(sequences.batch), cu_blocks))
    return table


@device_table
def block_places(
    sequences: Sequences, block_size: int, device: torch.device
) -> Int[Tensor, "2 blocks"]:
    """For each block of all sequences: its sequence, and its number in this sequence.

    >>> block_places(Sequences((0, 2, 3), (0, 5, 6)), 2, torch.device("cpu")).tolist()
    [[0, 0, 0, 1], [0, 1, 2, 0]]
    """
    cu_blocks = sequences.cu_blocks(block_size)
    sequence = _spread(np.arange(sequences.batch), cu_blocks)
    block = np.arange(cu_blocks[-1]) - _spread(np.array(cu_blocks[:-1], np.int64), cu_blocks)
    return to_device(np.stack([sequence, block]), device)


@device_table
def tile_owners(
    sequences: Sequences, tile_size: int, device: torch.device
) -> Int[Tensor, " tiles"]:
    """For each tile of a `tile_table` its sequence.

    >>> tile_owners(Sequences((0, 3, 3, 4), (0, 5, 5, 6)), 2, torch.device("cpu")).tolist()
    [0, 0, 2]
    """
    return to_device(owners_of_tiles(sequences, tile_size), device)


def owners_of_tiles(sequences: Sequences, tile_size: int) -> np.ndarray:
    """For each tile of a `tile_table` its sequence, on the host."""
    lengths = np.diff(np.array(sequences.cu_seqlens_q, np.int64))
    return np.repeat(np.arange(sequences.batch), -(-lengths // tile_size))


@device_table
def tile_table(
    sequences: Sequences, tile_size: int, device: torch.device
) -> Int[Tensor, "tiles 5"]:
    """Tiles of neighbouring queries: start, stop, own key of the start, first key, end of keys.

    Tiles start at each sequence's first query, so none holds queries of two sequences.

    >>> tile_table(Sequences((0, 3, 4), (0, 5, 6)), 2, torch.device("cpu")).tolist()
    [[0, 2, 2, 0, 5], [2, 3, 4, 0, 5], [3, 4, 5, 5, 6]]
    """
    rows = []
    for qs, ks in sequences.spans():
        start = np.arange(qs.start, qs.stop, tile_size)
        stop = np.minimum(start + tile_size, qs.stop)
        own = start + (ks.stop - qs.stop)
        ends = np.broadcast_to(np.array([[ks.start, ks.stop]]), (len(start), 2))
        rows.append(np.column_stack([start, stop, own, ends]))
    table = to_device(np.concatenate(rows) if rows else np.zeros((0, 5)), device)
    lower(table.T[2::2], sequences, owners_of_tiles(sequences, tile_size))
    return table
