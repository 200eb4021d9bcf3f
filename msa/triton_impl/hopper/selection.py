"""Index branch on Hopper: scores to memory, then an exp-free top-k of each row (R4-R8).

    for each super-tile of queries:
        scores = block scores of its tiles                      # index_scores.py
        level[1], level[2] = maxima of 8 blocks, of 8 x 8 blocks
        for each row:
            kept = best `places` of level[2]
            kept = best `places` of level[1] inside kept
            kept = best `places` of the scores inside kept      # equal scores to the lower id
            selection = sorted(kept + forced blocks)

What the fast form changes:
 1. Scores go to memory, 256 rows side by side for each block: the score kernel writes and the
    maxima kernel reads whole lines.
 2. One pass over the scores takes maxima of 8 and of 64 blocks. Nothing in this pass depends on
    what was read before, so many loads are in flight and it runs at the speed of memory.
 3. The best `places` blocks lie in the best `places` pieces, if pieces of equal maxima are taken in
    the order of their ids: each of these pieces has a block that comes before any block of a piece
    that was left out. So the bound on what is read again is exact, whatever the scores are.
 4. Each level looks at 8 * `places` candidates at most. They are in ascending order at every level,
    so ids come out ascending, as R8 wants them, and no sort is needed.
 5. The threshold of a level is one that the best `places` of the level below reach, too. The search
    for the next threshold starts there and ends after a few steps.
 6. Short rows have fewer levels.

Who waits for whom: the three kernels run one after another on one stream. Inside the last one, a
program passes the kept ids of a level to the next level through memory:

    level 2  [64 .. 1024 maxima]  -- kept ids -->  barrier
    level 1  [8 * places maxima]                   loads ids, -- kept ids -->  barrier
    level 0  [8 * places scores]                                               loads ids, selection
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from msa.config import MSAConfig
from msa.ir import Array, Selection, Sequences
from msa.triton_impl.hopper.plan import (
    PIECE,
    ROWS,
    SCORE_BYTES,
    SLAB,
    ScorePlan,
    SuperTile,
    plan_scores,
)
from msa.triton_impl.places import on_its_device
from msa.triton_impl.quantize import to_fp8
from msa.triton_impl.tiles import (
    NO_BLOCK,
    NO_SCORE,
    can_describe,
    keep_best,
    pad,
    require_kernels,
    score_key,
    store_selection,
    threshold_of,
)

__all__ = ["select_fused", "select_scores"]

DIRECT = 128
"""A row of at most this many numbers is looked at directly, without maxima of pieces."""

PICK_ROWS = 8
"""Rows of one program of the last kernel."""

PICK_CELLS = 512
"""Candidates, over all rows, that one warp of the last kernel holds."""

COLUMNS = 128
"""Rows of one program of the maxima kernel."""


@triton.jit
def maxima_kernel(scores, fills, pieces, groups, ROWS: tl.constexpr, PIECE: tl.constexpr,
                  COLUMNS: tl.constexpr):  # fmt: skip
    """Maxima of PIECE blocks and of PIECE * PIECE blocks, for COLUMNS rows side by side.

    NaN is dropped: a maximum is NaN only if all its numbers are.
    """
    group = tl.program_id(0).to(tl.int64)
    fill = tl.load(fills + group)
    o_c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    o_p = tl.arange(0, PIECE)[:, None]
    p_x = scores + (group * (PIECE * PIECE) + o_p * PIECE) * ROWS + o_c
    b_max = tl.full([PIECE, COLUMNS], float("-inf"), tl.float32)
    for j in tl.static_range(PIECE):
        b_x = tl.load(p_x + j * ROWS, mask=o_p * PIECE + j < fill, other=float("-inf"),
                      eviction_policy="evict_first")  # fmt: skip
        b_max = tl.maximum(b_max, b_x)
    tl.store(pieces + (group * PIECE + o_p) * ROWS + o_c, b_max)
    o_c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(groups + group * ROWS + o_c, tl.max(b_max, 0))


@triton.jit
def best_of(p_x, o_i, m_x, b_low, b_kept, ROWS: tl.constexpr, PLACES: tl.constexpr):
    """The best PLACES of candidates o_i [C, R]: mask, rank, number kept, threshold.

    b_low is a key that the best PLACES reach, unless fewer than PLACES were kept before.
    """
    b_key = score_key(tl.load(p_x + o_i.to(tl.int64) * ROWS, mask=m_x, other=0.0))
    b_key = tl.where(m_x, b_key, NO_SCORE)
    b_least = tl.min(tl.where(m_x, b_key, NO_BLOCK), 0)
    b_low = tl.where(b_kept < PLACES, b_least, b_low)
    b_low = threshold_of(b_key, m_x, b_low, PLACES, 0, 0)
    m_keep, b_rank, b_kept = keep_best(b_key, m_x, b_low, PLACES, 0)
    return m_keep, b_rank, b_kept, b_low


@triton.jit
def narrow(p_x, p_ids, b_limit, m_keep, b_rank, b_id, b_kept, b_low, ROWS: tl.constexpr,
           SLOTS: tl.constexpr, PIECE: tl.constexpr, PLACES: tl.constexpr, C: tl.constexpr,
           R: tl.constexpr):  # fmt: skip
    """From the kept pieces of one level to the kept candidates inside them, one level below.

    b_limit [R]: how many candidates of that level are real. p_ids [R]: room for SLOTS ids.
    """
    p_ids = p_ids[None, :]
    tl.store(p_ids + b_rank * R, b_id, mask=m_keep)
    tl.debug_barrier()
    o_c = tl.arange(0, C)[:, None]
    m_x = o_c // PIECE < b_kept[None, :]
    b_id = tl.load(p_ids + (o_c // PIECE) * R, mask=m_x, other=0) * PIECE + o_c % PIECE
    m_x = m_x & (b_id < b_limit[None, :])
    m_keep, b_rank, b_kept, b_low = best_of(p_x[None, :], b_id, m_x, b_low, b_kept, ROWS, PLACES)
    return m_keep, b_rank, b_id, b_kept, b_low


@triton.jit
def pick_kernel(scores, pieces, groups, tiles, room, out, HKV: tl.constexpr, BK: tl.constexpr,
                TOP_K: tl.constexpr, P: tl.constexpr, SINK: tl.constexpr, LOCAL: tl.constexpr,
                PLACES: tl.constexpr, LEVELS: tl.constexpr, TOP: tl.constexpr, C: tl.constexpr,
                SLOTS: tl.constexpr, ROWS: tl.constexpr, PIECE: tl.constexpr,
                R: tl.constexpr):  # fmt: skip
    """R rows of one tile: the best PLACES of their scored blocks, and the forced blocks."""
    p_tile = tiles + tl.program_id(0).to(tl.int64) * 4
    start, stop, position = tl.load(p_tile), tl.load(p_tile + 1), tl.load(p_tile + 2)
    slab = tl.load(p_tile + 3).to(tl.int64)
    first = tl.program_id(1) * R
    if start + first // HKV < stop:
        o_m = first + tl.arange(0, R)
        o_t = start + o_m // HKV  # [R] query
        m_m = (o_t < stop) & (o_m < ROWS // HKV * HKV)
        b_own = (position + o_m // HKV) // BK
        b_limit = tl.where(m_m, tl.maximum(b_own - LOCAL + 1 - SINK, 0), 0)  # [R] scored blocks
        if PLACES == 0:
            b_limit = tl.zeros([R], tl.int32)
        p_0 = scores + slab * ROWS + o_m
        p_1 = pieces + slab // PIECE * ROWS + o_m
        p_2 = groups + slab // (PIECE * PIECE) * ROWS + o_m
        program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        p_ids = room + program * (2 * SLOTS * R) + tl.arange(0, R)

        b_limit_1 = (b_limit + PIECE - 1) // PIECE
        b_limit_2 = (b_limit_1 + PIECE - 1) // PIECE
        if LEVELS == 0:
            p_top, b_top = p_0, b_limit
        elif LEVELS == 1:
            p_top, b_top = p_1, b_limit_1
        else:
            p_top, b_top = p_2, b_limit_2
        b_id = tl.arange(0, TOP)[:, None] + tl.zeros([TOP, R], tl.int32)
        b_none = tl.zeros([R], tl.int32)
        m_keep, b_rank, b_kept, b_low = best_of(
            p_top[None, :], b_id, b_id < b_top[None, :], b_none, b_none, ROWS, PLACES)  # fmt: skip
        if LEVELS == 2:
            m_keep, b_rank, b_id, b_kept, b_low = narrow(
                p_1, p_ids, b_limit_1, m_keep, b_rank, b_id, b_kept, b_low, ROWS, SLOTS, PIECE,
                PLACES, C, R)  # fmt: skip
        if LEVELS >= 1:
            m_keep, b_rank, b_id, b_kept, b_low = narrow(
                p_0, p_ids + SLOTS * R, b_limit, m_keep, b_rank, b_id, b_kept, b_low, ROWS, SLOTS,
                PIECE, PLACES, C, R)  # fmt: skip
        p_out = out + (o_t.to(tl.int64) * HKV + o_m % HKV) * TOP_K
        store_selection(p_out, m_m, m_keep, b_rank, b_id + SINK, b_kept, b_own, TOP_K, P, SINK,
                        LOCAL, 0)  # fmt: skip


def select_scores(
    scores: Float[Tensor, "blocks ROWS"],
    plan: ScorePlan,
    part: SuperTile,
    config: MSAConfig,
    out: Array,
) -> None:
    """Write the selected blocks of every row of one super-tile whose scores are there (R6-R8)."""
    _, groups, top_k = out.shape
    places = top_k - config.forced_blocks
    levels = 0 if part.longest <= DIRECT else 1 if part.longest <= DIRECT * PIECE else 2
    pieces, piece_groups = scores, scores
    if levels:
        pieces = torch.empty((part.blocks // PIECE, ROWS), dtype=torch.float32, device=out.device)
        piece_groups = torch.empty(
            (part.blocks // SLAB, ROWS), dtype=torch.float32, device=out.device
        )
        maxima_kernel[part.blocks // SLAB, ROWS // COLUMNS](
            scores, plan.fills[part.first_group :], pieces, piece_groups, ROWS=ROWS, PIECE=PIECE,
            COLUMNS=COLUMNS, num_warps=4,
        )  # fmt: skip
    top = pad(-(-part.longest // PIECE**levels))
    below = pad(places * PIECE) if levels else 16
    widest = max(top, below, pad(top_k))
    rows = max(1, min(PICK_ROWS, 4096 // widest))
    slots = max(places, 1)
    room = scores
    if levels:
        room = torch.empty((part.tiles * ROWS // rows, 2, slots, rows), dtype=torch.int32,
                           device=out.device)  # fmt: skip
    pick_kernel[part.tiles, ROWS // rows](
        scores, pieces, piece_groups, plan.tiles[part.first_tile :], room, out, HKV=groups,
        BK=config.block_size, TOP_K=top_k, P=pad(top_k, 1), SINK=config.sink_blocks,
        LOCAL=config.local_blocks, PLACES=places, LEVELS=levels, TOP=top, C=below, SLOTS=slots,
        ROWS=ROWS, PIECE=PIECE, R=rows, num_warps=max(1, min(8, widest * rows // PICK_CELLS)),
    )  # fmt: skip


def as_matrix(x: Float[Tensor, "*shape dim"]) -> Float[Tensor, "rows dim"]:
    """The same numbers as rows that the copy engine can read; copied only where it cannot."""
    rows = x.reshape(-1, x.shape[-1])
    return (
        rows
        if can_describe(rows, rows.shape[1])
        else rows.clone(memory_format=torch.contiguous_format)
    )


@on_its_device
def select_fused(
    q_idx: Float[Array, "Tq Hkv Di"],
    k_idx: Float[Array, "Tk Di"],
    sequences: Sequences,
    config: MSAConfig,
    index_dtype: str | None = None,
    score_bytes: int = SCORE_BYTES,
) -> Selection:
    """The selected blocks from index queries and keys, as `triton_impl.selection` finds them.

    Args:
        index_dtype: None keeps the tensors as they are; "fp8_e4m3" rounds both to 8 bits (see
            `msa.triton_impl.quantize`): faster, and no longer the same function.
        score_bytes: bound on the memory of the scores; queries are taken in super-tiles below it.
    """
    from msa.triton_impl.hopper.index_scores import score_segments

    require_kernels(config.block_size, config.top_k, q_idx=q_idx, k_idx=k_idx)
    n_q, groups, dim = q_idx.shape
    scale = config.index_scale_for(dim)
    if index_dtype is not None:
        q_idx, k_idx = to_fp8(q_idx), to_fp8(k_idx)
    out = torch.empty((n_q, groups, config.top_k), dtype=torch.int32, device=q_idx.device)
    token_bytes = dim * k_idx.dtype.itemsize
    plan = plan_scores(sequences, config, groups, token_bytes, score_bytes, q_idx.device)
    most = max((part.blocks for part in plan.parts), default=0)
    scores = torch.empty((most, ROWS), dtype=torch.float32, device=q_idx.device)
    queries, keys = as_matrix(q_idx), as_matrix(k_idx)
    for part in plan.parts:
        if part.blocks:
            runs = plan.runs[part.first_run : part.first_run + plan.programs + 1]
            score_segments(queries, keys, plan.segments, runs, scores, groups, config.block_size,
                           config.local_blocks, scale)  # fmt: skip
        select_scores(scores, plan, part, config, out)
    return Selection(out, sequences, config.block_size)
