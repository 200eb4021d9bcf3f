"""Keys and values as rows of whole blocks, the way back, and sums of gradients in a fixed order."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from msa.ir import Sequences
from msa.torch_impl.tiles import borders, owners


def block_slots(sequences: Sequences, block_size: int, device: torch.device) -> Int[Tensor, " Tk"]:
    """The place of each packed token when every block is filled up to full length (R1, R3).

    >>> block_slots(Sequences((0, 3, 5), (0, 3, 5)), 2, torch.device("cpu"))
    tensor([0, 1, 2, 4, 5])
    """
    owner = owners(sequences.cu_seqlens_k, device)
    first_token = borders(sequences.cu_seqlens_k, device)
    first_slot = borders(sequences.cu_blocks(block_size), device) * block_size
    return torch.arange(sequences.total_k, device=device) + (first_slot - first_token)[owner]


def to_rows(
    x: Float[Tensor, "Tk H D"], sequences: Sequences, block_size: int
) -> Float[Tensor, "rows Bk D"]:
    """Packed tokens as whole blocks, one row for each head and block, zeros beyond a sequence."""
    blocks = sequences.cu_blocks(block_size)[-1]
    if len(sequences.cu_seqlens_k) == 2 and len(x) == blocks * block_size:  # nothing to fill up
        return x.transpose(0, 1).reshape(x.shape[1] * blocks, block_size, x.shape[2])
    padded = x.new_zeros(x.shape[1], blocks * block_size, x.shape[2])
    padded[:, block_slots(sequences, block_size, x.device)] = x.transpose(0, 1)
    return padded.view(x.shape[1] * blocks, block_size, x.shape[2])


def to_tokens(
    rows: Float[Tensor, "rows Bk D"], heads: int, sequences: Sequences
) -> Float[Tensor, "Tk H D"]:
    """The inverse of `to_rows`."""
    block_size = rows.shape[1]
    padded = rows.reshape(heads, -1, rows.shape[2])
    return padded[:, block_slots(sequences, block_size, rows.device)].transpose(0, 1)


def add_to_rows(
    total: Float[Tensor, "rows Bk D"], rows: Int[Tensor, " W"], addends: Float[Tensor, "W Bk D"]
) -> None:
    """total[rows] += addends in a fixed order, in place (R19).

    Items of one row lie side by side, so each run is added up in order and each row is then written
    once. index_add_ and index_put_(accumulate=True) add in an order that may change between runs.

    >>> total = torch.zeros(3, 1, 1)
    >>> add_to_rows(total, torch.tensor([0, 2, 2]), torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1))
    >>> total.flatten()
    tensor([1., 0., 5.])
    """
    distinct, lengths = torch.unique_consecutive(rows, return_counts=True)
    if len(distinct) < len(rows):
        addends = torch.segment_reduce(addends, "sum", lengths=lengths, axis=0)
    total[distinct] += addends
