"""TODO docstring"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from msa.ir import Schedule
from msa.triton_impl.hopper.ring import (
    copy_tile,
    in_parts,
    make_barriers,
    produce,
    release,
    wait_empty,
    wait_full,
)
from msa.triton_impl.hopper.teacher import LOG2E, load_work, teach
from msa.triton_impl.hopper.walk_rows import clear_foreign
from msa.triton_impl.item_sums import sum_items, sum_slots
from msa.triton_impl.launch import can_describe
from msa.triton_impl.tables import block_table, query_table

KINDS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
BLOCK, DIM, BATCH, ROWS = 128, 128, 16, 64  # keys of a block, D, edges of a batch, rows of a chunk


@gluon.jit
def fast_log2(x):
    """Base-2 logarithm by one instruction, of normal numbers."""
    return gl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def load_asking(q_idx, query_ids, start, length, o_e, o_d, i_r, stride_qt, stride_qh):
    """Index queries of the edges o_e of an item, [16, Di]; zeros behind its last edge."""
    there = o_e < length
    t = gl.load(query_ids + start + o_e, mask=there, other=0).to(gl.int64)
    p = q_idx + t * stride_qt + i_r.to(gl.int64) * stride_qh
    return gl.load(p[:, None] + o_d[None, :], mask=there[:, None], other=0.0)


@gluon.jit
def compare(s, p_tile, own, first, b_top, b_log, b_gap, scale, W: gl.constexpr, G: gl.constexpr,
            MMA: gl.constexpr):  # fmt: skip
    """The loss of half of the block's keys [64], added up, and the gradient of their scores.

    The minimum of a NaN and 0 is 0. So a score that equals an infinite top is 0 below it. All
    logarithms are to the base 2. b_log is already.
    """
    KEYS: gl.constexpr = p_tile.shape[0] // 2
    o_n = first + W * KEYS + gl.arange(0, KEYS, layout=gl.SliceLayout(1, MMA))
    seen = o_n[:, None] <= own[None, :]
    below = gl.minimum(gl.maximum(s, float("-inf")) - b_top[None, :], 0.0)  # NaN is -inf (R4)
    student = gl.where(seen, below, float("-inf")) * scale - b_log[None, :]
    p = gl.where(seen, p_tile.slice(W * KEYS, KEYS, dim=0).load(MMA) * (1.0 / G), 0.0)
    gap = p * (fast_log2(gl.maximum(p, 2.0**-126)) - student)
    return b_gap + gl.sum(gl.where(p != 0.0, gap, 0.0), 1), gl.exp2(student) - p  # NaN is not 0


@gluon.jit
def start_scores(k_idx_tile, q_tile, W: gl.constexpr, MMA: gl.constexpr):
    """Start the product of half of the block's index keys with a batch of index queries."""
    KEYS: gl.constexpr = MMA.instr_shape[0] * 4
    BATCH: gl.constexpr = q_tile.shape[0]
    zero = gl.zeros([KEYS, BATCH], gl.float32, layout=MMA)
    return warpgroup_mma(k_idx_tile.slice(W * KEYS, KEYS, dim=0), q_tile.permute((1, 0)), zero,
                         use_acc=False, is_async=True)  # fmt: skip


