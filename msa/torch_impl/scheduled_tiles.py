"""From a Selection to Schedules, one tile of queries at a time, so that memory stays bounded.

Attention, its gradients and the alignment loss use this, because they need every edge.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from msa.ir import Schedule, Selection
from msa.torch_impl.reverse_index import reverse_selection
from msa.torch_impl.schedule import schedule_chunks


@dataclass(frozen=True)
class ScheduledTile:
    """A tile of queries, the keys that it may see, and the schedule of its selection."""

    queries: slice
    keys: slice
    schedule: Schedule


def queries_per_tile(elements_per_query: int, like: Tensor) -> int:
    """The number of queries whose `elements_per_query` numbers each fit into the buffer below."""
    total = CPU_BUFFER if like.device.type == "cpu" else GPU_BUFFER
    return min(max(1, total // elements_per_query), max(1, like.shape[0]))


def queries_in_cache(selection: Selection, chunk_size: int, like: Tensor) -> int:
    """Queries of a tile on a CPU that give each block the edges of two full items, on average.

    More queries would fill the items no better, and their slots would not stay in the cache. No
    bound on a GPU.
    """
    if like.device.type != "cpu":
        return max(1, like.shape[0])
    blocks = selection.sequences.max_blocks(selection.block_size)
    return max(1, 2 * chunk_size * blocks // selection.top_k)


def trimmed(selection: Selection) -> Selection:
    """The selection with at most as many places as the longest sequence has blocks.

    So a large k takes no memory.

    >>> import torch
    >>> from msa.ir import Sequences
    >>> ids = torch.tensor([[[0, -1, -1, -1]]], dtype=torch.int32)
    >>> trimmed(Selection(ids, Sequences.one(1, 3), block_size=2)).top_k
    2
    """
    sequences, block_size = selection.sequences, selection.block_size
    width = max(1, sequences.max_blocks(block_size))
    return Selection(selection.indices[..., :width], sequences, block_size)


def schedule_tiles(selection: Selection, size: int, chunk_size: int) -> Iterator[ScheduledTile]:
    """Tiles of `size` queries, lowered as far as the schedule."""
    for queries, keys, sequences in selection.sequences.tiles(size):
        part = Selection(selection.indices[queries], sequences, selection.block_size)
        schedule = schedule_chunks(reverse_selection(part), chunk_size)
        yield ScheduledTile(queries, keys, schedule)


CPU_BUFFER = 2**23
GPU_BUFFER = 2**27
"""Numbers of one slot buffer."""
