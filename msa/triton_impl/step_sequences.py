"""Sequences whose lengths only the device knows, as in a step of a serving engine (R2).

    bounds      at most so many tokens has each sequence: the host knows this, grids come from it
    lengths     so many it has: the device knows this, positions and masks come from it

An engine that runs ahead of the device knows bounds only: of speculated tokens some are rejected.
Tables of places are made on the host from the bounds. Then the positions in them are lowered by
bound - length on the device, so nothing waits.

    host     table from bounds --copy--+
    device   bound - length -----------+--> table - (bound - length)

A step has one `StepSequences`, and all layers share its tables. They are made and read on one
stream, so they need none of the care of `places`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from msa.ir import Sequences


def to_device(table: np.ndarray, device: torch.device) -> Int[Tensor, "..."]:
    """Copy a table to the device as int32, on the current stream, without a wait for it.

    From pageable memory CUDA copies a large table only when the stream has come so far. torch keeps
    the pinned memory until the copy is done.
    """
    made = torch.from_numpy(np.ascontiguousarray(table, dtype=np.int32))
    if device.type != "cuda":
        return made.to(device)
    return made.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True, eq=False)
class StepSequences(Sequences):
    """Sequences of one step; two of them are the same only if they are one object.

    >>> step = StepSequences.of((0, 2, 5), (9, 12), torch.tensor([9, 10]))
    >>> step.cu_seqlens_k, step.shortfall.tolist()
    ((0, 9, 21), [0, 2])
    """

    shortfall: Int[Tensor, " B"]
    """Bound less length of each sequence, int32 on the device."""
    tables: dict[Any, Any] = field(default_factory=dict, repr=False)
    """What was made for this step, by the function that made it and its arguments."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @classmethod
    def of(
        cls, cu_seqlens_q: Sequence[int], bounds: Sequence[int], lengths: Int[Tensor, " B"]
    ) -> StepSequences:
        """Sequences of these lengths, of which the host knows the bounds.

        Args:
            cu_seqlens_q: borders of the queries, exact.
            bounds: at least the length of each sequence.
            lengths: int32 or int64, on the device.
        """
        most = to_device(np.array(bounds), lengths.device)
        cu_k = tuple(accumulate(bounds, initial=0))
        return cls(tuple(cu_seqlens_q), cu_k, (most - lengths).to(torch.int32))

    def table(self, make: Callable[..., Any], *args: Any) -> Any:
        """What `make` returns for these sequences and arguments, made once for the step."""
        key = make, args
        if key not in self.tables:
            self.tables[key] = make(self, *args)
        return self.tables[key]

    def parts(self, size: int) -> tuple[tuple[slice, slice, Sequences], ...]:
        """`Sequences.tiles`, whose parts know their shortfall."""
        found: list[tuple[slice, slice, Sequences]] = []
        first = 0
        for queries, keys, part in self.tiles(size):
            while self.cu_seqlens_q[first + 1] <= queries.start:
                first += 1
            own = self.shortfall[first : first + part.batch]
            borders = part.cu_seqlens_q, part.cu_seqlens_k
            found.append((queries, keys, StepSequences(*borders, own)))
        return tuple(found)


def lower(
    numbers: Int[Tensor, "..."], sequences: Sequences, owners: np.ndarray
) -> Int[Tensor, "..."]:
    """Lower positions by the shortfall of their sequence, in place: [..., n] with n owners.

    Nothing is done where the host knows the lengths.
    """
    if isinstance(sequences, StepSequences) and len(owners):
        numbers -= sequences.shortfall[to_device(owners, numbers.device)]
    return numbers
