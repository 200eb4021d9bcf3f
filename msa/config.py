"""MSAConfig: the numbers that say what MSA computes, on every backend."""

from __future__ import annotations

from dataclasses import dataclass

from msa import checks
from msa.checks import LARGEST_BLOCK_SIZE, LARGEST_SCALE, LARGEST_TOP_K, LEAST_SCALE

__all__ = ["LARGEST_BLOCK_SIZE", "LARGEST_SCALE", "LARGEST_TOP_K", "LEAST_SCALE", "MSAConfig"]


@dataclass(frozen=True)
class MSAConfig:
    """Six numbers that say what is computed. How it is computed is the backend's choice.

    The defaults are those of the paper and of MiniMax-M3. A configuration is frozen, and its
    numbers are checked once, when it is made. To change a number, make a new configuration with
    `dataclasses.replace`. Numbers may be Python's or NumPy's; they are kept as Python's.

    Every backend takes up to LARGEST_TOP_K blocks of up to LARGEST_BLOCK_SIZE tokens, and scales
    from LEAST_SCALE to LARGEST_SCALE. The triton backend has further limits, which its messages
    name.

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
    """How many of the last visible blocks are always selected, including the own block (R6)."""
    softmax_scale: float | None = None
    """The factor of <q, k>; None means D ** -0.5 (R9)."""
    index_scale: float | None = None
    """The factor of <q_idx, k_idx>; None means Di ** -0.5 (R4)."""

    def __post_init__(self) -> None:
        for name, number in check_config(self).items():
            object.__setattr__(self, name, number)

    @property
    def forced_blocks(self) -> int:
        """Places of the top-k that forced blocks take, whatever the scores are (R6)."""
        return self.sink_blocks + self.local_blocks

    def softmax_scale_for(self, head_dim: int) -> float:
        """The scale of the main branch for heads of this size (R9)."""
        return self.softmax_scale if self.softmax_scale is not None else head_dim**-0.5

    def index_scale_for(self, index_dim: int) -> float:
        """The scale of the index branch for heads of this size (R4)."""
        return self.index_scale if self.index_scale is not None else index_dim**-0.5


def check_config(config: MSAConfig) -> dict[str, int | float | None]:
    """Check the six numbers of an MSAConfig; return them as Python's own (R20)."""
    block_size = checks.check_block_size("block_size", config.block_size)
    top_k = checks.check_at_most(
        "top_k", checks.check_count("top_k", config.top_k, 1), LARGEST_TOP_K=LARGEST_TOP_K
    )
    sink_blocks = checks.check_count("sink_blocks", config.sink_blocks, 0)
    local_blocks = checks.check_count("local_blocks", config.local_blocks, 1)
    if sink_blocks + local_blocks > top_k:
        raise ValueError(
            f"sink_blocks + local_blocks must be at most top_k = {top_k}, "
            f"got {sink_blocks} + {local_blocks}"
        )
    return {
        "block_size": block_size,
        "top_k": top_k,
        "sink_blocks": sink_blocks,
        "local_blocks": local_blocks,
        "softmax_scale": checks.check_scale("softmax_scale", config.softmax_scale),
        "index_scale": checks.check_scale("index_scale", config.index_scale),
    }
