"""Sequences: where packed sequences begin and end, and where their queries stand (R1, R2)."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from msa import checks


@dataclass(frozen=True)
class Sequences:
    """How several sequences are packed one after another (R1); queries are the last tokens (R2).

    The borders are plain integers on the host: hashable, printable, and read once per call. NumPy
    integers are converted.

    Raises:
        TypeError, ValueError: no tuple of integers; borders that do not start at 0, decrease,
            differ in number, or give a sequence more queries than keys (R20).

    >>> chunk = Sequences((0, 2, 5), (0, 7, 10))  # 2 new tokens of 7, then 3 of 3
    >>> chunk.total_q, chunk.total_k, chunk.max_blocks(block_size=4)
    (5, 10, 2)
    >>> chunk.positions()
    [5, 6, 0, 1, 2]
    """

    cu_seqlens_q: tuple[int, ...]
    cu_seqlens_k: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, borders in check_sequences(self).items():
            object.__setattr__(self, name, borders)

    @classmethod
    def one(cls, n_q: int, n_k: int) -> Sequences:
        """A single sequence of n_k tokens, the last n_q of which are queries."""
        return cls((0, n_q), (0, n_k))

    @classmethod
    def uniform(cls, batch: int, n_q: int, n_k: int) -> Sequences:
        """`batch` sequences of equal length: the batched layout [B, T, H, D], packed."""
        return cls(
            tuple(n_q * b for b in range(batch + 1)), tuple(n_k * b for b in range(batch + 1))
        )

    @property
    def batch(self) -> int:
        """How many sequences there are."""
        return len(self.cu_seqlens_q) - 1

    @property
    def total_q(self) -> int:
        """Tq."""
        return self.cu_seqlens_q[-1]

    @property
    def total_k(self) -> int:
        """Tk."""
        return self.cu_seqlens_k[-1]

    def spans(self) -> Iterator[tuple[slice, slice]]:
        """For each sequence the slice of its queries and the slice of its keys."""
        for s in range(self.batch):
            yield (
                slice(self.cu_seqlens_q[s], self.cu_seqlens_q[s + 1]),
                slice(self.cu_seqlens_k[s], self.cu_seqlens_k[s + 1]),
            )

    def tiles(self, size: int) -> Iterator[tuple[slice, slice, Sequences]]:
        """Tiles of `size` packed queries, the keys they may see, and the Sequences that these form.

        By R2 such a tile is a chunked prefill, so it needs no code of its own. A tile may span
        several sequences.

        >>> for queries, keys, part in Sequences((0, 3, 5), (0, 3, 9)).tiles(2):
        ...     print(queries, keys, part.cu_seqlens_q, part.cu_seqlens_k)
        slice(0, 2, None) slice(0, 2, None) (0, 2) (0, 2)
        slice(2, 4, None) slice(0, 8, None) (0, 1, 2) (0, 3, 8)
        slice(4, 5, None) slice(3, 9, None) (0, 1) (0, 6)
        """
        cu_q, cu_k = self.cu_seqlens_q, self.cu_seqlens_k
        for start in range(0, self.total_q, size):
            stop = min(start + size, self.total_q)
            first, last = bisect_right(cu_q, start) - 1, bisect_left(cu_q, stop) - 1
            first_key = cu_k[first]
            last_key = cu_k[last + 1] - (cu_q[last + 1] - stop)  # what the last query sees
            inner_q = (b - start for b in cu_q[first + 1 : last + 1])
            inner_k = (b - first_key for b in cu_k[first + 1 : last + 1])
            part = Sequences((0, *inner_q, stop - start), (0, *inner_k, last_key - first_key))
            yield slice(start, stop), slice(first_key, last_key), part

    def positions(self) -> list[int]:
        """For each packed query its position p in its own sequence (R2)."""
        return [
            p
            for qs, ks in self.spans()
            for p in range(ks.stop - ks.start - (qs.stop - qs.start), ks.stop - ks.start)
        ]

    def cu_blocks(self, block_size: int) -> tuple[int, ...]:
        """Where each sequence's blocks start if all blocks are numbered consecutively (R3)."""
        starts = [0]
        for _, ks in self.spans():
            starts.append(starts[-1] + -(-(ks.stop - ks.start) // block_size))
        return tuple(starts)

    def max_blocks(self, block_size: int) -> int:
        """NB: the number of blocks of the longest sequence."""
        return max((-(-(ks.stop - ks.start) // block_size) for _, ks in self.spans()), default=0)


# -- checks (R20) ---------------------------------------------------------------------------------
def check_sequences(sequences: Sequences) -> dict[str, tuple[int, ...]]:
    """Borders start at 0 and never decrease; no sequence has more queries than keys (R1, R2).

    Returns them as Python's own integers.
    """
    names = ("cu_seqlens_q", "cu_seqlens_k")
    cu_seqlens = {n: checks.check_integer_tuple(n, getattr(sequences, n)) for n in names}
    for name, borders in cu_seqlens.items():
        check_borders(name, borders)
    cu_q, cu_k = cu_seqlens.values()
    if len(cu_q) != len(cu_k):
        raise ValueError(
            f"cu_seqlens_k must have as many entries as cu_seqlens_q = {len(cu_q)}, got {len(cu_k)}"
        )
    for s, (q_0, q_1, k_0, k_1) in enumerate(zip(cu_q, cu_q[1:], cu_k, cu_k[1:])):
        if q_1 - q_0 > k_1 - k_0:
            raise ValueError(
                f"cu_seqlens_q must give each sequence at most as many queries as keys (R2), "
                f"got {q_1 - q_0} queries for {k_1 - k_0} keys in sequence {s}"
            )
    return cu_seqlens


def check_borders(name: str, borders: tuple[int, ...]) -> None:
    """Borders start at 0, never decrease, and end within 64 bits."""
    if not borders or borders[0] != 0:
        raise ValueError(f"{name} must start with 0, got {_short(borders)}")
    for s, (start, stop) in enumerate(zip(borders, borders[1:])):
        if stop < start:
            raise ValueError(f"{name} must not decrease, got {start} then {stop} at sequence {s}")
    last = f"{name}[{len(borders) - 1}]"
    checks.check_at_most(last, borders[-1], LARGEST_BORDER=checks.LARGEST_BORDER)


def _short(borders: tuple[int, ...]) -> str:
    shown = ", ".join(str(b) for b in borders[:4])
    return f"({shown}{', ...' if len(borders) > 4 else ''})"


def check_totals(sequences: Sequences, total_q: int, total_k: int, whose: str) -> None:
    """The last borders are the numbers of packed tokens."""
    for name, borders, letter, total in (
        ("cu_seqlens_q", sequences.cu_seqlens_q, "Tq", total_q),
        ("cu_seqlens_k", sequences.cu_seqlens_k, "Tk", total_k),
    ):
        if borders[-1] != total:
            raise ValueError(f"{whose}{name} must end with {letter} = {total}, got {borders[-1]}")
