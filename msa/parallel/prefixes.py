"""The keys that each half of a rank's queries may read, for any attention over them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from msa.parallel.agreement import agree
from msa.parallel.gathering import Attached, Rows, start_gather
from msa.parallel.groups import Group, process_group
from msa.parallel.shards import HALVES, Shards, key_places
from msa.sequences import Sequences


@dataclass(frozen=True)
class Half:
    """A half of a rank's queries: rows of its tensors, and the keys that these may read."""

    rows: slice
    sequences: Sequences
    """The queries of the half are the last tokens of prefixes of the sequences (R2)."""
    keys: tuple[Tensor, ...]
    """The prefixes of each tensor that was given, packed."""


def key_prefixes(
    *tensors: Tensor, group: Group | None = None, cu_seqlens: Any = None, block_size: int = 128
) -> tuple[Half, Half]:
    """Gather tensors of all ranks, in order, for an attention of your own.

    Use it for layers that attend to all tokens beside layers of MSA. A half is an ordinary causal
    attention: `half.rows` of the queries, with `half.keys`. Differentiable: backward sums the
    gradients of all ranks in float32, so all ranks have to run it. Give the result to `attach`.

    Args:
        tensors: this rank's rows of k, v or others, [rows, ...].
        group, cu_seqlens, block_size: as in `shard`.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came (R20).
    """
    named = {f"tensors[{i}]": x for i, x in enumerate(tensors)}
    return gather_prefixes(tensors, agree(group, named, cu_seqlens, block_size), group)


def gather_prefixes(
    tensors: tuple[Tensor, ...], shards: Shards, group: Group | None
) -> tuple[Half, Half]:
    """The same for ranks that have agreed on their arguments."""
    ranks = process_group(group)
    places = key_places(shards, ranks.rank(), tensors[0].device)
    gathers = [start_gather(x, shards, ranks) for x in tensors]
    taken = Rows.apply(gathers, places, shards, ranks, *tensors)
    early, late = (
        Half(rows, shards.half(ranks.rank(), half), taken[half :: len(HALVES)])
        for half, rows in enumerate(half_rows(shards, ranks.rank()))
    )
    return early, late


def attach(x: Tensor, *others: Tensor) -> Tensor:
    """x, whose backward also reaches the other tensors, with gradients of zero.

    A rank without queries has an output that depends on no key; its backward has to take part in
    the collectives of the others all the same. So give it the queries and the keys of both halves.
    """
    return Attached.apply(x, *others)


def half_rows(shards: Shards, rank: int) -> tuple[slice, slice]:
    """Where the rows of each half lie among the rank's."""
    middle = shards.half(rank, 0).total_q
    return slice(0, middle), slice(middle, shards.rows(rank))
