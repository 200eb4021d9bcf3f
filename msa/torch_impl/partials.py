"""Lowering, third arrow: attention block by block, one partial result per edge (R15)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from msa.ir import Partials, Schedule
from msa.torch_impl.items import ItemBatch, item_batches, item_logits
from msa.torch_impl.numerics import working_dtype
from msa.torch_impl.rows import to_rows


@torch.no_grad()
def attend_chunks(
    q: Float[Tensor, "Tq Hq D"],
    k: Float[Tensor, "Tk Hkv D"],
    v: Float[Tensor, "Tk Hkv Dv"],
    schedule: Schedule,
    softmax_scale: float,
) -> Partials:
    """For every edge and head the block-local softmax output and its LSE, in its slot (R15).

    Every edge owns its slot, so items may be computed in any order and nothing is ever added up.
    Not recorded by autograd: the gradients of R18 are those of `attend_selection`.

    Returns:
        out [Tq, Hq, k, Dv], lse [Tq, Hq, k] in the working precision; unowned slots hold anything.

    >>> from msa.ir import Selection, Sequences
    >>> from msa.torch_impl import reverse_selection, schedule_chunks
    >>> chosen = torch.tensor([[0, -1], [0, -1], [0, 1]], dtype=torch.int32)[:, None]
    >>> index = reverse_selection(Selection(chosen, Sequences.one(3, 3), block_size=2))
    >>> x = torch.ones(3, 1, 1)
    >>> values = torch.tensor([1.0, 2.0, 5.0]).view(3, 1, 1)
    >>> attend_chunks(x, x, values, schedule_chunks(index, 4), 1.0).out[2].flatten()
    tensor([1.5000, 5.0000])
    """
    index, dtype = schedule.reverse_index, working_dtype(q, k)
    buffers = slot_buffers(q.to(dtype), v, index.top_k, q.shape[0])
    return fill_slots(q.to(dtype), k.to(dtype), v.to(dtype), schedule, softmax_scale, buffers)


Buffers = tuple[Float[Tensor, "slots Dv"], Float[Tensor, " slots"]]


def slot_buffers(q: Tensor, v: Tensor, top_k: int, queries: int) -> Buffers:
    """Room for the partials of so many queries, and one place more for what nobody wants."""
    slots = queries * q.shape[1] * top_k + 1
    return q.new_empty(slots, v.shape[2]), q.new_empty(slots)


def fill_slots(
    q: Float[Tensor, "Tq Hq D"],
    k: Float[Tensor, "Tk Hkv D"],
    v: Float[Tensor, "Tk Hkv Dv"],
    schedule: Schedule,
    softmax_scale: float,
    buffers: Buffers,
) -> Partials:
    """attend_chunks into buffers that are there already, which may be larger than needed.

    A caller with many tiles lends the same memory to all of them: touching fresh memory for the
    first time costs as much as filling it.
    """
    index = schedule.reverse_index
    n_q, heads, groups, top_k = q.shape[0], q.shape[1], k.shape[1], index.top_k
    group, slots = heads // groups, n_q * heads * top_k
    lanes = q.reshape(n_q * groups, group, q.shape[2])
    keys, values = (to_rows(x, index.sequences, index.block_size) for x in (k, v))
    out, lse = (buffer[: slots + 1] for buffer in buffers)
    for items in item_batches(schedule, edge_cost=group * index.block_size):
        item_out, item_lse = attend_items(lanes, keys, values, items, softmax_scale)
        places = items.places(group)  # the one past the last takes what copies compute
        out.index_copy_(0, places, item_out)
        lse.index_copy_(0, places, item_lse)
    return Partials(
        out[:slots].view(n_q, heads, top_k, v.shape[2]),
        lse[:slots].view(n_q, heads, top_k),
        index.counts,
    )


def attend_items(
    lanes: Float[Tensor, "lanes G D"],
    keys: Float[Tensor, "rows Bk D"],
    values: Float[Tensor, "rows Bk Dv"],
    items: ItemBatch,
    softmax_scale: float,
) -> tuple[Float[Tensor, "edges_G Dv"], Float[Tensor, " edges_G"]]:
    """Softmax of each item's heads over its one block; edges and heads in one leading dim."""
    _, logits = item_logits(lanes, keys, items, softmax_scale)
    weights = logits.softmax(-1)
    # The highest weight is exp(top - lse): the LSE comes without a second pass of exponentials.
    lse = logits.amax(-1) - weights.amax(-1).log()
    out = torch.bmm(weights, values.index_select(0, items.rows))
    return out.flatten(0, 1), lse.flatten()