@gluon.jit
def learn(tiles, asking, barriers, numbers, work, edges, keys, outputs, q_idx, index_scale,
          n_items, n_blocks, stride_qt, stride_qh, G: gl.constexpr, HKV: gl.constexpr,
          TOP_K: gl.constexpr, GRADIENT: gl.constexpr, MMA: gl.constexpr, DK_MMA: gl.constexpr,
          LN2: gl.constexpr):  # fmt: skip
    """The student: its probabilities, the loss, and what goes into both gradients."""
    _k_tile, k_idx_tile, _q_tiles, p_tiles, _row_tiles = tiles
    q_tile, ds_tile = asking
    _0, _1, _2, _3, k_idx_full, k_idx_empty, p_full, p_empty = barriers
    top, log_total = numbers
    query_ids, slots, own_keys = edges
    first_keys, key_stops = keys
    losses, d_q, d_k = outputs
    BK: gl.constexpr = k_idx_tile.shape[0]
    DI: gl.constexpr = k_idx_tile.shape[1]
    BATCH: gl.constexpr = q_tile.shape[0]
    HALF: gl.constexpr = BK // 2
    COLUMN: gl.constexpr = gl.SliceLayout(0, MMA)
    LINES: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    A: gl.constexpr = gl.DotOperandLayout(0, DK_MMA, 2)
    a_e = gl.arange(0, BATCH, layout=gl.SliceLayout(1, LINES))
    a_d = gl.arange(0, DI, layout=gl.SliceLayout(0, LINES))
    o_e = gl.arange(0, BATCH, layout=COLUMN)
    batch, seen = 0, 0
    for item in range(gl.program_id(0), n_items, gl.num_programs(0)):
        start, length, i_b, i_r = load_work(work, item, n_blocks)
        if length > 0:
            first = gl.load(first_keys + i_b)
            key_stop = gl.load(key_stops + i_b)
            rows = load_asking(q_idx, query_ids, start, length, a_e, a_d, i_r, stride_qt,
                               stride_qh)  # fmt: skip
            wait_full(k_idx_full, seen, 1)
            if first + BK > key_stop:
                clear_foreign(k_idx_tile, first, key_stop)
            b_gap = gl.zeros([HALF], gl.float32, layout=gl.SliceLayout(1, MMA))
            dk_0 = gl.zeros([HALF, DI], gl.float32, layout=DK_MMA)
            dk_1 = gl.zeros([HALF, DI], gl.float32, layout=DK_MMA)
            for i in range(0, length, BATCH):
                q_tile.store(rows)
                fence_async_shared()
                running_0 = start_scores(k_idx_tile, q_tile, 0, MMA)
                running_1 = start_scores(k_idx_tile, q_tile, 1, MMA)
                real = o_e < length - i
                t = gl.load(query_ids + start + i + o_e, mask=real, other=0)
                own = gl.load(own_keys + t, mask=real, other=-1)
                x = t.to(gl.int64) * HKV + i_r
                b_top = gl.load(top + x, mask=real, other=0.0)
                b_log = gl.load(log_total + x, mask=real, other=0.0) * LOG2E
                rows = load_asking(q_idx, query_ids, start + i + BATCH, length - i - BATCH, a_e,
                                   a_d, i_r, stride_qt, stride_qh)  # fmt: skip
                s_0, s_1 = warpgroup_mma_wait(0, deps=[running_0, running_1])
                wait_full(p_full, batch, 2)
                p_tile = p_tiles.index(batch % 2)
                b_gap, ds_0 = compare(s_0, p_tile, own, first, b_top, b_log, b_gap, index_scale, 0,
                                      G, MMA)  # fmt: skip
                ds_0 = ds_0.to(q_tile.dtype)
                b_gap, ds_1 = compare(s_1, p_tile, own, first, b_top, b_log, b_gap, index_scale, 1,
                                      G, MMA)  # fmt: skip
                ds_1 = ds_1.to(q_tile.dtype)
                release(p_empty, batch, 2)
                batch += 1
                if GRADIENT:
                    ds_tile.slice(0, HALF, dim=0).store(ds_0)
                    ds_tile.slice(HALF, HALF, dim=0).store(ds_1)
                    fence_async_shared()
                    dk_0 = warpgroup_mma(gl.convert_layout(ds_0, A), q_tile, dk_0, is_async=True)
                    dk_1 = warpgroup_mma(gl.convert_layout(ds_1, A), q_tile, dk_1, is_async=True)
                    dq = warpgroup_mma(k_idx_tile.permute((1, 0)), ds_tile,
                                       gl.zeros([DI, BATCH], gl.float32, layout=MMA),
                                       use_acc=False, is_async=True)  # fmt: skip
                    dk_0, dk_1, b_dq = warpgroup_mma_wait(0, deps=[dk_0, dk_1, dq])
                    t = gl.load(query_ids + start + i + o_e, mask=real, other=0)
                    slot = gl.load(slots + start + i + o_e, mask=real, other=0)
                    o_d = gl.arange(0, DI, layout=gl.SliceLayout(1, MMA))
                    p_dq = d_q + ((t.to(gl.int64) * HKV + i_r) * TOP_K + slot) * DI
                    gl.store(p_dq[None, :] + o_d[:, None], b_dq, mask=real[None, :])
            release(k_idx_empty, seen, 1)
            gl.store(losses + item, gl.sum(b_gap, 0) * LN2)
            if GRADIENT:
                o_k = gl.arange(0, HALF, layout=gl.SliceLayout(1, DK_MMA))
                o_f = gl.arange(0, DI, layout=gl.SliceLayout(0, DK_MMA))
                p_dk = d_k + (item.to(gl.int64) * BK + o_k)[:, None] * DI + o_f[None, :]
                gl.store(p_dk, dk_0)
                gl.store(p_dk + HALF * DI, dk_1)
            seen += 1


