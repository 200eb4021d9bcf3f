"""Deal whole tensors out to the ranks, and put them together again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msa import checks
from msa.parallel.agreement import agree
from msa.parallel.gathering import start_gather
from msa.parallel.groups import Group, process_group, rank_and_count
from msa.parallel.shards import shards_of


def shard(
    x: Tensor, group: Group | None = None, *, cu_seqlens: Any = None, block_size: int = 128
) -> Tensor:  # fmt: skip
    """This rank's rows of a whole tensor, which every rank has.

    Args:
        x: packed tokens [T, ...]: q, k, tokens, positions, targets.
        group: the ranks among which the tokens are dealt out; None means all processes.
        cu_seqlens: borders of the sequences [batch + 1]; None means one sequence.
        block_size: that of the config of the attention.

    Returns:
        [rows, ...], differentiable: the rank's early chunk of every sequence, then its late ones.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came (R20).
    """
    checks.check_plain("x", x)
    checks.check_torch("x", x)
    rank, count = rank_and_count(group)
    shards = shards_of(len(x), count, cu_seqlens, block_size)
    return x[shards.tokens(rank, x.device)]


@torch.no_grad()
def unshard(
    x: Tensor, group: Group | None = None, *, cu_seqlens: Any = None, block_size: int = 128
) -> Tensor:  # fmt: skip
    """The whole tensor, packed in order, from every rank's rows: the inverse of `shard`.

    Every rank gets it. Nothing is recorded for gradients.

    Args:
        x: this rank's rows [rows, ...].
        group, cu_seqlens, block_size: as in `shard`.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came (R20).
    """
    shards = agree(group, {"x": x}, cu_seqlens, block_size)
    return start_gather(x, shards, process_group(group)).take(shards.places(x.device))
