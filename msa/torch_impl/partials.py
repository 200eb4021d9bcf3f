"""Lowering, third arrow: attention block by block, one partial result per edge (R15)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from msa.ir import Partials, Schedule
from msa.torch_impl.combine import Slots, row_shares
from msa.torch_impl.item_batches import ItemBatch, item_batches, item_logits
from msa.torch_impl.key_blocks import to_rows
from msa.torch_impl.numerics import working_dtype


@torch.no_grad()
def attend_chunks(
    q: Float[Tensor, "Tq Hq D"], k: Float[Tensor, "Tk Hkv D"], v: Float[Tensor, "Tk Hkv Dv"],
    schedule: Schedule, softmax_scale: float,
) -> Partials:  # fmt: skip
    """For every edge and head the block-local softmax output and its LSE, in its slot (R15).

    Every edge owns its slot, so items may be computed in any order and nothing is ever added up.
    Not recorded by autograd: the gradients of R18 are those of `attend_selection`.

    Returns:
        out [Tq, Hq, k, Dv] in the working precision. lse [Tq, Hq, k] is float64, so that the
        logarithm of a block's sum is not lost beside large logits. Unowned slots hold anything.

    >>> from msa.ir import Selection, Sequences
    >>> from msa.torch_impl import reverse_selection, schedule_chunks
    >>> chosen = torch.tensor([[0, -1], [0, -1], [0, 1]], dtype=torch.int32)[:, None]
    >>> index = reverse_selection(Selection(chosen, Sequences.one(3, 3), block_size=2))
    >>> x = torch.ones(3, 1, 1)
    >>> values = torch.tensor([1.0, 2.0, 5.0]).view(3, 1, 1)
    >>> attend_chunks(x, x, values, schedule_chunks(index, 4), 1.0).out[2].flatten()
    tensor([1.5000, 5.0000])
    """
    index, dtype = schedule.reverse_index, working_dtype(q, k, softmax_scale)
    buffers = slot_buffers(q.to(dtype), v, index.top_k, q.shape[0])
    slots = fill_slots(q.to(dtype), k.to(dtype), v.to(dtype), schedule, softmax_scale, buffers)
    assert slots.total is not None
    lse = slots.top.double() + slots.total.double().log()
    out, lse = (x.transpose(2, 3).flatten(1, 2) for x in (slots.out, lse))
    return Partials(out, lse, slots.counts)


Buffers = tuple[Float[Tensor, "slots G Dv"], Float[Tensor, "slots G"], Float[Tensor, "slots G"]]


def slot_buffers(q: Tensor, v: Tensor, top_k: int, queries: int) -> Buffers:
    """Room for the partials of so many queries, and one place more that copies are written to.

    The heads of an edge lie side by side, so each edge is written as one run of memory.
    """
    group, slots = q.shape[1] // v.shape[1], queries * v.shape[1] * top_k + 1
    return (
        q.new_empty(slots, group, v.shape[2]),
        q.new_empty(slots, group),
        q.new_empty(slots, group),
    )


def fill_slots(
    q: Float[Tensor, "Tq Hq D"], k: Float[Tensor, "Tk Hkv D"], v: Float[Tensor, "Tk Hkv Dv"],
    schedule: Schedule, softmax_scale: float, buffers: Buffers,
) -> Slots:  # fmt: skip
    """attend_chunks with given buffers, which may be larger than needed.

    A caller with many tiles uses the same memory for all of them, because writing to fresh memory
    for the first time costs as much as filling it.
    """
    index = schedule.reverse_index
    n_q, heads, groups, top_k = q.shape[0], q.shape[1], k.shape[1], index.top_k
    group, slots = heads // groups, n_q * groups * top_k
    lanes = q.reshape(n_q * groups, group, q.shape[2])
    keys, values = (to_rows(x, index.sequences, index.block_size) for x in (k, v))
    used = [buffer[: slots + 1] for buffer in buffers]
    for items in item_batches(schedule, edge_cost=group * index.block_size):
        found = attend_items(lanes, keys, values, items, softmax_scale)
        places = items.edge_places()  # copies write to the place after the last
        for buffer, numbers in zip(used, found):
            buffer.index_copy_(0, places, numbers.view(-1, *buffer.shape[1:]))
    out, top, total = (buffer[:slots].unflatten(0, (n_q, groups, top_k)) for buffer in used)
    return Slots(out, top, total, index.counts)


def attend_items(
    lanes: Float[Tensor, "lanes G D"], keys: Float[Tensor, "rows Bk D"],
    values: Float[Tensor, "rows Bk Dv"], items: ItemBatch, softmax_scale: float,
) -> tuple[
    Float[Tensor, "edges_G Dv"], Float[Tensor, " edges_G"], Float[Tensor, " edges_G"]
]:  # fmt: skip
    """Softmax of each item's heads over its block, the highest logit, sum of exp(logit - highest).

    Edges and heads lie in one leading dim.
    """
    _, logits = item_logits(lanes, keys, items, softmax_scale)
    weights = logits.softmax(-1)
    # The highest weight is 1 / total, so the exponentials need not be computed twice.
    top, total = logits.amax(-1), weights.amax(-1).reciprocal_()
    out = torch.bmm(weights, values.index_select(0, items.rows))
    return out.flatten(0, 1), top.flatten(), total.flatten()


def row_sums(
    q: Float[Tensor, "Tq Hq D"], k: Float[Tensor, "Tk Hkv D"],
    schedule: Schedule, softmax_scale: float,
) -> tuple[Float[Tensor, "Tq Hq"], Float[Tensor, "Tq Hq"]]:  # fmt: skip
    """The highest logit of each row, and the sum of exp(logit - that) over all of its slots."""
    index = schedule.reverse_index
    (n_q, heads, _), groups, top_k = q.shape, k.shape[1], index.top_k
    lanes, keys = (
        q.reshape(n_q * groups, -1, q.shape[2]),
        to_rows(k, index.sequences, index.block_size),
    )
    tops, totals = q.new_empty(2, n_q * heads * top_k + 1)
    for items in item_batches(schedule, edge_cost=lanes.shape[1] * index.block_size):
        _, logits = item_logits(lanes, keys, items, softmax_scale)
        top, places = logits.amax(-1), items.places(lanes.shape[1])
        tops[places] = top.flatten()
        totals[places] = logits.sub_(top[..., None]).exp_().sum(-1).flatten()
    tops, totals = (x[:-1].view(n_q, heads, top_k) for x in (tops, totals))
    top, shares = row_shares(tops, totals, index.counts)
    return top, shares.sum(-1)
