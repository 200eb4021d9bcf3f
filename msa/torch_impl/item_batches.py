"""Work items as dense batches: the schedule (R14) in the form of batched matrix products.

Many queries read one block of keys, so an item is one ordinary product: its gathered queries, with
all heads of the group stacked, times its block of keys. The other loop order would gather k blocks
of keys for each query, which moves Bk / Hq times as much data. On a CPU it is several times slower.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from msa.ir import Schedule
from msa.torch_impl.tiles import block_positions, query_positions

CPU_BATCH = 2**18
"""Logits of one batch, 1 MiB (measured): they stay in the cache of a core from the product to the
softmax, and the allocator gives the same memory to the next batch. Larger batches come from fresh
memory each time. Smaller ones start the threads more often."""
GPU_BATCH = 2**25


@dataclass(frozen=True)
class ItemBatch:
    """W items of up to C edges each; shorter items are filled up with copies of their first edge.

    A lane is a (query, group) pair, numbered `query * Hkv + group`.
    """

    rows: Int[Tensor, " W"]
    """Row of the reverse index: which block of which group the item reads."""
    lanes: Int[Tensor, "W C"]
    """The lanes that read the block."""
    slots: Int[Tensor, "W C"]
    """The rank of the block in the lane's selection."""
    real: Bool[Tensor, "W C"]
    """False for copies."""
    visible: Bool[Tensor, "W C Bk"] | None
    """Tokens not in the edge's future; None if no edge reads its query's own block (R3)."""
    top_k: int
    all_lanes: int

    def edge_places(self) -> Int[Tensor, " W_C"]:
        """The row of each edge in a buffer [lanes, k, ...]; copies get the row after."""
        places = self.lanes * self.top_k + self.slots
        return torch.where(self.real, places, self.all_lanes * self.top_k).flatten()

    def places(self, group: int) -> Int[Tensor, " W_C_G"]:
        """The row of each edge and head in a buffer [lanes, group, k]; copies get the row after."""
        head = torch.arange(group, device=self.lanes.device)
        places = (self.lanes[..., None] * group + head) * self.top_k + self.slots[..., None]
        return torch.where(
            self.real[..., None], places, self.all_lanes * group * self.top_k
        ).flatten()


def edges_per_item(group: int) -> int:
    """A chunk size that gives an item's products some 128 rows (measured)."""
    return max(16, 128 // group)


def item_batches(schedule: Schedule, edge_cost: int) -> Iterator[ItemBatch]:
    """All items, in batches of so many that `edges * edge_cost` numbers fit into the cache.

    Full items come first, in row order. The short items, at most one of each row, follow by length,
    so that few copies are computed. No batch holds both kinds, so items of a row lie side by side.
    """
    if not len(schedule.rows):
        return
    index, chunk = schedule.reverse_index, schedule.chunk_size
    device, block, groups = index.query_ids.device, index.block_size, index.counts.shape[1]
    lengths = schedule.stops - schedule.starts
    order = torch.sort(lengths, descending=True, stable=True).indices
    rows, starts = schedule.rows.long()[order, None], schedule.starts[order, None]
    edges = starts + torch.arange(min(chunk, int(lengths.max())), device=device)
    real = edges < schedule.stops[order, None]
    edges = torch.where(real, edges, starts)
    queries, slots = index.query_ids[edges].long(), index.slots[edges].long()
    blocks = index.sequences.cu_blocks(block)[-1]
    lanes = queries * groups + rows // blocks
    # How many tokens of its block an edge sees. Only a query's own block is cut short (R3).
    first_token = block_positions(index.sequences, block, device)[rows % blocks]
    seen = query_positions(index.sequences, device)[queries] - first_token + 1
    cut = (seen.amin(1) < block).tolist()
    tokens = torch.arange(block, device=device)
    for part, width in batches(lengths[order].tolist(), chunk, edge_cost, device):
        visible = tokens < seen[part, :width, None] if any(cut[part]) else None
        yield ItemBatch(
            rows[part, 0],
            lanes[part, :width],
            slots[part, :width],
            real[part, :width],
            visible,
            index.top_k,
            index.counts.numel(),
        )


def batches(
    lengths: list[int], chunk: int, edge_cost: int, device: torch.device
) -> Iterator[tuple[slice, int]]:
    """Slices of items whose lengths descend, each with the length of its longest item.

    >>> list(batches([4, 4, 4, 3, 1], chunk=4, edge_cost=2**15, device=torch.device("cpu")))
    [(slice(0, 2, None), 4), (slice(2, 3, None), 4), (slice(3, 5, None), 3)]
    """
    budget = CPU_BATCH if device.type == "cpu" else GPU_BATCH
    full = lengths.count(chunk)
    start = 0
    while start < len(lengths):
        count = max(1, budget // (lengths[start] * edge_cost))
        stop = min(start + count, full if start < full else len(lengths))
        yield slice(start, stop), lengths[start]
        start = stop


def item_logits(
    lanes: Float[Tensor, "lanes G D"], keys: Float[Tensor, "rows Bk D"], items: ItemBatch,
    scale: float,
) -> tuple[Float[Tensor, "W CG D"], Float[Tensor, "W CG Bk"]]:  # fmt: skip
    """The gathered queries of each item, and their logits in its block: -inf in the future."""
    count, width = items.lanes.shape
    _, group, dim = lanes.shape
    queries = lanes.index_select(0, items.lanes.flatten()).view(count, width * group, dim)
    logits = scaled_bmm(queries, keys.index_select(0, items.rows).transpose(1, 2), scale)
    if items.visible is not None:
        by_edge = logits.view(count, width, group, -1)
        by_edge.masked_fill_(~items.visible[:, :, None], -torch.inf)
    return queries, logits


def scaled_bmm(
    left: Float[Tensor, "W m n"], right: Float[Tensor, "W n p"], scale: float
) -> Float[Tensor, "W m p"]:
    """scale * left @ right. The product itself applies the factor, which saves a pass over it."""
    return torch.baddbmm(left.new_empty(1, 1, 1), left, right, beta=0, alpha=scale)
