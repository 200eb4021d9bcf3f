"""Which loop order pays for a tile: the measured rule of `loop_order="auto"`, without torch.

Walking a tile's union costs all of its queries the work of every block in it; KV-outer costs a
block's own readers alone, but at a lower rate, for each of them leaves a partial result that is
written and read again. Both mean the same (R9, R13-R16), so the length of the union may decide.
The numbers were measured on an H100 (docs/ladder.md); the triton backend decides by them on the
device, tile by tile.
"""

from __future__ import annotations

WALK_ALL, WALK_PAIRS = 1.75, 3.0
"""A tile whose union has up to WALK_ALL * k blocks walks them all; one of up to WALK_PAIRS * k
leaves blocks of a single query to KV-outer, a longer one those of two, too (docs/ladder.md)."""

MIN_EDGES = 4.0
"""KV-outer needs at least so many queries per block, or loading the block is not worth it."""

LARGEST_SPLIT = 64
"""With more blocks per query than this, every tile walks its whole union: to take a union apart
means to compare all pairs of a tile's edges, which are then thousands."""


def limits(top_k: int) -> tuple[int, int]:
    """The longest union that is walked whole, and the longest that keeps the blocks of pairs.

    >>> limits(16)
    (28, 48)
    """
    return int(WALK_ALL * top_k), int(WALK_PAIRS * top_k)


def least_shared(union: int, top_k: int, readers: float) -> int:
    """By how many of a tile's queries a block must be read to be walked; others go KV-outer.

    Args:
        union: blocks in the union of the tile's selections.
        readers: queries that read a block, on average over all blocks.

    >>> [least_shared(union, 16, readers=1000.0) for union in (20, 30, 57)]
    [1, 2, 3]
    >>> least_shared(57, 16, readers=2.0), least_shared(500, 100, readers=1000.0)
    (1, 1)
    """
    whole, pairs = limits(top_k)
    if readers < MIN_EDGES or union <= whole or top_k > LARGEST_SPLIT:
        return 1
    return 2 if union <= pairs else 3


def words(least: int) -> str:
    """What a tile does that walks the blocks read by at least so many of its queries."""
    if least == 1:
        return "walks its whole union"
    return f"walks the blocks of {least} queries or more, KV-outer does the others"


def choose(union: int, top_k: int, readers: float) -> str:
    """The same as `least_shared`, in words.

    >>> choose(30, 16, readers=1000.0)
    'walks the blocks of 2 queries or more, KV-outer does the others'
    """
    return words(least_shared(union, top_k, readers))


def rule() -> list[tuple[str, str]]:
    """The blocks in a tile's union, and what the tile does then: the lines of a table."""
    return [
        (f"up to {WALK_ALL:g}·k", words(1)),
        (f"up to {WALK_PAIRS:g}·k", words(2)),
        ("more", words(3)),
        (f"any, if a block has < {MIN_EDGES:g} readers on average", words(1)),
        (f"any, if k > {LARGEST_SPLIT}", words(1)),
    ]
