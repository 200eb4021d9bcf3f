"""Which tokens of a padded batch [B, ..., T, D] are which sequence, and the way to packed and back.

transformers says it by a mask [B, seen tokens] and by positions. What is read here:

    no mask, positions count up     every row is one sequence, its queries the last tokens (R2)
    mask 0 0 1 1 1 0                a sequence starts and ends with the ones of its row: padding on
                                    either side is no token, blocks count from the first one (R3)
    positions 0 1 2 0 1 0 1 2       packed: a sequence starts wherever they start again

Padded rows are packed like these: padding is left out of queries and keys. All else is refused.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from msa.integrations import messages


@dataclass(frozen=True)
class Plan:
    """The sequences of one forward pass."""

    cu_seqlens_q: tuple[int, ...]
    cu_seqlens_k: tuple[int, ...]
    batch: int
    n_q: int
    """Queries in each row, padding included."""
    n_k: int
    """Tokens seen in each row, padding included; caches may be longer."""
    queries: Int[Tensor, " Tq"] | None
    """Where the packed queries lie in [B * n_q]; None: everywhere."""
    keys: Int[Tensor, " Tk"] | None
    """Where the packed keys lie in [B * n_k]; None: everywhere."""
    first: tuple[int, ...]
    """Where in each row its first token lies."""

    def pack_queries(self, x: Tensor) -> Tensor:
        """[B, n_q, ...] to [Tq, ...]."""
        return _pack(x, self.queries)

    def pack_keys(self, x: Tensor) -> Tensor:
        """[B, n_k or longer, ...] to [Tk, ...]."""
        return _pack(x[:, : self.n_k], self.keys)

    def unpack(self, x: Tensor) -> Tensor:
        """[Tq, ...] to [B, n_q, ...]; zeros where there is padding."""
        if self.queries is not None:
            x = x.new_zeros(self.batch * self.n_q, *x.shape[1:]).index_copy(0, self.queries, x)
        return x.unflatten(0, (self.batch, self.n_q))

    @property
    def packs(self) -> bool:
        """Whether a row holds several sequences."""
        return len(self.cu_seqlens_q) - 1 > self.batch


def _pack(x: Tensor, places: Tensor | None) -> Tensor:
    if len(x) == 1 and places is None:
        return x[0]  # a view, whatever the strides
    x = x.flatten(0, 1)
    return x if places is None else x.index_select(0, places)


_last: tuple[tuple[int, ...], list[weakref.ref[Tensor]], Plan] | None = None


def plan_for(
    position_ids: Int[Tensor, "any n_q"], mask: Bool[Tensor, "B n_k"] | None, batch: int, slots: int
) -> Plan:
    """The plan of this forward pass, made by its first layer: reading the positions waits for them.

    Args:
        slots: tokens that the keys have room for; without a mask all are seen.
    """
    global _last
    known = [x for x in (position_ids, mask) if x is not None]
    if any(x.is_inference() for x in known):  # no version: a change could not be noticed
        return make_plan(position_ids, mask, batch, slots)
    key, last = (batch, slots, *(x._version for x in known)), _last
    if last is not None and last[0] == key and all(a() is b for a, b in zip(last[1], known)):
        return last[2]
    plan = make_plan(position_ids, mask, batch, slots)
    _last = key, [weakref.ref(x) for x in known], plan
    return plan


def make_plan(
    position_ids: Int[Tensor, "any n_q"], mask: Bool[Tensor, "B n_k"] | None, batch: int, slots: int
) -> Plan:
    """Read positions and mask; see the module.

    Raises:
        ValueError: ones that are not one run in each row, positions that do not count up.

    >>> plan = make_plan(torch.tensor([[0, 1, 2, 0, 1]]), None, batch=1, slots=5)
    >>> plan.cu_seqlens_q, plan.packs
    ((0, 3, 5), True)
    >>> mask = torch.tensor([[False, True, True], [True, True, True]])
    >>> plan = make_plan(torch.tensor([[0, 1], [1, 2]]), mask, batch=2, slots=3)  # behind one token
    >>> plan.cu_seqlens_q, plan.cu_seqlens_k, plan.keys.tolist()
    ((0, 2, 4), (0, 2, 5), [1, 2, 3, 4, 5])
    """
    device = position_ids.device
    positions = np.broadcast_to(position_ids.cpu().numpy(), (batch, position_ids.shape[-1]))
    n_q, n_k = positions.shape[1], slots if mask is None else mask.shape[1]
    cached = n_k - n_q
    spans = [(0, n_k)] * batch if mask is None else read_padding(mask.cpu().numpy().astype(bool))
    count_q: list[int] = []
    count_k: list[int] = []
    for row, (first, end) in enumerate(spans):
        start = max(first, cached)  # of the queries
        found = positions[row, start - cached : max(start, end) - cached]
        starts = [0]
        if cached == 0 and mask is None:
            starts = [0, *(np.flatnonzero(np.diff(found) != 1) + 1).tolist()]
        runs = [b - a for a, b in zip(starts, [*starts[1:], len(found)])]
        wanted = np.concatenate([start - first + np.arange(run) for run in runs])
        if first and len(found) and found[0] == start:  # counted from the row's start: only turned
            wanted = wanted + first
        messages.check_positions(row, found, wanted)
        count_q += runs
        count_k += runs if len(runs) > 1 else [end - first if len(found) else 0]
    queries = keys = None
    if any(span != (0, n_k) for span in spans):
        firsts, ends = (np.array(x)[:, None] for x in zip(*spans))
        slot = np.arange(n_k)[None]
        tokens = (firsts <= slot) & (slot < ends)
        queries = _places(tokens[:, cached:], device)
        keys = _places(tokens & (ends > cached), device)
    cu_q, cu_k = (tuple(accumulate(counts, initial=0)) for counts in (count_q, count_k))
    return Plan(cu_q, cu_k, batch, n_q, n_k, queries, keys, tuple(first for first, _ in spans))


def read_padding(mask: Bool[np.ndarray, "B n_k"]) -> list[tuple[int, int]]:
    """First token of each row, and the place behind its last; an empty row ends where it starts.

    Raises:
        ValueError: a row with padding between its tokens.

    >>> read_padding(np.array([[False, True, True, False], [False, False, False, False]]))
    [(1, 3), (0, 0)]
    """
    firsts = mask.argmax(1)
    ends = firsts + mask.sum(1)
    messages.check_padding(mask, firsts, ends)
    return list(zip(firsts.tolist(), ends.tolist()))


def _places(which: np.ndarray, device: torch.device) -> Int[Tensor, " places"]:
    return torch.from_numpy(np.flatnonzero(which)).to(device)
