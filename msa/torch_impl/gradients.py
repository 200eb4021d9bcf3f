"""Backward of attention over a fixed selection: it computes the forward's items again (R18, R19).

With P = exp(S - lse) recomputed, for each edge and head

    dV += P^T dO          dP = dO V^T            delta = <dO, O> - dlse
    dS  = P (dP - delta)  dQ += scale dS K       dK += scale dS^T Q

Where lse is so large that its rounding would change P, the row's highest logit is used in its
place, and dO and delta are divided by the row's sum. This is the same P, exactly normalised.

Each edge writes its dQ to its own slot, and the slots of a query are added up in order; dK and dV
of a block are added up item by item, in order.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from msa.ir import Selection
from msa.torch_impl.item_batches import (
    ItemBatch,
    edges_per_item,
    item_batches,
    item_logits,
    scaled_bmm,
)
from msa.torch_impl.key_blocks import add_to_rows, to_rows, to_tokens
from msa.torch_impl.numerics import rounds_coarsely
from msa.torch_impl.partials import row_sums
from msa.torch_impl.scheduled_tiles import ScheduledTile, queries_per_tile, schedule_tiles, trimmed

Three = tuple[Tensor, Tensor, Tensor]


def selection_gradients(
    inputs: Three, outputs: tuple[Tensor, Tensor], d_outputs: tuple[Tensor, Tensor],
    selection: Selection, softmax_scale: float,
) -> Three:  # fmt: skip
    """Gradients of q [Tq, Hq, D], k [Tk, Hkv, D] and v [Tk, Hkv, Dv], each in its input's dtype."""
    q, k, v = (x.to(outputs[0].dtype) for x in inputs)
    selection = trimmed(selection)
    d_out, d_lse = (d.to(q.dtype) for d in d_outputs)
    out, lse = outputs
    delta, coarse = (d_out * out).sum(-1) - d_lse, rounds_coarsely(lse)
    d_q, d_k, d_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    per_query = q.shape[1] * selection.top_k * q.shape[2]
    chunk = edges_per_item(q.shape[1] // k.shape[1])
    for tile in schedule_tiles(selection, queries_per_tile(per_query, q), chunk):
        qs, ks = tile.queries, tile.keys
        upstream = d_out[qs], lse[qs], delta[qs]
        if coarse:
            top, total = row_sums(q[qs], k[ks], tile.schedule, softmax_scale)
            upstream = d_out[qs] / total[..., None], top, delta[qs] / total
        d_tile = tile_gradients((q[qs], k[ks], v[ks]), upstream, tile, softmax_scale)
        d_q[qs] = d_tile[0]
        d_k[ks] += d_tile[1]
        d_v[ks] += d_tile[2]
    return d_q.to(inputs[0].dtype), d_k.to(inputs[1].dtype), d_v.to(inputs[2].dtype)


def tile_gradients(
    inputs: Three, upstream: Three, tile: ScheduledTile, softmax_scale: float
) -> Three:
    """The same for one tile of queries and the keys that it sees; upstream is (dO, lse, delta)."""
    q, k, v = inputs
    index = tile.schedule.reverse_index
    groups, group = k.shape[1], q.shape[1] // k.shape[1]
    by_lane = [x.reshape(-1, group, x.shape[2] if x.ndim == 3 else 1) for x in (q, *upstream)]
    keys, values = (to_rows(x, index.sequences, index.block_size) for x in (k, v))
    d_keys, d_values = torch.zeros_like(keys), torch.zeros_like(values)
    d_slots = q.new_zeros(q.shape[0] * q.shape[1] * index.top_k + 1, q.shape[2])
    for items in item_batches(tile.schedule, edge_cost=group * index.block_size):
        d_query, d_key, d_value = item_gradients(by_lane, keys, values, items, softmax_scale)
        d_slots[items.places(group)] = d_query
        add_to_rows(d_keys, items.rows, d_key)
        add_to_rows(d_values, items.rows, d_value)
    d_q = d_slots[:-1].view(*q.shape[:2], index.top_k, q.shape[2]).sum(2)
    return (
        d_q,
        to_tokens(d_keys, groups, index.sequences),
        to_tokens(d_values, groups, index.sequences),
    )


def item_gradients(
    by_lane: list[Tensor], keys: Float[Tensor, "rows Bk D"], values: Float[Tensor, "rows Bk Dv"],
    items: ItemBatch, scale: float,
) -> tuple[
    Float[Tensor, "edges_G D"], Float[Tensor, "W Bk D"], Float[Tensor, "W Bk Dv"]
]:  # fmt: skip
    """dQ of every edge, dK and dV of every item's block; by_lane is (q, dO, lse, delta)."""
    lanes, d_outs, lses, deltas = by_lane
    queries, logits = item_logits(lanes, keys, items, scale)
    d_out, lse, delta = (
        x[items.lanes].view(*queries.shape[:2], -1) for x in (d_outs, lses, deltas)
    )
    weights = (logits - lse).exp_()
    item_keys, item_values = (x.index_select(0, items.rows) for x in (keys, values))
    d_logits = torch.bmm(d_out, item_values.transpose(1, 2)).sub_(delta).mul_(weights)
    if not bool(items.real.all()):  # copies of an edge must not count twice
        copies = ~items.real.repeat_interleave(lanes.shape[1], dim=1)[..., None]
        weights.masked_fill_(copies, 0.0)
        d_logits.masked_fill_(copies, 0.0)
    d_query = scaled_bmm(d_logits, item_keys, scale)
    d_key = scaled_bmm(d_logits.transpose(1, 2), queries, scale)
    d_value = torch.bmm(weights.transpose(1, 2), d_out)
    return d_query.flatten(0, 1), d_key, d_value
