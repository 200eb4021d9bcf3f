"""The lowering: attention over selected blocks in steps, towards a form that is fast on a GPU.

    index q, k --score_blocks--> BlockScores --select_blocks--> Selection     (R4-R8)
    Selection --reverse_selection--> ReverseIndex --schedule_chunks--> Schedule   (R13, R14)
    q, k, v, Schedule --attend_chunks--> Partials --combine_partials--> Output    (R15, R16)

    Selection --unite_tiles--> TileUnion;  q, k, v, TileUnion --attend_union--> Output   (R9)

Each arrow keeps the meaning of the form before it; `msa verify` shows that it does.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float

from msa.config import MSAConfig
from msa.interface import Backend
from msa.ir import (
    Array,
    BlockScores,
    Output,
    Partials,
    ReverseIndex,
    Schedule,
    Selection,
    Sequences,
    TileUnion,
)


@dataclass(frozen=True)
class Trace:
    """Every intermediate form of one call, by name, in the order of the steps."""

    scores: BlockScores
    selection: Selection
    reverse_index: ReverseIndex
    schedule: Schedule
    partials: Partials
    output: Output
    tile_union: TileUnion
    union_output: Output


def lower(
    backend: Backend,
    q: Float[Array, "Tq Hq D"], k: Float[Array, "Tk Hkv D"], v: Float[Array, "Tk Hkv Dv"],
    q_idx: Float[Array, "Tq Hkv Di"], k_idx: Float[Array, "Tk Di"],
    sequences: Sequences, config: MSAConfig, chunk_size: int, tile_size: int,
) -> Trace:  # fmt: skip
    """Run both loop orders of one backend step by step, and keep every form."""
    scale = config.softmax_scale_for(q.shape[-1])
    scores = backend.score_blocks(q_idx, k_idx, sequences, config)
    selection = backend.select_blocks(scores, config)
    reverse_index = backend.reverse_selection(selection)
    schedule = backend.schedule_chunks(reverse_index, chunk_size)
    partials = backend.attend_chunks(q, k, v, schedule, scale)
    output = backend.combine_partials(partials, q.dtype)
    tile_union = backend.unite_tiles(selection, tile_size)
    union_output = backend.attend_union(q, k, v, tile_union, scale)
    return Trace(
        scores, selection, reverse_index, schedule, partials, output, tile_union, union_output
    )
