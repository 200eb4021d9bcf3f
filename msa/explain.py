"""The example of `msa explain`: twelve tokens in every form of the lowering, drawn as masks.

Blocks have four tokens, k = 2, and there are two groups. The index vectors are small integers, so
that a reader can compute every score. Each form is drawn as its dense mask; the cells show what the
form adds. Below the mask stands what the step changed, and why it may.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from msa import api, kernel_choice, loop_order, moved, reference
from msa.config import MSAConfig
from msa.dispatch import BackendName
from msa.ir import Array, ReverseIndex, Schedule, TileUnion
from msa.pipeline import Trace

TOKENS, GROUPS, CHUNK, TILE = 12, 2, 4, 4
CONFIG = MSAConfig(block_size=4, top_k=2, index_scale=1.0)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Step:
    """One form of the lowering, ready to be shown."""

    form: str
    made_by: str
    changed: str
    allowed: str
    legend: str
    pictures: list[list[str]]
    """For each group and each query, one character per token."""
    facts: list[str]
    checked: str
    """A check of this form and its result."""


def example() -> dict[str, Float[Array, "..."]]:
    """q, k, v, q_idx, k_idx of the example; v_j = j, so an output shows which tokens were read.

    Group 0 looks for the first index channel, group 1 for the second, with two exceptions: query 10
    of group 0 looks for the second one too, and query 9 of group 1 has a tie.
    """
    k_idx = np.array(
        [
            [1, 0, 3, 1, 0, 0, 2, 1],  # tokens 0-3, two channels each
            [1, 0, 0, 2, 1, 1, 0, 0],
            [1, 1, 0, 1, 2, 0, 1, 2],
        ]
    ).reshape(TOKENS, 2)
    q_idx = np.tile(np.eye(2), (TOKENS, 1, 1))
    q_idx[10, 0] = [0, 1]
    q_idx[9, 1] = [-1, 0]
    angle = np.arange(TOKENS)[:, None, None] * np.array([0.5, 0.9])[:, None]
    k = np.concatenate([np.cos(angle), np.sin(angle)], axis=-1)
    v = np.broadcast_to(np.arange(TOKENS)[:, None, None], (TOKENS, GROUPS, 1))
    arrays = {"q": 2 * k, "k": k, "v": v, "q_idx": q_idx, "k_idx": k_idx}
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def trace_example(backend: BackendName) -> Trace:
    """The example through both loop orders."""
    return api.lower(**example(), config=CONFIG, chunk_size=CHUNK, tile_size=TILE, backend=backend)


def explain(trace: Trace) -> list[Step]:
    """All steps in order, each with its picture."""
    selection, index, schedule = trace.selection, trace.reverse_index, trace.schedule
    mask = reference.mask_of(selection)
    blocks = TOKENS // CONFIG.block_size
    visible = np.tril(np.ones((TOKENS, TOKENS), bool))[:, None].repeat(GROUPS, axis=1)
    item_of = {
        edge: LETTERS[w]
        for w, (row, start, stop) in enumerate(
            zip(schedule.rows.tolist(), schedule.starts.tolist(), schedule.stops.tolist())
        )
        for edge in ((row // blocks, row % blocks, int(i)) for i in index.query_ids[start:stop])
    }
    slot_of = {(i, r, int(b)): s for (i, r, s), b in np.ndenumerate(selection.indices) if b >= 0}
    written = sum(np.isfinite(trace.partials.lse[i, r, s]) for (i, r, _), s in slot_of.items())
    weight = np.exp(trace.partials.lse - trace.output.lse[..., None])
    last = TOKENS - 1
    partial_out = trace.partials.out[last, :, :, 0]
    inputs = example()
    scale = CONFIG.softmax_scale_for(inputs["q"].shape[-1])
    q, k, v = (inputs[name].astype(np.float64) for name in "qkv")
    dense = reference.attend_selection(q, k, v, selection, scale).out

    def draw(shown: Bool[Array, "..."], cell: Callable[[int, int, int], str]) -> list[list[str]]:
        """`cell(query, group, block)` where the mask is set, a dot where only visible."""
        return [
            [
                "".join(
                    cell(i, r, j // CONFIG.block_size) if shown[i, r, j] else "·" if j <= i else " "
                    for j in range(TOKENS)
                )
                for i in range(TOKENS)
            ]
            for r in range(GROUPS)
        ]

    def score(i: int, r: int, b: int) -> str:
        return f"{trace.scores.values[i, r, b]:.0f}"[-1]

    def kept(form: ReverseIndex | Schedule | TileUnion) -> str:
        return "mask unchanged" if (reference.mask_of(form) == mask).all() else "MASK CHANGED"

    rows = [LETTERS[x] for x in range(GROUPS * blocks)]
    return [
        Step(
            "BlockScores", "score_blocks",
            "N keys become N / 4 numbers per query and group: the best score of each block.",
            "A block is read for its best token. The exponential does not change the order of the "
            "scores, so the raw maximum gives the same ranking (R4, R5).",
            "digit = score of the block, the same for its visible tokens",
            draw(visible, score),
            [f"query 11: {trace.scores.values[last, r].astype(int).tolist()} in group {r}"
             for r in range(GROUPS)],
            "",
        ),
        Step(
            "Selection", "select_blocks",
            "Each row keeps at most 2 blocks: the query's own block, and the best of the others.",
            "This is the only approximation of MSA; all steps below keep its meaning exactly. "
            "Query 9 of group 1 has a tie (0 = 0): the lower id is selected (R6, R7).",
            "█ = read, · = visible, not read",
            draw(mask, lambda i, r, b: "█"),
            [f"query {i}: {selection.indices[i].tolist()}" for i in (3, 9, 10, 11)],
            "the mask to keep",
        ),
        Step(
            "ReverseIndex", "reverse_selection",
            "The same edges, sorted by block: each block now lists the queries that read it.",
            "Sorting a set of edges changes no edge (R13). On a GPU a block is now loaded once for "
            "all queries that read it.",
            "letter = row, one per group and block",
            draw(mask, lambda i, r, b: rows[r * blocks + b]),
            [f"row {rows[x]} (group {x // blocks}, block {x % blocks}): queries "
             f"{index.query_ids[index.row_offsets[x]:index.row_offsets[x + 1]].tolist()}"
             for x in range(GROUPS * blocks)],
            kept(index),
        ),
        Step(
            "Schedule", "schedule_chunks",
            f"Rows are cut into items of at most {CHUNK} edges. So the many queries of block 0 are "
            "divided among several items.",
            "Every edge lies in exactly one item, and no item depends on another one (R14).",
            "letter = work item",
            draw(mask, lambda i, r, b: item_of[r, b, i]),
            [f"{len(schedule.rows)} items for {len(index.query_ids)} edges; edges per item: "
             f"{(schedule.stops - schedule.starts).tolist()}"],
            kept(schedule),
        ),
        Step(
            "Partials", "attend_chunks",
            "Each item does attention over its one block; each edge writes output and LSE into "
            "its own slot.",
            "Softmax over one block needs no other block; no two edges share a slot, so nothing "
            "is added atomically (R15).",
            "digit = slot of the edge",
            draw(mask, lambda i, r, b: str(slot_of[i, r, b])),
            [f"query 11, head {h}: outputs {three(partial_out[h])}, "
             f"LSEs {three(trace.partials.lse[last, h])}" for h in range(GROUPS)],
            f"{written} of {len(index.query_ids)} edges have their result",
        ),
        Step(
            "Output", "combine_partials",
            "The slots of a query are weighed by exp(their LSE - the total LSE) and added up.",
            "Softmax over a disjoint union is the LSE-weighted mean of the softmaxes over its "
            "parts (R16).",
            "digit = weight of the block in tenths, 9 also if only one block is read",
            draw(mask, lambda i, r, b: str(min(9, round(10 * weight[i, r, slot_of[i, r, b]])))),
            [f"query 11, head {h}: "
             + " + ".join(f"{w:.3f}·{o:.3f}" for w, o in zip(weight[last, h], partial_out[h]))
             + f" = {trace.output.out[last, h, 0]:.3f}" for h in range(GROUPS)],
            f"{np.abs(trace.output.out - dense).max():.1e} from the dense definition",
        ),
        Step(
            "TileUnion", "unite_tiles",
            f"The other loop order: {TILE} neighbouring queries walk the union of their blocks. "
            "A bit for each query and block says whether the query selected the block.",
            "A masked row adds nothing to a running softmax, so reading a neighbour's block is "
            "only wasted work (R9).",
            "█ = read, ○ = walked for a neighbour, masked",
            draw(walked_mask(trace), lambda i, r, b: "█" if (i, r, b) in slot_of else "○"),
            [f"queries {start}-{stop - 1}: blocks "
             f"{[ids[ids >= 0].tolist() for ids in trace.tile_union.block_ids[t]]} per group"
             for t, (start, stop) in enumerate(
                 zip(trace.tile_union.starts.tolist(), trace.tile_union.stops.tolist()))]
            + [f"its output is {np.abs(trace.union_output.out - dense).max():.1e} from the dense "
               "definition"],
            kept(trace.tile_union),
        ),
    ]  # fmt: skip


def three(numbers: Float[Array, " n"]) -> str:
    """The numbers with three decimals, for any dtype."""
    return ", ".join(f"{x:.3f}" for x in numbers)


def walked_mask(trace: Trace) -> Bool[Array, "Tq Hkv Tk"]:
    """The tokens that the union walk reads: all visible ones of the blocks in a tile's union."""
    union, mask = trace.tile_union, np.zeros((TOKENS, GROUPS, TOKENS), bool)
    for t, r, u in np.argwhere(union.block_ids >= 0).tolist():
        first = int(union.block_ids[t, r, u]) * CONFIG.block_size
        for i in range(int(union.starts[t]), int(union.stops[t])):
            mask[i, r, first : min(first + CONFIG.block_size, i + 1)] = True
    return mask


