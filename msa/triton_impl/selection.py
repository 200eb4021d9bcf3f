"""Index branch: from index queries and keys to the selected blocks in one pass (R4-R8).

These are the portable kernels. On Hopper GPUs `select_fused` takes those of `hopper/` instead,
unless its caller names these or `msa.kernel_choice` says that the others cannot run.

    for each tile of rows (query, group):
        kept = {}                                   # at most `places` = k - forced blocks
        for each block b before the recent ones, ascending:
            m = max over tokens of index_scale * q_idx_rows @ k_idx[b]^T
            kept = best `places` of kept + {(m, b)}, equal scores to the lower id
        selection = sorted(kept + forced blocks)

What the fast form changes:
 1. Forced blocks are never scored. The own block is always forced (R6), so every scored block lies
    wholly in the past: no token mask anywhere, and no partial block.
 2. Keeping an exact top-k for a few hundred rows at every block would be slow. Instead each row
    has a threshold that its best `places` blocks reach, and appends each block that beats it to a
    buffer of CAPACITY candidates in L2. Every CHECK blocks, buffers that are nearly full are cut
    back. With ordinary scores this happens after about 64, 160, 400, 1000 ... blocks.
 3. A block must beat the threshold strictly, which is exact: ids ascend, so of equal scores the
    earlier block stays.
 4. Nothing is ever sorted. A threshold is found by bisection on the scores as integers, counting
    how many reach it. A prefix sum then closes the gaps, and ids stay ascending, as R8 wants them.
 5. The keys are split among several programs when there are few queries (or too few tiles to fill
    the device evenly); the finishing kernel reads all buffers of a row at once.
 6. Long items start first, so that all programs end at about the same time.
 7. Index keys may lie in the pages of a cache (`paged_keys.py`): the page of the next product is
    loaded during this one. Keys of 8 bits are widened, unless the queries have 8 bits, too. A
    page's factor multiplies its maximum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from msa import chips
from msa.config import MSAConfig
from msa.ir import Array, Selection, Sequences
from msa.kernel_choice import Kernels, call_of
from msa.kernel_choice import choose as choose_kernels
from msa.triton_impl.block_topk import select_blocks
from msa.triton_impl.launch import is_exact, pad, require_kernels
from msa.triton_impl.paged_keys import (
    IndexPages,
    index_arguments,
    index_descriptor,
    key_offset,
    key_row,
    load_page,
    load_scale,
)
from msa.triton_impl.places import device_table, on_its_device
from msa.triton_impl.quantize import to_fp8
from msa.triton_impl.step_sequences import lower, to_device
from msa.triton_impl.tile_verbs import along, load_tile, wait_for_threads
from msa.triton_impl.topk import (
    NO_BLOCK,
    NO_SCORE,
    keep_best,
    score_key,
    store_selection,
    threshold_of,
)
from msa.triton_impl.tuning import EVERY_LAUNCH, TileConfig, choose

__all__ = ["select_blocks", "select_fused"]

CAPACITY = 64  # candidates of one row's buffer, at least
CHECK = 8  # blocks between two checks of how full the buffers are
SLACK = 6  # candidates beyond `places` that may stay when a buffer is cut back
PROGRAMS = 3  # items of each multiprocessor, which keep the device evenly loaded
SHORTEST = 16  # blocks of one item, at least
WIDEST = 2**15  # candidates that the finishing kernel reads, at most, unless one buffer has more


@triton.jit
def cut_back(keys, ids, p_low, p_count, b_count, BM: tl.constexpr, CAP: tl.constexpr,
             PLACES: tl.constexpr, SLACK: tl.constexpr, SLICE: tl.constexpr):  # fmt: skip
    """Leave each row about its best PLACES candidates; return the new thresholds and counts [BM].

    Any threshold that the best PLACES reach is correct, so SLACK more may stay: that is quicker.
    The candidates do not fit into registers at once. So the rows are cut back SLICE at a time, in
    place: counts go out to p_count, each slice reads and rewrites its columns of `keys` and `ids`
    and leaves its threshold and count, and all rows read these back at the end. Other threads wrote
    what a thread reads here; `wait_for_threads` says why that is sound.
    """
    o_m = tl.arange(0, BM)
    o_c = tl.arange(0, CAP)[:, None]
    tl.store(p_count + o_m, b_count)
    wait_for_threads()
    for first in range(0, BM, SLICE):
        o_s = first + tl.arange(0, SLICE)
        m_x = o_c < tl.load(p_count + o_s)[None, :]
        b_key = tl.load(keys + o_c * BM + o_s[None, :], mask=m_x, other=NO_SCORE)  # [CAP, SLICE]
        b_low = tl.min(tl.where(m_x, b_key, NO_BLOCK), 0)
        b_low = threshold_of(b_key, m_x, b_low, PLACES, SLACK, 0)
        m_keep, b_rank, b_kept = keep_best(b_key, m_x, b_low, PLACES, 0)
        b_id = tl.load(ids + o_c * BM + o_s[None, :], mask=m_keep, other=0)
        wait_for_threads()
        tl.store(keys + b_rank * BM + o_s[None, :], b_key, mask=m_keep)
        tl.store(ids + b_rank * BM + o_s[None, :], b_id, mask=m_keep)
        tl.store(p_low + o_s, tl.where(b_kept < PLACES, NO_SCORE, b_low))
        tl.store(p_count + o_s, b_kept)
    wait_for_threads()
    return tl.load(p_low + o_m), tl.load(p_count + o_m)


@triton.jit
def scan_kernel(q, k, items, keys, ids, fills, lows, table, k_scales, scale, stride_qt, stride_qr,
                stride_kp, stride_kt, stride_ts, stride_tb, stride_sp, HKV: tl.constexpr,
                DIM: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
                BN: tl.constexpr, LOCAL: tl.constexpr, PLACES: tl.constexpr, CAP: tl.constexpr,
                CHECK: tl.constexpr, SLACK: tl.constexpr, SLICE: tl.constexpr, TMA: tl.constexpr,
                PAGED: tl.constexpr, EIGHT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One item: BM rows against a run of blocks; writes its candidates to its buffer.

    Parameters:
        q: [Tq, Hkv, Di], 16-bit, float32 or e4m3; index queries
        k: [Tk, Di], as q; index keys. With PAGED [pages, Bk, Di], as q or e4m3; with TMA the
            descriptor, tiles of BN rows
        items: [items, 8], int32; see `ScanPlan`
        keys: [buffers, CAP, BM], int32; the candidates' scores as integers, written
        ids: [buffers, CAP, BM], int32; the candidates' block ids, written
        fills: [buffers, BM], int32; candidates of each row, written
        lows: [buffers, BM], int32; scratch of `cut_back`
        table: [B, columns], int32 or int64; a sequence's pages in order, read with PAGED only
        k_scales: [pages], float32; factors of the pages, read with EIGHT only
        scale: float; index scale
        stride_qt, stride_kt: elements from one token of q, k to the next
        stride_qr: elements from one group of q to the next
        stride_kp: elements from one page of k to the next
        stride_ts, stride_tb: elements from one sequence, block of table to the next
        stride_sp: elements from one page of k_scales to the next
        HKV, BM: groups, rows of the tile (queries times groups)
        DIM, BD: Di, and rounded up to a power of two
        BK, BN: keys of a block, keys of one product
        LOCAL: forced recent blocks
        PLACES: places for blocks that are not forced
        CAP: candidates that a row's buffer holds
        CHECK: blocks between two checks of how full the buffers are
        SLACK: candidates beyond PLACES that may stay when a buffer is cut back
        SLICE: rows that `cut_back` takes at a time
        TMA: bool; keys come by the bulk copy engine
        PAGED: bool; index keys are pages
        EIGHT: bool; pages are of 8 bits
        PRECISION: input precision of the products
    """
    p_item = items + tl.program_id(0).to(tl.int64) * 8
    start, stop, position, first_key = (tl.load(p_item), tl.load(p_item + 1), tl.load(p_item + 2),
                                        tl.load(p_item + 3))  # fmt: skip
    b_first = tl.load(p_item + 4)
    # a step may know only a bound of the position: no block behind the last row's limit is read
    b_stop = (position + stop - start - 1) // BK - LOCAL + 1
    b_stop = tl.minimum(tl.load(p_item + 5), tl.maximum(b_stop, b_first))
    slot = tl.load(p_item + 6).to(tl.int64)
    p_table = table + along(tl.load(p_item + 7), stride_ts)
    o_m = tl.arange(0, BM)
    o_t = start + o_m // HKV  # [BM] query
    m_m = o_t < stop
    b_limit = (position + o_m // HKV) // BK - LOCAL + 1  # [BM] blocks from here on are forced
    b_limit = tl.where(m_m, b_limit, 0)
    o_d, o_n = tl.arange(0, BD), tl.arange(0, BN)
    p_q = q + along(o_t, stride_qt) + along(o_m % HKV, stride_qr)  # [BM]
    b_q = load_tile(p_q, m_m, o_d, DIM)  # [BM, BD]

    zero = tl.full((), 0, tl.int64)  # index keys have no heads
    keys += slot * (CAP * BM)
    ids += slot * (CAP * BM)
    b_threshold = tl.full([BM], NO_SCORE, tl.int32)
    b_count = tl.zeros([BM], tl.int32)
    b_max = tl.full([BM], float("-inf"), tl.float32)
    STEPS: tl.constexpr = BK // BN  # products per block
    page = load_page(p_table, b_first, stride_tb, PAGED)
    for i_0 in range(b_first * STEPS, b_stop * STEPS, CHECK * STEPS):
        for i in range(i_0, tl.minimum(i_0 + CHECK * STEPS, b_stop * STEPS)):
            first, i_n = first_key + (i // STEPS) * BK, (i % STEPS) * BN
            next_b = tl.minimum((i + 1) // STEPS, b_stop - 1)
            next_page = load_page(p_table, next_b, stride_tb, PAGED)
            if TMA:
                row, column = key_row(page, first, i_n, zero, stride_kp, stride_kt, PAGED)
                b_k = tl.trans(k.load([row, column]))  # [BD, BN]
            else:
                p_k = k + key_offset(page, first, i_n, stride_kp, stride_kt, PAGED)
                p_k += along(o_n, stride_kt)[None, :]
                if DIM == BD:
                    b_k = tl.load(p_k + o_d[:, None])
                else:
                    b_k = tl.load(p_k + o_d[:, None], mask=(o_d < DIM)[:, None], other=0.0)
            b_k = b_k.to(b_q.dtype)
            b_s = tl.max(tl.dot(b_q, b_k, input_precision=PRECISION), 1)  # [BM]
            b_max = tl.maximum(b_s, tl.where(i % STEPS == 0, float("-inf"), b_max))
            b_key = score_key(b_max * load_scale(k_scales, page, 0, stride_sp, 0, EIGHT) * scale)
            page = next_page
            m_in = (b_key > b_threshold) & (i // STEPS < b_limit) & (i % STEPS == STEPS - 1)
            tl.store(keys + b_count * BM + o_m, b_key, mask=m_in)
            tl.store(ids + b_count * BM + o_m, tl.zeros_like(b_key) + i // STEPS, mask=m_in)
            b_count += m_in.to(tl.int32)
        if tl.max(b_count) > CAP - CHECK:
            b_threshold, b_count = cut_back(
                keys, ids, lows + slot * BM, fills + slot * BM, b_count, BM, CAP, PLACES, SLACK,
                SLICE)  # fmt: skip
    tl.store(fills + slot * BM + o_m, b_count)


@triton.jit
def finish_kernel(keys, ids, fills, tiles, out, HKV: tl.constexpr, BM: tl.constexpr,
                  BK: tl.constexpr, TOP_K: tl.constexpr, P: tl.constexpr, SINK: tl.constexpr,
                  LOCAL: tl.constexpr, PLACES: tl.constexpr,
                  CAP: tl.constexpr, C: tl.constexpr, SPLITS: tl.constexpr,
                  R: tl.constexpr):  # fmt: skip
    """R rows: the best of the first C candidates of up to SPLITS buffers, and the forced blocks.

    Parameters:
        keys, ids: [buffers, CAP, BM], int32; candidates, as `scan_kernel` wrote them
        fills: [buffers, BM], int32; candidates of each row
        tiles: [tiles, 5], int32; see `ScanPlan`
        out: [Tq, Hkv, k], int32; the selection, written
        HKV: groups
        BM: rows of the tile: queries times groups
        BK: keys of a block
        TOP_K, P: k, and rounded up to a power of two
        SINK, LOCAL: forced first and recent blocks
        PLACES: places for blocks that are not forced
        CAP: candidates that a row's buffer holds
        C: candidates that are read of each buffer
        SPLITS: buffers of a tile, at most, a power of two
        R: rows of one program
    """
    p_tile = tiles + tl.program_id(0).to(tl.int64) * 5
    start, stop, position = tl.load(p_tile), tl.load(p_tile + 1), tl.load(p_tile + 2)
    slot, n_slots = tl.load(p_tile + 3).to(tl.int64), tl.load(p_tile + 4)
    first = tl.program_id(1) * R
    if start + first // HKV < stop:
        o_m = first + tl.arange(0, R)
        o_t = start + o_m // HKV  # [R] query
        o_x = tl.arange(0, SPLITS * C)
        o_s, o_c = o_x // C, o_x % C  # [SPLITS * C] buffer and place in it
        p_fill = fills + (slot + o_s)[:, None] * BM + o_m[None, :]
        b_fill = tl.load(p_fill, mask=(o_s < n_slots)[:, None], other=0)
        m_x = o_c[:, None] < b_fill  # [SPLITS * C, R]
        p_x = ((slot + o_s) * CAP + o_c)[:, None] * BM + o_m[None, :]
        b_key = tl.load(keys + p_x, mask=m_x, other=NO_SCORE)
        b_low = tl.min(tl.where(m_x, b_key, NO_BLOCK), 0)
        b_low = threshold_of(b_key, m_x, b_low, PLACES, 0, 0)
        m_keep, b_rank, b_kept = keep_best(b_key, m_x, b_low, PLACES, 0)
        b_id = tl.load(ids + p_x, mask=m_keep, other=0)
        p_out = out + (o_t.to(tl.int64) * HKV + o_m % HKV) * TOP_K
        store_selection(p_out, o_t < stop, m_keep, b_rank, b_id, b_kept,
                        (position + o_m // HKV) // BK, TOP_K, P, SINK, LOCAL, 0)  # fmt: skip


@dataclass(frozen=True)
class ScanPlan:
    """Which program scans which blocks: items to scan (longest first), tiles to finish."""

    items: Int[Tensor, "items 8"]
    """First query, its stop, position of the first, first key, first block, its stop, buffer,
    sequence."""
    tiles: Int[Tensor, "tiles 5"]
    """First query, its stop, position of the first, first buffer, number of buffers."""
    most_splits: int
    longest: int
    """Blocks of the longest item: no buffer holds more candidates."""


def capacity_for(config: MSAConfig) -> int:
    """Candidates of one row's buffer: the best ones, and room for more until it is cut back."""
    return pad(config.top_k - config.forced_blocks + SLACK + CHECK, CAPACITY)


@device_table
def plan_scan(
    sequences: Sequences, config: MSAConfig, queries: int, device: torch.device
) -> ScanPlan:
    """Tiles of `queries` neighbouring queries, their blocks cut into enough items to fill a GPU."""
    tiles = []
    for s, (qs, ks) in enumerate(sequences.spans()):
        start = np.arange(qs.start, qs.stop, queries)
        stop = np.minimum(start + queries, qs.stop)
        position = start + (ks.stop - ks.start) - qs.stop
        last = (position + stop - start - 1) // config.block_size
        end = np.maximum(last - config.local_blocks + 1, config.sink_blocks)
        if config.forced_blocks == config.top_k:
            end[:] = config.sink_blocks  # every place is forced
        first_key, sequence = np.full_like(start, ks.start), np.full_like(start, s)
        tiles.append(np.column_stack([start, stop, position, first_key, end, sequence]))
    table = np.concatenate(tiles) if tiles else np.zeros((0, 6), np.int64)
    lengths = table[:, 4] - config.sink_blocks
    span = max(SHORTEST, -(-int(lengths.sum()) // (PROGRAMS * chips.current().multiprocessors)))
    buffers = max(1, WIDEST // capacity_for(config))
    span = max(span, -(-int(lengths.max(initial=0)) // buffers))
    splits = -(-lengths // span)  # 0 where nothing is scored
    first_slot = np.cumsum(splits) - splits
    span_of = -(-lengths // np.maximum(splits, 1))  # even pieces
    owner = np.repeat(np.arange(len(table)), splits)
    piece = np.arange(len(owner)) - first_slot[owner]
    begin = config.sink_blocks + piece * span_of[owner]
    end = np.minimum(begin + span_of[owner], table[owner, 4])
    items = np.column_stack([table[owner, :4], begin, end, np.arange(len(owner)), table[owner, 5]])
    items = items[np.argsort(begin - end, kind="stable")]
    tiles = np.column_stack([table[:, :3], first_slot, splits])
    most = int(splits.max()) if len(splits) else 0
    longest = int((end - begin).max()) if len(items) else 0
    on_device = to_device(items, device), to_device(tiles, device)
    for made, owners in zip(on_device, (items[:, 7], table[:, 5])):
        lower(made.T[2:3], sequences, owners)
    return ScanPlan(*on_device, most, longest)


@on_its_device
def select_fused(
    q_idx: Float[Array, "Tq Hkv Di"], k_idx: Float[Array, "Tk Di"],
    sequences: Sequences, config: MSAConfig, index_dtype: str | None = None,
    kernels: Kernels = "auto",
) -> Selection:  # fmt: skip
    """The selected blocks straight from index queries and keys (R4-R8).

    Args:
        index_dtype: None keeps the tensors as they are; "fp8_e4m3" rounds both to 8 bits (see
            `msa.triton_impl.quantize`): faster, and no longer the same function.
        kernels: "portable" for the kernels of this file, "hopper" for those of `hopper/`; "auto"
            chooses by `msa.kernel_choice`.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came (R20).
    """
    require_kernels(config.block_size, config.top_k, q_idx=q_idx, k_idx=k_idx)
    if choose_kernels(kernels, call_of(q_idx, k_idx, config)) == "hopper":
        # imported here, because older releases of triton have no Gluon
        from msa.triton_impl.hopper.selection import select_on_hopper

        return select_on_hopper(q_idx, k_idx, sequences, config, index_dtype)
    return select_portable(q_idx, k_idx, sequences, config, index_dtype)


def select_portable(
    q_idx: Float[Array, "Tq Hkv Di"], k_idx: Float[Array, "*where Di"], sequences: Sequences,
    config: MSAConfig, index_dtype: str | None = None, tile: TileConfig | None = None,
    pages: IndexPages | None = None, out: Int[Tensor, "Tq Hkv k"] | None = None,
) -> Selection:  # fmt: skip
    """`select_fused` by the kernels of this file, for checked arguments; writes no scores.

    Args:
        k_idx: with `pages` [pages, Bk, Di], in the dtype of q_idx or in e4m3.
        index_dtype: for packed index keys.
        tile: launch parameters; None takes the measured ones.
        out: contiguous memory for the ids; None makes it.
    """
    n_q, groups, dim = q_idx.shape
    scale = config.index_scale_for(dim)
    if index_dtype is not None:
        q_idx, k_idx = to_fp8(q_idx, k_idx)
    if out is None:
        out = torch.empty((n_q, groups, config.top_k), dtype=torch.int32, device=q_idx.device)
    tile = tile or choose("select", q_idx.dtype, pad(dim), config.block_size)
    rows = max(tile.rows, pad(groups))
    plan = plan_scan(sequences, config, rows // groups, q_idx.device)
    places = config.top_k - config.forced_blocks
    capacity = capacity_for(config)
    shape = (len(plan.items), capacity, rows)
    keys, ids = (torch.empty(shape, dtype=torch.int32, device=out.device) for _ in range(2))
    fills, lows = torch.empty((2, len(plan.items), rows), dtype=torch.int32, device=out.device)
    least = 32 if q_idx.dtype.itemsize == 1 else 16  # a product's shortest sum
    if len(plan.items):
        key_tiles = index_descriptor(k_idx, tile.keys, pages) if tile.descriptors else None
        eight = pages is not None and pages.scales is not None
        scan_kernel[len(plan.items),](
            q_idx, k_idx if key_tiles is None else key_tiles, plan.items, keys, ids, fills, lows,
            *index_arguments(pages, k_idx, scale, q_idx), HKV=groups, DIM=dim,
            BD=pad(dim, least), BM=rows, BK=config.block_size, BN=tile.keys,
            LOCAL=config.local_blocks, PLACES=places, CAP=capacity, CHECK=CHECK, SLACK=SLACK,
            SLICE=min(rows, max(tile.warps * 512 // capacity, min(16, 8192 // capacity))),
            TMA=key_tiles is not None, PAGED=pages is not None, EIGHT=eight,
            PRECISION=is_exact(q_idx), **tile.launch(),
        )  # fmt: skip
    if n_q:
        read = min(capacity, pad(plan.longest))
        width = read * pad(plan.most_splits, 1)  # candidates of a row, at most
        slots = pad(config.top_k, 1)
        room = max(width, slots)  # numbers of one row
        some = min(rows, 32, max(1, 8192 // room))
        finish_kernel[len(plan.tiles), rows // some](
            keys, ids, fills, plan.tiles, out, HKV=groups, BM=rows, BK=config.block_size,
            TOP_K=config.top_k, P=slots, SINK=config.sink_blocks,
            LOCAL=config.local_blocks, PLACES=places, CAP=capacity, C=read,
            SPLITS=width // read, R=some, num_warps=min(16, max(1, room * some // 1024)),
            **EVERY_LAUNCH,
        )  # fmt: skip
    return Selection(out, sequences, config.block_size)