@gluon.jit
def load_places(query_ids, start, length, x, i_r, nowhere, G: gl.constexpr, HKV: gl.constexpr,
                EDGES: gl.constexpr):  # fmt: skip
    """Row `x ... x + EDGES` of an item: where the rows of its queries start, as a tuple."""
    places = ()
    for e in gl.static_range(EDGES):
        t = gl.load(query_ids + start + gl.minimum(x + e, length - 1))
        places += (gl.where(x + e < length, (t * HKV + i_r) * G, nowhere),)
    return places


@gluon.jit
def copy_edges(q_desc, k_desc, k_idx_desc, tiles, barriers, work, query_ids, first_keys, n_items,
               n_blocks, nowhere, G: gl.constexpr, HKV: gl.constexpr, BATCH: gl.constexpr,
               STAGES: gl.constexpr):  # fmt: skip
    """The producer: of every item its block of keys, and the rows of each edge's query."""
    k_tile, k_idx_tile, q_tiles, _p_tiles, _row_tiles = tiles
    k_full, k_empty, q_full, q_empty, k_idx_full, k_idx_empty, _full, _empty = barriers
    EDGES: gl.constexpr = q_tiles.shape[1] // G
    PARTS: gl.constexpr = [EDGES, G, q_tiles.shape[2]]
    LAYOUT: gl.constexpr = q_desc.layout
    HALF: gl.constexpr = q_tiles.shape[2]
    step, seen = 0, 0
    for item in range(gl.program_id(0), n_items, gl.num_programs(0)):
        start, length, i_b, i_r = load_work(work, item, n_blocks)
        if length > 0:
            places = load_places(query_ids, start, length, 0, i_r, nowhere, G, HKV, EDGES)
            first = gl.load(first_keys + i_b)
            wait_empty(k_empty, seen, 1)
            mbarrier.expect(k_full.index(0), k_desc.block_type.nbytes)
            copy_tile(k_desc, [first, i_r * (2 * HALF)], k_full.index(0), k_tile)
            stop = (length + BATCH - 1) // BATCH * BATCH
            for x in range(0, stop, EDGES):
                following = load_places(query_ids, start, length, x + EDGES, i_r, nowhere, G, HKV,
                                        EDGES)  # fmt: skip
                wait_empty(q_empty, step, STAGES)
                full = q_full.index(step % STAGES)
                half = 2 * (step % STAGES)
                low = in_parts(q_tiles.index(half), PARTS, LAYOUT)
                high = in_parts(q_tiles.index(half + 1), PARTS, LAYOUT)
                mbarrier.expect(full, 2 * EDGES * q_desc.block_type.nbytes)
                for e in gl.static_range(EDGES):
                    copy_tile(q_desc, [places[e], 0], full, low.index(e))
                    copy_tile(q_desc, [places[e], HALF], full, high.index(e))
                places = following
                step += 1
                if x == BATCH - EDGES:  # the student reads these keys after the first batch
                    wait_empty(k_idx_empty, seen, 1)
                    mbarrier.expect(k_idx_full.index(0), k_idx_desc.block_type.nbytes)
                    copy_tile(k_idx_desc, [first, 0], k_idx_full.index(0), k_idx_tile)
            seen += 1


