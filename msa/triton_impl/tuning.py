"""Launch parameters as data: one frozen record per kernel, from a table of measurements.

The table is written by hand from the output of `benchmarks/tune.py`; docs/ladder.md says what else
was tried. A shape that is not in the table takes the safe default of its kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class TileConfig:
    """How one kernel is cut and launched; none of these numbers changes what it computes."""

    rows: int
    """Rows of the tile: query positions times heads, or (query, group) pairs."""
    keys: int
    """Keys of one product; blocks longer than this are walked in steps."""
    warps: int = 4
    stages: int = 2
    """Depth of the software pipeline of the loads."""
    descriptors: bool = False
    """The bulk copy engine (TMA) loads the keys if their layout allows it."""
    programs: int = 132
    """Programs that share the work where there is a choice."""
    registers: int | None = None
    """Upper bound of registers per thread, to fit more programs on a multiprocessor."""

    def launch(self) -> dict[str, Any]:
        """The keyword arguments of a kernel launch."""
        limits = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **limits}


# kernel -> (bytes per element, padded head size) -> configuration, measured on an H100
TABLE: dict[str, dict[tuple[int, int], TileConfig]] = {
    "select": {
        (1, 128): TileConfig(rows=128, keys=128, warps=4, stages=3, descriptors=True),
        (2, 128): TileConfig(rows=128, keys=128, warps=4, stages=2, descriptors=True),
        (2, 64): TileConfig(rows=128, keys=128, warps=4, stages=2, descriptors=True),
    },
    "chunks": {
        (2, 128): TileConfig(rows=64, keys=128, warps=4, stages=3),
        (2, 64): TileConfig(rows=64, keys=128, warps=4, stages=3),
    },
    "union": {
        (2, 128): TileConfig(rows=64, keys=64, warps=4, stages=3, descriptors=True),
        (2, 64): TileConfig(rows=64, keys=64, warps=4, stages=3, descriptors=True),
    },
    "keys": {
        (2, 128): TileConfig(rows=64, keys=128, warps=8, stages=3),
        (2, 64): TileConfig(rows=64, keys=128, warps=8, stages=3),
    },
    "queries": {
        (2, 128): TileConfig(rows=64, keys=64, warps=4, stages=2, descriptors=True),
        (2, 64): TileConfig(rows=64, keys=64, warps=4, stages=2, descriptors=True),
    },
    "sums": {
        (2, 128): TileConfig(rows=128, keys=128, warps=4, stages=2),
        (2, 64): TileConfig(rows=128, keys=128, warps=4, stages=2),
    },
    "teacher": {
        (2, 128): TileConfig(rows=64, keys=128, warps=4, stages=2),
        (2, 64): TileConfig(rows=64, keys=128, warps=4, stages=2),
    },
    "index_loss": {
        (2, 128): TileConfig(rows=32, keys=128, warps=4, stages=3),
        (2, 64): TileConfig(rows=32, keys=128, warps=4, stages=3),
    },
    "pages": {
        (1, 128): TileConfig(rows=64, keys=128, stages=1, descriptors=True, programs=528),
        (2, 128): TileConfig(rows=64, keys=128, stages=1, descriptors=True, programs=528),
        (2, 64): TileConfig(rows=64, keys=128, stages=1, descriptors=True, programs=528),
    },
    "paged": {
        (2, 128): TileConfig(rows=16, keys=128, warps=4, stages=3),
        (2, 64): TileConfig(rows=16, keys=128, warps=4, stages=3),
    },
    "wide_paged": {
        (2, 128): TileConfig(rows=16, keys=128, warps=8, stages=3),
        (2, 64): TileConfig(rows=16, keys=128, warps=8, stages=3),
    },
    "many_paged": {
        (2, 128): TileConfig(rows=16, keys=64, warps=4, stages=3, programs=264),
        (2, 64): TileConfig(rows=16, keys=64, warps=4, stages=3, programs=264),
    },
}
DEFAULTS = {
    "select": TileConfig(rows=64, keys=64),
    "chunks": TileConfig(rows=32, keys=64, stages=1),
    "union": TileConfig(rows=64, keys=64, stages=1),
    "keys": TileConfig(rows=32, keys=32, stages=1),
    "queries": TileConfig(rows=32, keys=32, stages=1),
    "sums": TileConfig(rows=32, keys=64, stages=1),
    "teacher": TileConfig(rows=32, keys=64, stages=1),
    "index_loss": TileConfig(rows=32, keys=32, stages=1),
    "pages": TileConfig(rows=32, keys=32, stages=1, programs=528),
    "paged": TileConfig(rows=16, keys=32, stages=1),
    "wide_paged": TileConfig(rows=16, keys=32, stages=1),
    "many_paged": TileConfig(rows=16, keys=32, stages=1),
}


def choose(kernel: str, dtype: torch.dtype, dim: int, block_size: int) -> TileConfig:
    """The measured configuration of this kernel and shape, or its safe default.

    >>> choose("select", torch.float32, 96, 32)
    TileConfig(rows=64, keys=32, warps=4, stages=2, descriptors=False, programs=132, registers=None)
    """
    found = TABLE[kernel].get((dtype.itemsize, dim), DEFAULTS[kernel])
    if dtype.itemsize == 4 and dim > 128:
        found = TileConfig(rows=16, keys=32, stages=1)
    return replace(found, keys=min(found.keys, block_size))


# -- choices between lowerings --------------------------------------------------------------------
PARTIAL_BYTES = 9 * 2**29
"""Bound on the memory of partial results, forward and backward, and of the marks of the reverse
index: queries are taken in super-tiles that keep below it. The backward has one item for each block
and group beside it."""

CHUNK_EDGES = 128
"""Edges of one work item of the schedule, in the fused path."""

LOSS_EDGES = 512
"""The same where each item leaves a gradient of its whole block of index keys."""

KEY_TILES, TEACHER_TILES = 256, 64
"""The same in tiles of queries: gradients of keys, which every item leaves apart; the teacher."""

TRAINING_BYTES = 2**31
"""Bound on what the alignment loss keeps in slots: queries are taken in super-tiles below it."""
