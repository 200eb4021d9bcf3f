"""The rule of `loop_order="auto"`: which loop order is faster for a tile. It needs no torch.

A walk along a tile's union does the work of every block for all queries of the tile. KV-outer does
the work of a block only for the queries that read it, but more slowly: each of them writes a
partial result, which is read again. The results are the same (R9, R13-R16), so the length of the
union decides. The numbers were measured on an H100 (docs/ladder.md). The triton backend applies
them on the device, tile by tile.

On other GPUs the numbers are counted, not measured. A walk beyond k blocks costs products; what it
saves is the memory traffic of partial results. So the part of a limit beyond k grows with the
products that a GPU computes in the time of one byte (`Family.operations_per_byte`).
"""

from __future__ import annotations

WALK_ALL, WALK_PAIRS = 1.75, 3.0
"""A tile with a union of up to WALK_ALL * k blocks walks them all. With up to WALK_PAIRS * k blocks
it leaves those that one query reads to KV-outer, with more also those that two queries read
(docs/ladder.md)."""

MEASURED_RATE = 295.0
"""Products of 16 bits per byte of memory of the H100."""

MIN_EDGES = 4.0
"""With fewer readers per block than this, KV-outer is slower: loading a block costs too much."""

SHARED = (0, 2**31 - 1)
"""The same as `limits` for the hopper walk, of the queries of one consumer: it walks the blocks
that two of them or more selected, whatever the length of the union. Measured at 32K, 64K and 128K
tokens, beside three or more and beside limits by length."""

LARGEST_SPLIT = 64
"""With more blocks per query than this, every tile walks its whole union. To split a union, all
pairs of a tile's edges are compared, and there would be thousands of edges."""


def factors(rate: float = MEASURED_RATE) -> tuple[float, float]:
    """WALK_ALL and WALK_PAIRS for a GPU that computes `rate` products per byte of memory.

    >>> factors(), factors(153.0)
    ((1.75, 3.0), (1.39, 2.04))
    """
    share = rate / MEASURED_RATE
    whole, pairs = (round(1 + (factor - 1) * share, 2) for factor in (WALK_ALL, WALK_PAIRS))
    return whole, pairs


def limits(top_k: int, rate: float = MEASURED_RATE) -> tuple[int, int]:
    """The longest union that is walked whole, and the longest that keeps blocks of two readers.

    >>> limits(16)
    (28, 48)
    """
    whole, pairs = factors(rate)
    return int(whole * top_k), int(pairs * top_k)


def least_shared(union: int, top_k: int, readers: float, rate: float = MEASURED_RATE) -> int:
    """How many of a tile's queries must read a block for it to be walked; others go KV-outer.

    Args:
        union: blocks in the union of the tile's selections.
        readers: queries that read a block, on average over all blocks.
        rate: products per byte of memory of the GPU.

    >>> [least_shared(union, 16, readers=1000.0) for union in (20, 30, 57)]
    [1, 2, 3]
    >>> least_shared(57, 16, readers=2.0), least_shared(500, 100, readers=1000.0)
    (1, 1)
    """
    whole, pairs = limits(top_k, rate)
    if readers < MIN_EDGES or union <= whole or top_k > LARGEST_SPLIT:
        return 1
    return 2 if union <= pairs else 3


def words(least: int) -> str:
    """What a tile does, in words, if it walks the blocks that `least` of its queries read."""
    if least == 1:
        return "walks its whole union"
    return f"walks the blocks of {least} queries or more, KV-outer does the others"


def choose(union: int, top_k: int, readers: float, rate: float = MEASURED_RATE) -> str:
    """The same as `least_shared`, in words.

    >>> choose(30, 16, readers=1000.0)
    'walks the blocks of 2 queries or more, KV-outer does the others'
    """
    return words(least_shared(union, top_k, readers, rate))


def rule(rate: float = MEASURED_RATE) -> list[tuple[str, str]]:
    """Pairs of a number of blocks in a tile's union and what the tile does, for a table."""
    whole, pairs = factors(rate)
    return [
        (f"up to {whole:g}·k", words(1)),
        (f"up to {pairs:g}·k", words(2)),
        ("more", words(3)),
        (f"any, if a block has < {MIN_EDGES:g} readers on average", words(1)),
        (f"any, if k > {LARGEST_SPLIT}", words(1)),
    ]