@gluon.jit
def hopper_loss_kernel(q_desc, k_desc, k_idx_desc, q_idx, top, log_total, top_idx, log_total_idx,
                       rows, starts, stops, query_ids, slots, own_keys, first_keys, key_stops,
                       losses, d_q, d_k, scale, index_scale, n_items, n_blocks, nowhere, stride_qt,
                       stride_qh, G: gl.constexpr, HKV: gl.constexpr, TOP: gl.constexpr,
                       TOP_K: gl.constexpr, GRADIENT: gl.constexpr, BATCH: gl.constexpr,
                       STAGES: gl.constexpr, MMA: gl.constexpr, I_MMA: gl.constexpr,
                       DK_MMA: gl.constexpr, LINE: gl.constexpr, NARROW: gl.constexpr,
                       LN2: gl.constexpr,
                       TEACHER: gl.constexpr, STUDENT: gl.constexpr):  # fmt: skip
    """Items p, p + programs, ... of program p."""
    BK: gl.constexpr = k_desc.block_type.shape[0]
    DIM: gl.constexpr = k_desc.block_type.shape[1]
    DI: gl.constexpr = k_idx_desc.block_type.shape[1]
    ROWS: gl.constexpr = MMA.instr_shape[1]
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tiles = (
        gl.allocate_shared_memory(k_desc.dtype, [BK, DIM], k_desc.layout),
        gl.allocate_shared_memory(k_desc.dtype, [BK, DI], k_idx_desc.layout),
        gl.allocate_shared_memory(k_desc.dtype, [2 * STAGES, ROWS, DIM // 2], q_desc.layout),
        gl.allocate_shared_memory(gl.float32, [2, BK, BATCH], PLAIN),
        gl.allocate_shared_memory(gl.float32, [4 if TOP else 2, BATCH * G], FLAT),
    )  # fmt: skip
    asking = (
        gl.allocate_shared_memory(k_desc.dtype, [BATCH, DI], LINE),
        gl.allocate_shared_memory(k_desc.dtype, [BK, BATCH], NARROW),
    )
    barriers = (
        make_barriers(1, 1), make_barriers(1, 2), make_barriers(STAGES, 1),
        make_barriers(STAGES, 2), make_barriers(1, 1), make_barriers(1, 1), make_barriers(2, 2),
        make_barriers(2, 1),
    )  # fmt: skip
    work = (rows, starts, stops)
    gl.warp_specialize([
        (teach, (0, tiles, barriers, (top, log_total), work, query_ids, n_items, n_blocks, scale, G,
                 HKV, TOP, BATCH, STAGES, MMA)),
        (teach, (1, tiles, barriers, (top, log_total), work, query_ids, n_items, n_blocks, scale, G,
                 HKV, TOP, BATCH, STAGES, MMA)),
        (learn, (tiles, asking, barriers, (top_idx, log_total_idx), work,
                 (query_ids, slots, own_keys), (first_keys, key_stops), (losses, d_q, d_k), q_idx,
                 index_scale, n_items, n_blocks, stride_qt, stride_qh, G, HKV, TOP_K, GRADIENT,
                 I_MMA, DK_MMA, LN2)),
        (copy_edges, (q_desc, k_desc, k_idx_desc, tiles, barriers, work, query_ids, first_keys,
                      n_items, n_blocks, nowhere, G, HKV, BATCH, STAGES)),
    ], [4, 4, 1], [TEACHER, STUDENT, 24])  # fmt: skip


# -- host -----------------------------------------------------------------------------------------
OPTIONS = {
    "BATCH": BATCH,
    "MMA": gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16]),
    "I_MMA": gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BATCH, 16]),
    "DK_MMA": gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16]),
    "LINE": gl.NVMMASharedLayout.get_default_for([BATCH, DIM], gl.bfloat16),
    "NARROW": gl.NVMMASharedLayout.get_default_for([BLOCK, BATCH], gl.bfloat16),
    "LN2": math.log(2),
    "TEACHER": 128,
    "STUDENT": 232,
    "num_warps": 4,
}
"""The compile-time options that are always the same."""


