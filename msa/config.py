"""The one configuration object: what MSA computes, whatever the backend."""

from __future__ import annotations

from dataclasses import dataclass

from msa import checks
from msa.checks import LARGEST_BLOCK_SIZE, LARGEST_SCALE, LARGEST_TOP_K, LEAST_SCALE

__all__ = ["LARGEST_BLOCK_SIZE", "LARGEST_SCALE", "LARGEST_TOP_K", "LEAST_SCALE", "MSAConfig"]


@dataclass(frozen=True)
class MSAConfig:
    """What is computed; never how. Every backend reads the same six numbers.

    Defaults are those of the paper and of MiniMax-M3. A configuration is frozen: its numbers are
    checked once, when it is made, so make another one with `dataclasses.replace` to change it.
    Numbers may be Python's or NumPy's, and are kept as Python's.

    Every backend takes up to LARGEST_TOP_K blocks of up to LARGEST_BLOCK_SIZE tokens, and scales
    from LEAST_SCALE to LARGEST_SCALE; the triton backend has limits of its own beside these, which
    its messages name.

    Raises:
        TypeError: a count that is not an integer, a scale that is not a number.
        ValueError: a count or a scale out of range (R20).

    >>> MSAConfig(block_size=4, top_k=2).forced_blocks
    1
    >>> LARGEST_TOP_K, LARGEST_BLOCK_SIZE
    (16384, 65536)
    """

    block_size: int = 128
    """Bk: tokens in a key block (R3)."""
    top_k: int = 16
    """k: blocks kept per query and group, forced ones included (R6, R7)."""
    sink_blocks: int = 0
    """How many of the first visible blocks are always selected (R6)."""
    local_blocks: int = 1
    """How many of the last visible blocks are always selected, the query's own one first (R6)."""
    softmax_scale: float | None = None
    """Factor on <q, k>; None means D ** -0.5 (R9)."""
    index_scale: float | None = None
    """Factor on <q_idx, k_idx>; None means Di ** -0.5 (R4)."""

    def __post_init__(self) -> None:
        for name, number in checks.check_config(self).items():
            object.__setattr__(self, name, number)

    @property
    def forced_blocks(self) -> int:
        """Places of the top-k that are given away before any score is looked at (R6)."""
        return self.sink_blocks + self.local_blocks

    def softmax_scale_for(self, head_dim: int) -> float:
        """The scale of the main branch for heads of this size (R9)."""
        return self.softmax_scale if self.softmax_scale is not None else head_dim**-0.5

    def index_scale_for(self, index_dim: int) -> float:
        """The scale of the index branch for heads of this size (R4)."""
        return self.index_scale if self.index_scale is not None else index_dim**-0.5
