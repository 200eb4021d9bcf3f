"""Which tokens each rank holds: two chunks of each sequence, cut at borders of blocks.

A query at position p scores p keys, so late queries cost more. Each sequence is cut into 2P chunks
of nearly equal length, and rank r of P takes chunks r and 2P - 1 - r: an early one and a late one.
The two together cost every rank the same. This order is called zig-zag.

    chunks of a sequence, P = 2:   0   1   2   3
    ranks:                         0   1   1   0

A rank packs its tokens in two halves: first its early chunk of every sequence, then its late chunk
of every sequence. The queries of a half are the last tokens of prefixes of the sequences (R2), so
attention over a half is an ordinary call.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from msa import checks
from msa.sequences import Sequences

HALVES = (0, 1)
"""The early half and the late half of a rank's tokens."""


@dataclass(frozen=True)
class Shards:
    """The zig-zag chunks of packed sequences, for a number of ranks.

    Args:
        cu_seqlens: borders of the whole sequences [batch + 1] (R1); every token is a query.
        ranks: the number of ranks P.
        block_size: chunks begin at multiples of it, so no block is cut.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came (R20).

    >>> shards = Shards((0, 10), ranks=2, block_size=2)
    >>> shards.chunks  # of the only sequence: the borders of its four chunks
    ((0, 2, 4, 6, 10),)
    >>> [shards.tokens(rank).tolist() for rank in range(2)]
    [[0, 1, 6, 7, 8, 9], [2, 3, 4, 5]]
    >>> shards.half(rank=1, half=1)  # two queries, the last ones of six tokens
    Sequences(cu_seqlens_q=(0, 2), cu_seqlens_k=(0, 6))
    """

    cu_seqlens: tuple[int, ...]
    ranks: int
    block_size: int

    def __post_init__(self) -> None:
        borders = checks.check_integer_tuple("cu_seqlens", self.cu_seqlens)
        Sequences(borders, borders)  # checks that borders start with 0 and do not decrease
        checks.check_count("ranks", self.ranks, 1)
        checks.check_block_size("block_size", self.block_size)

    @property
    def total(self) -> int:
        """The tokens of all sequences."""
        return self.cu_seqlens[-1]

    @cached_property
    def chunks(self) -> tuple[tuple[int, ...], ...]:
        """For each sequence the positions at which its 2P chunks begin and end."""
        parts = 2 * self.ranks
        borders = []
        for start, stop in pairwise(self.cu_seqlens):
            length = stop - start
            blocks = -(-length // self.block_size)
            cuts = (blocks * chunk // parts * self.block_size for chunk in range(parts + 1))
            borders.append(tuple(min(cut, length) for cut in cuts))
        return tuple(borders)

    def spans(self, rank: int, half: int) -> list[tuple[int, int]]:
        """For each sequence where the rank's chunk begins and ends, as positions."""
        chunk = 2 * self.ranks - 1 - rank if half else rank
        return [(cuts[chunk], cuts[chunk + 1]) for cuts in self.chunks]

    def rows(self, rank: int) -> int:
        """How many tokens a rank holds."""
        return sum(b - a for half in HALVES for a, b in self.spans(rank, half))

    def half(self, rank: int, half: int) -> Sequences:
        """The sequences of a call: a half's queries, and the prefixes of keys that end with them.

        A sequence without queries in this half brings no keys.
        """
        spans = self.spans(rank, half)
        queries = accumulate((b - a for a, b in spans), initial=0)
        keys = accumulate((b if b > a else 0 for a, b in spans), initial=0)
        return Sequences(tuple(queries), tuple(keys))

    def tokens(self, rank: int, device: torch.device | str = "cpu") -> Tensor:
        """The packed positions of a rank's tokens, int64, in the order of its rows."""
        spans = [span for half in HALVES for span in self.spans(rank, half)]
        starts = self.cu_seqlens[:-1] * len(HALVES)
        return ranges([(start + a, start + b) for start, (a, b) in zip(starts, spans)], device)

    def prefixes(self, rank: int, half: int, device: torch.device | str = "cpu") -> Tensor:
        """The packed positions of a half's keys, int64, in the order of the call."""
        spans = self.spans(rank, half)
        starts = zip(self.cu_seqlens, spans)
        return ranges([(start, start + b) for start, (a, b) in starts if b > a], device)

    def places(self, device: torch.device | str = "cpu") -> Tensor:
        """Where each packed token lies among the ranks' rows, each rank's padded to the most rows.

        >>> Shards((0, 10), ranks=2, block_size=2).places().tolist()
        [0, 1, 6, 7, 8, 9, 2, 3, 4, 5]
        """
        most = max(self.rows(rank) for rank in range(self.ranks))
        places = torch.empty(self.total, dtype=torch.int64, device=device)
        for rank in range(self.ranks):
            tokens = self.tokens(rank, device)
            places[tokens] = rank * most + torch.arange(len(tokens), device=device)
        return places


def ranges(spans: list[tuple[int, int]], device: torch.device | str) -> Tensor:
    """The integers of several ranges, one after another, int64.

    >>> ranges([(2, 4), (7, 8)], "cpu").tolist()
    [2, 3, 7]
    """
    pieces = [torch.arange(start, stop, device=device) for start, stop in spans if stop > start]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64, device=device)


def key_places(shards: Shards, rank: int, device: torch.device) -> list[Tensor]:
    """Where the keys of the rank's two halves lie among the gathered rows.

    Made on the device for each call, some tens of small kernels: a tensor that is kept would have
    to be safe on every stream.
    """
    places = shards.places(device)
    return [places[shards.prefixes(rank, half, device)] for half in HALVES]


def shards_of(total: int, ranks: int, cu_seqlens: Any, block_size: int) -> Shards:
    """The Shards of `total` tokens; cu_seqlens None means one sequence."""
    borders = (0, total) if cu_seqlens is None else checks.read_borders("cu_seqlens", cu_seqlens)
    shards = Shards(borders, ranks, block_size)
    if shards.total != total:
        raise ValueError(
            f"cu_seqlens must end with T = {total}, the tokens of all ranks, got {shards.total}"
        )
    return shards