def stages_of(group: int, with_top: bool) -> int:
    """Chunks of 64 rows that fit into shared memory beside everything else.

    >>> stages_of(16, False), stages_of(16, True), stages_of(64, True)
    (8, 8, 7)
    """
    others = 4 * BLOCK * DIM + 8 * BLOCK * BATCH + 2 * (DIM + BLOCK) * BATCH
    others += (2 + 2 * with_top) * 4 * BATCH * group
    return min(8, (226 * 1024 - others) // (2 * ROWS * DIM))


def describe(matrix: Float[Tensor, "rows columns"], rows: int, columns: int) -> TensorDescriptor:
    """A matrix, to be copied in tiles by the copy engine."""
    shape = [rows, columns]
    layout = gl.NVMMASharedLayout.get_default_for(shape, KINDS[matrix.dtype])
    return TensorDescriptor.from_tensor(matrix, shape, layout)


def as_matrix(x: Float[Tensor, "T *heads D"], by_head: bool) -> Float[Tensor, "rows columns"]:
    """One row for each token, or for each token and head; copied only where no view has them."""
    if not can_describe(x, x.shape[-1]) or (by_head and x.stride(0) != x.shape[1] * x.stride(1)):
        x = x.clone(memory_format=torch.contiguous_format)
    return x.flatten(0, -2) if by_head else x.flatten(1)


def index_loss(
    q: Float[Tensor, "Tq Hq D"], k: Float[Tensor, "Tk Hkv D"],
    q_idx: Float[Tensor, "Tq Hkv Di"], k_idx: Float[Tensor, "Tk Di"],
    sums: tuple[Float[Tensor, "Tq Hq"] | None, Float[Tensor, "Tq Hq"]],
    student: tuple[Float[Tensor, "Tq Hkv"], Float[Tensor, "Tq Hkv"]],
    schedule: Schedule, softmax_scale: float, index_scale: float,
    gradients: tuple[Float[Tensor, "Tq Hkv Di"], Float[Tensor, "Tk Di"]] | None = None,
) -> Float[Tensor, ""]:  # fmt: skip
    """The KL summed over queries and groups, float64, for calls that `msa.kernel_choice` takes.

    Args:
        sums: of the main branch, what `softmax_sums` returned; or None and the LSE.
        student: of the index branch, what `softmax_sums` returned.
        gradients: float32 and contiguous; d_q_idx is written and d_k_idx added to.
    """
    index, device, top = schedule.reverse_index, q.device, sums[0]
    sequences, block = index.sequences, index.block_size
    (n_q, heads, _), (_, groups, dim), items = q.shape, q_idx.shape, len(schedule.rows)
    losses = torch.zeros(items, dtype=torch.float32, device=device)
    parts = [losses, losses]
    if gradients:
        shapes = ((n_q, groups, index.top_k, 1, dim), (items, block, dim))
        parts = [torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes]
    if items:
        group = heads // groups
        programs = torch.cuda.get_device_properties(device).multi_processor_count
        hopper_loss_kernel[(min(programs, items),)](
            describe(as_matrix(q, True), group, DIM // 2), describe(as_matrix(k, False), block, DIM),
            describe(as_matrix(k_idx, False), block, dim), q_idx, sums[1] if top is None else top,
            sums[1], *student, schedule.rows, schedule.starts, schedule.stops, index.query_ids,
            index.slots, query_table(sequences, block, device)[0],
            *block_table(sequences, block, device), losses, *parts,
            softmax_scale * LOG2E.value, index_scale * LOG2E.value, items,
            sequences.cu_blocks(block)[-1], n_q * heads, *q_idx.stride()[:2], G=group, HKV=groups, TOP=top is not None,
            TOP_K=index.top_k, GRADIENT=gradients is not None,
            STAGES=stages_of(group, top is not None), **OPTIONS,
        )  # fmt: skip
    if gradients:
        sum_slots(parts[0], index.counts, gradients[0], index_scale)
        sum_items(parts[1], schedule, gradients[1][:, None], index_scale, add=True)
    return losses.sum(dtype=torch.float64)
