"""The host's plan of a selection on Hopper: which program scores which blocks of which rows.

    tiles       = runs of neighbouring queries, 256 rows each (query, group)
    super-tiles = runs of tiles whose scores fit into SCORE_BYTES
    for each super-tile:
        for each chunk of keys that fits into the L2 cache:
            pairs = all (tile, block of the chunk), tile by tile
            program p gets pairs[len * p // P : len * (p + 1) // P]

The scores of one tile are a slab: pieces of 8 blocks times 256 rows, sink blocks left out. Where
rows are long, the top-k looks at the maxima of pieces first, so one program must score all blocks
of a piece, and the shares are whole pieces.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from msa import chips
from msa.config import MSAConfig
from msa.ir import Sequences
from msa.triton_impl.places import device_table
from msa.triton_impl.step_sequences import lower, to_device

ROWS = 256
"""Rows of one tile: (query, group) pairs."""

SCORE_BYTES = 2**29
"""Bound on the memory of the scores of one super-tile; their maxima take an eighth beside it."""

CHUNK_BYTES = 2**24
"""Index keys that all programs read at about the same time, at most a third of the L2 cache, so
that they stay there."""

PIECE = 8
"""Blocks of one piece: a slab has its scores side by side for each row."""

LONG = 256
"""The top-k looks at all scores of a row of at most this many blocks, without maxima of pieces."""


@dataclass(frozen=True)
class SuperTile:
    """A run of tiles, and where its numbers lie in the tables of the plan."""

    first_tile: int
    tiles: int
    first_run: int
    blocks: int
    """Blocks of all slabs together, each one padded to whole pieces."""
    long: bool
    """Whether the top-k looks at maxima of pieces first: the longest slab has more than LONG
    blocks."""


@dataclass(frozen=True)
class ScorePlan:
    """Tables of one selection; `parts` says which of their rows belong to a super-tile."""

    tiles: Int[Tensor, "tiles 8"]
    """First query, its stop, position of the first query, first block of the slab, its blocks;
    zeros behind, so that each row starts at 32 bytes."""
    segments: Int[Tensor, "segments 8"]
    """First row of queries, first key, number of blocks, first block in the slabs, position of the
    tile's first query, first block, blocks to write (at the end of a tile whole pieces),
    sequence."""
    runs: Int[Tensor, " runs"]
    """Program p of a super-tile has segments runs[first_run + p] ... runs[first_run + p + 1]."""
    programs: int
    parts: tuple[SuperTile, ...]


def cut_tiles(sequences: Sequences, config: MSAConfig, queries: int) -> np.ndarray:
    """Tiles: first query, its stop, position of the first, first key, scored blocks, sequence."""
    tiles = []
    for s, (qs, ks) in enumerate(sequences.spans()):
        start = np.arange(qs.start, qs.stop, queries, dtype=np.int64)
        stop = np.minimum(start + queries, qs.stop)
        position = start + (ks.stop - ks.start) - qs.stop
        last = (position + stop - start - 1) // config.block_size
        blocks = np.maximum(last - config.local_blocks + 1 - config.sink_blocks, 0)
        if config.forced_blocks == config.top_k:
            blocks[:] = 0  # no place is left for a scored block
        first_key, sequence = np.full_like(start, ks.start), np.full_like(start, s)
        tiles.append(np.column_stack([start, stop, position, first_key, blocks, sequence]))
    return np.concatenate(tiles) if tiles else np.zeros((0, 6), np.int64)


def cut_shares(blocks: np.ndarray, chunk: int, programs: int, unit: int = 1) -> np.ndarray:
    """Segments [program, tile, first block, blocks], each program's ones behind one another.

    In every chunk of `chunk` blocks all programs have equal shares, up to `unit` blocks. No cut
    lies inside `unit` blocks of a tile.

    >>> cut_shares(np.array([3, 1]), 8, 2).tolist()
    [[0, 0, 0, 2], [1, 0, 2, 1], [1, 1, 0, 1]]
    >>> cut_shares(np.array([3, 1]), 8, 2, unit=2).tolist()
    [[0, 0, 0, 2], [1, 0, 2, 1], [1, 1, 0, 1]]
    """
    found = []
    units = -(-blocks // unit)
    for first in range(0, int(units.max(initial=0)), chunk // unit):
        lengths = np.clip(units - first, 0, chunk // unit)
        ends = np.cumsum(lengths)
        shares = ends[-1] * np.arange(programs + 1) // programs
        cuts = np.unique(np.concatenate([shares, ends - lengths, ends]))
        begin, size = cuts[:-1], np.diff(cuts)
        tile = np.searchsorted(ends, begin, side="right")
        program = np.searchsorted(shares, begin, side="right") - 1
        block = (first + begin - (ends - lengths)[tile]) * unit
        size = np.minimum(size * unit, blocks[tile] - block)
        found.append(np.column_stack([program, tile, block, size]))
    table = np.concatenate(found) if found else np.zeros((0, 4), np.int64)
    return table[np.argsort(table[:, 0], kind="stable")]


def cut_super_tiles(slabs: np.ndarray, room: int) -> list[tuple[int, int]]:
    """Runs of tiles, each a first tile and a stop, whose slabs have at most `room` blocks.

    A slab that is larger has a super-tile of its own.

    >>> cut_super_tiles(np.array([8, 8, 16, 0, 40]), 16)
    [(0, 2), (2, 4), (4, 5)]
    """
    ends, first = np.cumsum(slabs), 0
    found: list[tuple[int, int]] = []
    while first < len(slabs):
        before = ends[first] - slabs[first]
        stop = max(first + 1, int(np.searchsorted(ends, before + room, side="right")))
        found.append((first, stop))
        first = stop
    return found


def aligned(count: int) -> int:
    """The next multiple of four: each super-tile's part of a table then starts at 16 bytes."""
    return -(-count // 4) * 4


@device_table
def plan_scores(
    sequences: Sequences,
    config: MSAConfig,
    groups: int,
    token_bytes: int,
    score_bytes: int,
    device: torch.device,
) -> ScorePlan:
    """Tiles, super-tiles of at most `score_bytes`, and each program's segments."""
    chip = chips.current()
    programs = chip.multiprocessors if device.type == "cuda" else 4
    keys = min(CHUNK_BYTES, chip.l2 // 3) // (token_bytes * config.block_size)
    chunk = max(1, keys // PIECE) * PIECE
    every = cut_tiles(sequences, config, ROWS // groups)
    slabs = -(-every[:, 4] // PIECE) * PIECE
    parts: list[SuperTile] = []
    rows, segments, runs = ([np.zeros(shape, np.int64)] for shape in ((0, 8), (0, 8), 0))
    n_segments, n_runs = 0, aligned(programs + 1)
    for first, stop in cut_super_tiles(slabs, score_bytes // (4 * ROWS)):
        tiles, slab = every[first:stop], slabs[first:stop]
        offset = np.cumsum(slab) - slab
        longest = int(tiles[:, 4].max())
        parts.append(
            SuperTile(first, stop - first, n_runs * len(parts), int(slab.sum()), longest > LONG)
        )
        unit = PIECE if parts[-1].long else 1
        program, *share = cut_shares(tiles[:, 4], chunk, programs, unit).T
        segments.append(describe_segments(tiles, offset, slab, *share, config, groups))
        rows.append(np.column_stack([tiles[:, :3], offset, tiles[:, 4], np.zeros((len(slab), 3))]))
        bounds = np.minimum(np.arange(n_runs), programs)
        runs.append(np.searchsorted(program, bounds) + n_segments)
        n_segments += len(program)
    on_device = [to_device(np.concatenate(x), device) for x in (rows, segments, runs)]
    lower(on_device[0].T[2:3], sequences, every[:, 5])
    lower(on_device[1].T[4:5], sequences, np.concatenate(segments)[:, 7])
    return ScorePlan(*on_device, programs, tuple(parts))


def describe_segments(
    tiles: np.ndarray, offset: np.ndarray, slab: np.ndarray, tile: np.ndarray, block: np.ndarray,
    size: np.ndarray, config: MSAConfig, groups: int,
) -> np.ndarray:  # fmt: skip
    """The rows of `ScorePlan.segments` for shares of the tiles: `size` blocks of `tile` each."""
    is_last = block + size == tiles[tile, 4]
    return np.column_stack([
        tiles[tile, 0] * groups,
        tiles[tile, 3] + (block + config.sink_blocks) * config.block_size,
        size,
        offset[tile] + block,
        tiles[tile, 2],
        block + config.sink_blocks,
        np.where(is_last, slab[tile] - block, size),
        tiles[tile, 5],
    ])  # fmt: skip
