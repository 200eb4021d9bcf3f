"""Lowering, third arrow: attention block by block, one partial result per edge (R15)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from msa.ir import Array, Partials, Schedule
from msa.reference.softmax import head_logits, masked_softmax


def attend_chunks(
    q: Float[Array, "Tq Hq D"], k: Float[Array, "Tk Hkv D"], v: Float[Array, "Tk Hkv Dv"],
    schedule: Schedule, softmax_scale: float,
) -> Partials:  # fmt: skip
    """For each item: the queries that chose its block, against that block's visible tokens alone.

    Slots that no edge owns stay NaN, so a step that reads one by mistake gives NaN.
    """
    index = schedule.reverse_index
    sequences, block, group = index.sequences, index.block_size, q.shape[1] // k.shape[1]
    cu_blocks = sequences.cu_blocks(block)
    positions = np.array(sequences.positions(), np.int64)
    spans = list(sequences.spans())
    out = np.full((*q.shape[:2], index.top_k, v.shape[-1]), np.nan)
    lse = np.full((*q.shape[:2], index.top_k), np.nan)
    for row, start, stop in zip(
        schedule.rows.tolist(), schedule.starts.tolist(), schedule.stops.tolist()
    ):
        r, block_number = divmod(row, cu_blocks[-1])
        s = int(np.searchsorted(cu_blocks, block_number, side="right")) - 1
        keys = spans[s][1]
        first = (block_number - cu_blocks[s]) * block  # in tokens of the sequence
        tokens = slice(keys.start + first, min(keys.start + first + block, keys.stop))
        queries, slots = index.query_ids[start:stop], index.slots[start:stop]
        visible = first + np.arange(tokens.stop - tokens.start) <= positions[queries, None]
        heads = slice(r * group, (r + 1) * group)
        logits = head_logits(q[queries, heads], k[tokens, r : r + 1], softmax_scale)
        p, item_lse = masked_softmax(logits, np.broadcast_to(visible[:, None], logits.shape))
        for h in range(group):
            out[queries, r * group + h, slots] = p[:, h] @ v[tokens, r].astype(np.float64)
            lse[queries, r * group + h, slots] = item_lse[:, h]
    return Partials(out, lse, index.counts)