def choose_orders(trace: Trace) -> dict[str, Any]:
    """How loop_order="auto" of the triton backend treats the tiles of the example.

    `readers` is the number of queries that read a block, on average; see msa.loop_order.
    """
    union, top_k = trace.tile_union, trace.selection.top_k
    readers = TOKENS * top_k / (TOKENS // CONFIG.block_size)
    lengths = (union.block_ids >= 0).sum(-1)
    tiles = [
        {
            "queries": [int(union.starts[t]), int(union.stops[t]) - 1],
            "group": r,
            "union": int(length),
            "order": loop_order.choose(int(length), top_k, readers),
        }
        for (t, r), length in np.ndenumerate(lengths)
    ]
    return {
        "walk_all": loop_order.WALK_ALL,
        "walk_pairs": loop_order.WALK_PAIRS,
        "min_edges": loop_order.MIN_EDGES,
        "rule": [f"{when}: {then}" for when, then in loop_order.rule()],
        "top_k": top_k,
        "readers": readers,
        "mean_union": float(lengths.mean()),
        "tiles": tiles,
    }


def choose_kernels() -> dict[str, Any]:
    """Which kernels kernels="auto" of the triton backend takes here for the usual shape, and why.

    The usual shape is that of `kernel_choice.usual_call`; the reason is empty for hopper.
    """
    call = kernel_choice.usual_call()
    found = kernel_choice.obstacle(call)
    return {
        "rule": [f"{name}: {wanted}" for name, wanted in kernel_choice.rule()],
        "walk_rule": [f"{name}: {wanted}" for name, wanted in kernel_choice.walk_rule()],
        "wide_rule": [f"{name}: {wanted}" for name, wanted in kernel_choice.wide_rule()],
        "page_rule": [f"{name}: {wanted}" for name, wanted in kernel_choice.page_rule()],
        "key_rule": [f"{name}: {wanted}" for name, wanted in kernel_choice.key_rule()],
        "loss_rule": [f"{name}: {wanted}" for name, wanted in kernel_choice.loss_rule()],
        "chosen": kernel_choice.choose("auto", call),
        "reason": "" if found is None else str(found).partition(": ")[0],
    }


__getattr__ = moved.names_of(__name__)
