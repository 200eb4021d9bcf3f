"""The sequences of a padded batch [B, ..., T, D], and the way to packed tensors and back.

transformers gives a mask [B, seen tokens] and positions. They are read like this:

    no mask, positions count up     every row is one sequence; its queries are the last tokens (R2)
    mask 0 0 1 1 1 0                the sequence of a row is its run of ones; zeros on both sides
                                    are padding, and blocks count from the first one (R3)
    positions 0 1 2 0 1 0 1 2       the row is packed: a sequence starts where they start again

Padding is left out of the packed queries and keys. All other masks and positions are refused.
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
    """The number of queries in each row, padding included."""
    n_k: int
    """The number of tokens seen in each row, padding included. Caches may be longer."""
    queries: Int[Tensor, " Tq"] | None
    """The places of the packed queries in [B * n_q]. None means all places."""
    keys: Int[Tensor, " Tk"] | None
    """The places of the packed keys in [B * n_k]. None means all places."""
    first: tuple[int, ...]
    """The place of the first token in each row."""

    def pack_queries(self, x: Tensor) -> Tensor:
        """Pack [B, n_q, ...] to [Tq, ...]."""
        return _pack(x, self.queries)

    def pack_keys(self, x: Tensor) -> Tensor:
        """Pack [B, n_k or longer, ...] to [Tk, ...]."""
        return _pack(x[:, : self.n_k], self.keys)

    def unpack(self, x: Tensor) -> Tensor:
        """Unpack [Tq, ...] to [B, n_q, ...], with zeros in the places of padding."""
        if self.queries is not None:
            x = x.new_zeros(self.batch * self.n_q, *x.shape[1:]).index_copy(0, self.queries, x)
        return x.unflatten(0, (self.batch, self.n_q))

    @property
    def packs(self) -> bool:
        """Whether a row holds several sequences."""
        return len(self.cu_seqlens_q) - 1 > self.batch


def _pack(x: Tensor, places: Tensor | None) -> Tensor:
    if len(x) == 1 and places is None:
        return x[0]  # a view for all strides
    x = x.flatten(0, 1)
    return x if places is None else x.index_select(0, places)


class LastPlan:
    """Keeps the plan of the last forward pass, for all of its layers.

    The first layer makes the plan. This waits for the device, because it reads positions and mask.
    The other layers pass the same tensors, and get the same plan without a wait.
    """

    def __init__(self) -> None:
        self.last: tuple[tuple[int, ...], list[weakref.ref[Tensor]], Plan] | None = None

    def get(
        self,
        position_ids: Int[Tensor, "any n_q"], mask: Bool[Tensor, "B n_k"] | None, batch: int,
        slots: int,
    ) -> Plan:  # fmt: skip
        """The kept plan if the tensors are the same and unchanged, else a new one.

        Args:
            slots: the number of tokens in the keys; without a mask all are seen.
        """
        tensors = [x for x in (position_ids, mask) if x is not None]
        if any(x.is_inference() for x in tensors):  # these have no version that shows a change
            return make_plan(position_ids, mask, batch, slots)
        key, last = (batch, slots, *(x._version for x in tensors)), self.last
        if last is not None and last[0] == key and all(a() is b for a, b in zip(last[1], tensors)):
            return last[2]
        plan = make_plan(position_ids, mask, batch, slots)
        self.last = key, [weakref.ref(x) for x in tensors], plan  # at once, for other threads
        return plan


def make_plan(
    position_ids: Int[Tensor, "any n_q"], mask: Bool[Tensor, "B n_k"] | None, batch: int, slots: int
) -> Plan:
    """Read positions and mask, as the docstring of this module says.

    Raises:
        ValueError: the ones of a row are not one run, or positions do not count up.

    >>> plan = make_plan(torch.tensor([[0, 1, 2, 0, 1]]), None, batch=1, slots=5)
    >>> plan.cu_seqlens_q, plan.packs
    ((0, 3, 5), True)
    >>> mask = torch.tensor([[False, True, True], [True, True, True]])
    >>> plan = make_plan(torch.tensor([[0, 1], [1, 2]]), mask, batch=2, slots=3)  # one is cached
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
        start = max(first, cached)  # the first query
        found = positions[row, start - cached : max(start, end) - cached]
        starts = [0]
        if cached == 0 and mask is None:
            starts = [0, *(np.flatnonzero(np.diff(found) != 1) + 1).tolist()]
        runs = [b - a for a, b in zip(starts, [*starts[1:], len(found)])]
        wanted = np.concatenate([start - first + np.arange(run) for run in runs])
        # positions may count from the start of the row: all are shifted alike
        if first and len(found) and found[0] == start:
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
    """The first token of each row, and the place after its last token; equal for an empty row.

    Raises:
        ValueError: a row has padding between its tokens.

    >>> read_padding(np.array([[False, True, True, False], [False, False, False, False]]))
    [(1, 3), (0, 0)]
    """
    firsts = mask.argmax(1)
    ends = firsts + mask.sum(1)
    messages.check_padding(mask, firsts, ends)
    return list(zip(firsts.tolist(), ends.tolist()))


def _places(which: np.ndarray, device: torch.device) -> Int[Tensor, " places"]:
    return torch.from_numpy(np.flatnonzero(which)).to(device)
