"""All ranks call with the same borders, sizes and options, or all ranks raise.

A collective in which ranks expect different sizes hangs, or gives wrong numbers. So each call first
exchanges what it is about to do, in one message between the hosts, and every rank compares. If a
rank's arguments are refused, the others learn it, and raise, too. The GPU is not waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from msa import checks
from msa.checks import dtype_name
from msa.parallel.groups import Group, host_group, rank_and_count
from msa.parallel.shards import Shards, shards_of


def agree(
    group: Group | None, tensors: dict[str, Tensor], cu_seqlens: Any, block_size: int,
    options: dict[str, Any] | None = None, check: Callable[[], None] = lambda: None,
) -> Shards:  # fmt: skip
    """Check the arguments of a collective call on every rank; give the shards of its tokens.

    Args:
        group: the ranks of the call.
        tensors: this rank's rows of each argument; all have the same number of rows.
        cu_seqlens, block_size: as in `shard`.
        options: what else has to be the same on every rank, by name.
        check: raises if this rank's own arguments are wrong.

    Raises:
        TypeError, ValueError: this rank's arguments are wrong, or ranks differ.
        RuntimeError: another rank's arguments are wrong.
    """
    count = rank_and_count(group)[1]

    def facts() -> dict[str, Any]:
        for name, tensor in tensors.items():
            checks.check_plain(name, tensor)
            checks.check_torch(name, tensor)
        check()
        check_rows(tensors)
        return facts_of(tensors, cu_seqlens, block_size, options or {})

    rows = [found["rows"] for found in exchange(group, facts)]
    shards = shards_of(sum(rows), count, cu_seqlens, block_size)
    for other, found in enumerate(rows):
        if found != shards.rows(other):
            name = next(iter(tensors))
            raise ValueError(
                f"{name} must have {shards.rows(other)} rows on rank {other}, those that "
                f"msa.parallel.shard gives it, got {found}"
            )
    return shards


def exchange(group: Group | None, facts: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
    """What each rank is about to do; raises where ranks differ in more than "rows".

    Args:
        facts: checks this rank's arguments, and gives what has to be the same on every rank.

    Raises:
        TypeError, ValueError: this rank's arguments are wrong, or ranks differ.
        RuntimeError: another rank's arguments are wrong.
    """
    own: dict[str, Any] = {}
    refused: Exception | None = None
    try:
        own = facts()
    except Exception as error:  # of any kind: the other ranks must not wait
        refused = error
    others: list[Any] = [None] * rank_and_count(group)[1]
    said = None if refused is None else f"{type(refused).__name__}: {refused}"
    dist.all_gather_object(others, (said, own), group=host_group(group))
    if refused is not None:
        raise refused
    for other, (words, _) in enumerate(others):
        if words is not None:
            raise RuntimeError(f"rank {other} refused its arguments, so no rank can go on: {words}")
    found = [facts for _, facts in others]
    compare(found)
    return found


def check_rows(tensors: dict[str, Tensor]) -> None:
    """All tensors have the same number of rows."""
    if not tensors:
        raise ValueError("tensors must hold at least one, got none")
    (first, model), *others = tensors.items()
    for name, tensor in tensors.items():
        if tensor.ndim == 0:
            raise ValueError(f"{name} must have shape [rows, ...], got []")
    for name, tensor in others:
        if len(tensor) != len(model):
            raise ValueError(
                f"{name} must have as many rows as {first} = {len(model)}, got {len(tensor)}"
            )


def facts_of(
    tensors: dict[str, Tensor], cu_seqlens: Any, block_size: int, options: dict[str, Any]
) -> dict[str, Any]:
    """What this rank is about to do. Ranks may differ in "rows" only."""
    borders = None if cu_seqlens is None else checks.read_borders("cu_seqlens", cu_seqlens)
    facts: dict[str, Any] = {"cu_seqlens": borders, "block_size": block_size, **options}
    for name, tensor in tensors.items():
        facts[f"{name}, its shape without rows"] = tuple(tensor.shape[1:])
        facts[f"{name}, its dtype"] = dtype_name(tensor)
        facts[f"{name}, its requires_grad"] = tensor.requires_grad
    return facts | {"rows": len(next(iter(tensors.values())))}


def compare(facts: list[dict[str, Any]]) -> None:
    """Raise where a rank differs from rank 0.

    >>> compare([{"block_size": 128, "rows": 5}, {"block_size": 64, "rows": 9}])
    Traceback (most recent call last):
    ValueError: block_size must be the same on every rank, got 128 on rank 0 and 64 on rank 1
    """
    for name in facts[0]:
        for rank, other in enumerate(facts):
            if name != "rows" and other[name] != facts[0][name]:
                raise ValueError(
                    f"{name} must be the same on every rank, got {facts[0][name]} on rank 0 and "
                    f"{other[name]} on rank {rank}"
                )
