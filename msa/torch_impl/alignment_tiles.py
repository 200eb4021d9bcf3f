"""The alignment loss tile by tile, over selected blocks or over all visible tokens (R17)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from msa.config import MSAConfig
from msa.ir import Schedule, Selection, Sequences
from msa.torch_impl.index_loss import index_loss
from msa.torch_impl.item_batches import edges_per_item, item_batches, item_logits, scaled_bmm
from msa.torch_impl.key_blocks import add_to_rows, to_rows, to_tokens
from msa.torch_impl.scheduled_tiles import queries_per_tile, schedule_tiles, trimmed
from msa.torch_impl.tiles import query_positions, sequence_tiles

Four = tuple[Tensor, ...]
"""q [Tq, Hq, D], k [Tk, Hkv, D], q_idx [Tq, Hkv, Di], k_idx [Tk, Di], in the working precision."""


DENSE_BUFFER = 2**22
"""How many scores, of all heads, the warm-up form computes at a time."""


@dataclass(frozen=True)
class TileLoss:
    """Summed KL of one tile of queries, and its gradients (0 where none was asked for)."""

    queries: slice
    keys: slice
    loss: Float[Tensor, ""]
    d_queries: Float[Tensor, "t Hkv Di"] | float = 0.0
    d_keys: Float[Tensor, "n Di"] | float = 0.0


def dense_losses(
    tensors: Four, lse: Float[Tensor, "Tq Hq"] | None, sequences: Sequences, config: MSAConfig,
    wants_gradient: bool,
) -> Iterator[TileLoss]:  # fmt: skip
    """The warm-up form: whole rows of scores, as many queries at a time as DENSE_BUFFER allows."""
    q, k, q_idx, k_idx = tensors
    groups, group = k.shape[1], q.shape[1] // k.shape[1]
    scale = config.index_scale_for(q_idx.shape[-1])
    row = q.shape[1] * max((ks.stop - ks.start for _, ks in sequences.spans()), default=1)
    for tile in sequence_tiles(sequences, size=max(1, DENSE_BUFFER // max(1, row))):
        qs, ks = tile.queries, tile.keys
        n_q, n_keys = tile.sequences.total_q, tile.sequences.total_k
        support = torch.ones(n_q, n_keys, dtype=torch.bool, device=q.device).tril(n_keys - n_q)
        by_head = q[qs].view(n_q, groups, group, -1).permute(1, 0, 2, 3).flatten(1, 2)
        logits = by_head @ k[ks].permute(1, 2, 0) * config.softmax_scale_for(q.shape[-1])
        logits = logits.view(groups, n_q, group, n_keys).masked_fill_(~support[:, None], -torch.inf)
        scores = q_idx[qs].transpose(0, 1) @ k_idx[ks].T * scale
        known = None if lse is None else lse[qs].reshape(n_q, groups, group).transpose(0, 1)
        loss, slope = index_loss(logits, scores, support, known)
        if not wants_gradient:
            yield TileLoss(qs, ks, loss)
            continue
        slope *= scale
        d_queries = (slope @ k_idx[ks]).transpose(0, 1)
        d_keys = slope.flatten(0, 1).T @ q_idx[qs].transpose(0, 1).flatten(0, 1)
        yield TileLoss(qs, ks, loss, d_queries, d_keys)


def sparse_losses(
    tensors: Four, lse: Float[Tensor, "Tq Hq"] | None, selection: Selection, config: MSAConfig,
    wants_gradient: bool,
) -> Iterator[TileLoss]:  # fmt: skip
    """The form for selected blocks: the scores of every edge are written to its slot."""
    q, k, q_idx, k_idx = tensors
    selection = trimmed(selection)
    group, top_k = q.shape[1] // k.shape[1], selection.top_k
    per_query = q.shape[1] * top_k * selection.block_size
    scale = config.index_scale_for(q_idx.shape[-1])
    for tile in schedule_tiles(selection, queries_per_tile(per_query, q), edges_per_item(group)):
        qs, ks, schedule = tile.queries, tile.keys, tile.schedule
        part = Selection(
            selection.indices[qs], schedule.reverse_index.sequences, selection.block_size
        )
        logits = slot_logits(q[qs], k[ks], schedule, config.softmax_scale_for(q.shape[-1]))
        scores = slot_logits(q_idx[qs], k_idx[ks, None], schedule, scale)
        known = None if lse is None else lse[qs].reshape(-1, group)
        loss, slope = index_loss(logits, scores[:, 0], readable(part), known)
        if wants_gradient:
            d_queries, d_keys = index_gradients(q_idx[qs], k_idx[ks], slope, schedule, scale)
            yield TileLoss(qs, ks, loss, d_queries, d_keys)
        else:
            yield TileLoss(qs, ks, loss)


def slot_logits(
    queries: Float[Tensor, "t H D"], keys: Float[Tensor, "n Hk D"], schedule: Schedule,
    scale: float,
) -> Float[Tensor, "lanes G k_Bk"]:  # fmt: skip
    """Scores of all tokens in their slots, -inf elsewhere. Hk = 1: all groups share one key."""
    index = schedule.reverse_index
    lanes = queries.reshape(index.counts.numel(), -1, queries.shape[2])
    group, block, top_k = lanes.shape[1], index.block_size, index.top_k
    rows = to_rows(keys, index.sequences, block)
    slots = queries.new_full((lanes.shape[0] * group * top_k + 1, block), -torch.inf)
    for items in item_batches(schedule, edge_cost=group * block):
        shared = replace(items, rows=items.rows % len(rows))
        slots[items.places(group)] = item_logits(lanes, rows, shared, scale)[1].flatten(0, 1)
    return slots[:-1].view(lanes.shape[0], group, top_k * block)


def readable(selection: Selection) -> Bool[Tensor, "lanes k_Bk"]:
    """Which tokens of a query's slots exist and are not in its future (R9).

    >>> ids = torch.tensor([[[0, 1]]], dtype=torch.int32)
    >>> readable(Selection(ids, Sequences.one(1, 3), block_size=2))
    tensor([[ True,  True,  True, False]])
    """
    ids, block = selection.indices, selection.block_size
    positions = query_positions(selection.sequences, ids.device)[:, None, None, None]
    tokens = ids[..., None] * block + torch.arange(block, device=ids.device)
    seen = (ids >= 0)[..., None] & (tokens <= positions)
    return seen.flatten(0, 1).flatten(1)


def index_gradients(
    q_idx: Float[Tensor, "t Hkv Di"], k_idx: Float[Tensor, "n Di"],
    slope: Float[Tensor, "lanes k_Bk"], schedule: Schedule, scale: float,
) -> tuple[Float[Tensor, "t Hkv Di"], Float[Tensor, "n Di"]]:  # fmt: skip
    """Gradients of q_idx and k_idx from those of the scores, each sum in a fixed order (R19)."""
    index = schedule.reverse_index
    block, (n_q, groups, dim) = index.block_size, q_idx.shape
    lanes, rows = q_idx.reshape(-1, dim), to_rows(k_idx[:, None], index.sequences, block)
    # One more row of zeros, which the copies in short items read.
    slope = torch.cat([slope.view(-1, block), slope.new_zeros(1, block)])
    d_slots = q_idx.new_zeros(len(slope), dim)
    d_rows = rows.new_zeros(groups * len(rows), block, dim)
    for items in item_batches(schedule, edge_cost=block):
        places = items.places(group=1)
        d_scores = slope[places].view(*items.lanes.shape, block)
        d_slots[places] = scaled_bmm(
            d_scores, rows.index_select(0, items.rows % len(rows)), scale
        ).flatten(0, 1)
        d_keys = scaled_bmm(d_scores.transpose(1, 2), lanes[items.lanes], scale)
        add_to_rows(d_rows, items.rows, d_keys)
    d_queries = d_slots[:-1].view(n_q, groups, index.top_k, dim).sum(2)
    shared = d_rows.view(groups, -1, block, dim).sum(0)
    return d_queries, to_tokens(shared, 1, index.sequences)[:, 0]
