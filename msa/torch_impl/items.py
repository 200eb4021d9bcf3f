"""Work items as dense batches: what the schedule (R14) looks like to a batched matrix product.

A block of keys is read by many queries, so an item is one ordinary product: its gathered queries,
all heads of the group stacked, against its one block of keys. The other loop order would gather
k blocks of keys for each query, Bk / Hq times the traffic; on a CPU it is several times slower.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from msa.ir import Schedule, Sequences
from msa.torch_impl.tiles import block_positions, borders, owners, query_positions


CPU_BATCH = 2**18
"""Logits at a time: a megabyte, which the second-level cache holds (measured)."""
GPU_BATCH = 2**25


@dataclass(frozen=True)
class ItemBatch:
    """W items of up to C edges each, shorter ones filled up with copies of their first edge.

    A lane is a (query, group) pair, numbered `query * Hkv + group`.
    """

    rows: Int[Tensor, " W"]
    """Row of the reverse index: which block of which group the item reads."""
    lanes: Int[Tensor, "W C"]
    """Who reads it."""
    slots: Int[Tensor, "W C"]
    """The rank of the block in the lane's selection."""
    real: Bool[Tensor, "W C"]
    """False for copies."""
    visible: Bool[Tensor, "W C Bk"] | None
    """Tokens not in the edge's future; None if no block of the batch is anyone's own (R3)."""
    top_k: int
    all_lanes: int

    def places(self, group: int) -> Int[Tensor, " W_C_G"]:
        """For each edge and head its row in a buffer [lanes, group, k]; one past the last for copies."""
        head = torch.arange(group, device=self.lanes.device)
        places = (self.lanes[..., None] * group + head) * self.top_k + self.slots[..., None]
        return torch.where(
            self.real[..., None], places, self.all_lanes * group * self.top_k
        ).flatten()


def edges_per_item(group: int) -> int:
    """A chunk size that gives the products of an item enough rows without many copies (measured)."""
    return max(16, 128 // group)


def item_batches(schedule: Schedule, edge_cost: int) -> Iterator[ItemBatch]:
    """All items, as many at a time as keep `edges * edge_cost` numbers in the cache.

    Full items come first, in row order. The short ones, at most one of each row, follow by length,
    so that hardly any copies are computed. No batch holds both: its items of a row lie side by side.
    """
    if not len(schedule.rows):
        return
    index, chunk = schedule.reverse_index, schedule.chunk_size
    device, block, groups = index.query_ids.device, index.block_size, index.counts.shape[1]
    lengths = schedule.stops - schedule.starts
    order = torch.sort(lengths, descending=True, stable=True).indices
    rows, starts, stops = (x[order, None] for x in (schedule.rows.long(), schedule.starts, schedule.stops))
    edges = starts + torch.arange(min(chunk, int(lengths.max())), device=device)
    real = edges < stops
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

    >>> list(batches([4, 4, 4, 3, 1], chunk=4, edge_cost=2**14, device=torch.device("cpu")))
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
    lanes: Float[Tensor, "lanes G D"],
    keys: Float[Tensor, "rows Bk D"],
    items: ItemBatch,
    scale: float,
) -> tuple[Float[Tensor, "W CG D"], Float[Tensor, "W CG Bk"]]:
    """The gathered queries of each item and their scaled products with its block, -inf if future."""
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
    """scale * left @ right, the factor inside the product: one pass over the result less."""
    return torch.baddbmm(left.new_empty(1, 1, 1), left, right, beta=0, alpha=scale)


def block_slots(sequences: Sequences, block_size: int, device: torch.device) -> Int[Tensor, " Tk"]:
    """Where each packed token lies when every block is filled up to full length (R1, R3).

    >>> block_slots(Sequences((0, 3, 5), (0, 3, 5)), 2, torch.device("cpu"))
    tensor([0, 1, 2, 4, 5])
    """
    owner = owners(sequences.cu_seqlens_k, device)
    first_token = borders(sequences.cu_seqlens_k, device)
    first_slot = borders(sequences.cu_blocks(block_size), device) * block_size
    return torch.arange(sequences.total_k, device=device) + (first_slot - first_token)[owner]


def to_rows(
    x: Float[Tensor, "Tk H D"], sequences: Sequences, block_size: int
) -> Float[Tensor, "rows Bk D"]:
    """Packed tokens as whole blocks, one row for each head and block, zeros beyond a sequence."""
    blocks = sequences.cu_blocks(block_size)[-1]
    padded = x.new_zeros(x.shape[1], blocks * block_size, x.shape[2])
    padded[:, block_slots(sequences, block_size, x.device)] = x.transpose(0, 1)
    return padded.view(x.shape[1] * blocks, block_size, x.shape[2])


def to_tokens(
    rows: Float[Tensor, "rows Bk D"], heads: int, sequences: Sequences
) -> Float[Tensor, "Tk H D"]:
    """The way back from `to_rows`."""
    block_size = rows.shape[1]
    padded = rows.reshape(heads, -1, rows.shape[2])
    return padded[:, block_slots(sequences, block_size, rows.device)].transpose(0, 1)


def add_to_rows(
    total: Float[Tensor, "rows Bk D"], rows: Int[Tensor, " W"], addends: Float[Tensor, "W Bk D"]
) -> None:
    """total[rows] += addends in a fixed order, in place (R19).

    Items of one row lie side by side, so each run is added up in order and each row then written
    once. index_add_ and index_put_(accumulate=True) would race: their order is nobody's promise.

    >>> total = torch.zeros(3, 1, 1)
    >>> add_to_rows(total, torch.tensor([0, 2, 2]), torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1))
    >>> total.flatten()
    tensor([1., 0., 5.])
    """
    distinct, lengths = torch.unique_consecutive(rows, return_counts=True)
    if len(distinct) < len(rows):
        addends = torch.segment_reduce(addends, "sum", lengths=lengths, axis=0)
    total[distinct] += addends
