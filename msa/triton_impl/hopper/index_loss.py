"""The alignment loss on Hopper: teacher, student, loss and gradients in one kernel (eq. 9-10, R17).

    for each work item (block of one group, edges start ... stop):          # KV-outer
        for each batch of 16 edges (query t, slot s):
            P           = mean over the group's heads of exp(softmax_scale * K q^T - lse)
            log P_idx   = index_scale * (k_idx q_idx^T - top) - log_total   # the student
            loss       += P (log P - log P_idx), 0 where P = 0
            dS          = P_idx - P
            d_k_idx    += dS q_idx;  d_q_idx[t, group, s] = dS^T k_idx
    then sums over items and over slots, in order

What the asynchronous form changes:
 1. The teacher's probabilities never leave the multiprocessor. The portable kernels write them to
    memory and read them again: 16 KiB for each query and group. One portable kernel for both was
    slower than two, because each of its steps waits for the one before. Here the steps belong to
    groups of warps that run at the same time.
 2. Two teachers of four warps own 64 keys each. Two students of four warps own the index branch:
    its scores, the loss, the gradients. A producer warp copies, two loader warps load. While the
    students work on one batch, the teachers multiply the next.
 3. An edge is one query, and the copy engine gathers its rows: 16 heads lie side by side, so two
    copies fetch them. No tile of neighbouring queries is needed, so no row is computed in vain,
    whether neighbours select alike or not.
 4. Keys are the first operand of the teacher's product and stay in registers. Rows of queries are
    the only operand that is read from shared memory. The heads of a query lie along a thread's
    registers, so their sum costs few exchanges.
 5. A batch has 16 edges, the least that a product over edges can have (d_k_idx).
 6. Edges behind the last one are copied from behind the last query. The copy engine writes zeros
    for them and reads nothing.
 7. The loss is two numbers for each item, and the slots of an edge hold nothing but d_q_idx.
 8. Each student has the loss, dS and d_k_idx of 64 keys. d_q_idx is a sum over all keys, so each
    student computes it for half of the dims, from the dS of both. One student for all keys had
    twice the registers, spilled, and was slower than the teachers.
 9. No other warp waits for an address from memory. The loader brings index queries, numbers of the
    softmax and places of gradients to the students. The teachers load the queries' numbers two
    batches ahead, and the producer two chunks ahead.
10. Tiles that a student reads or writes exist twice. A warp that has waited for its own part of a
    product does not know whether the other warps' parts have ended, and these read the tile, too.
    Before the same tile is written again, a barrier of the batch between has been passed.

Who waits for whom (Q: ring of chunks of 64 rows, P: ring of two batches of probabilities):

    producer    K  Q0 Q1 Q2 Q3 k_idx Q4 ..wait.. Q5 ...
                |  |                  ^ both teachers have read the chunk
                v  v                  |
    teacher 0   K Q0 | exp, sum | K Q1 | exp, sum | ... -> P0       | K Q4 | exp, sum ...
    teacher 1   K Q0 ...| exp, sum | K Q1 | exp, sum .. -> P0       | ...
                                                            |       ^ P2 takes the place of P0
                                                            v       | when the student has read it
    student 0   k_idx q_idx^T for batch 0 ...... waits .... loss, dS | d_k_idx, d_q_idx | batch 1
    student 1   k_idx q_idx^T for batch 0 ...... waits .... loss, dS | d_k_idx, d_q_idx | batch 1
                      ^                                         each waits for the other's dS
                      |
    loader      q_idx 0, q_idx 1, ..wait..: both students have used batch 0 .. q_idx 2 ...

The teachers wait only for the ring and, two batches later, for their students: teacher W leaves P
of its keys to student W.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from msa import chips
from msa.ir import Schedule
from msa.triton_impl.hopper.loss_rows import copy_edges, load_edges
from msa.triton_impl.hopper.ring import (
    make_barriers,
)
from msa.triton_impl.hopper.student import learn
from msa.triton_impl.hopper.teacher import LOG2E, teach
from msa.triton_impl.item_sums import sum_items, sum_slots
from msa.triton_impl.launch import can_describe
from msa.triton_impl.tables import block_table, query_table
from msa.triton_impl.tuning import EVERY_LAUNCH

KINDS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
BLOCK, DIM, BATCH, ROWS = 128, 128, 16, 64  # keys of a block, D, edges of a batch, rows of a chunk


@gluon.jit(
    do_not_specialize=["n_items", "n_blocks", "nowhere"]
)  # so other sizes compile nothing anew
def hopper_loss_kernel(q_desc, k_desc, k_idx_desc, q_idx, top, log_total, top_idx, log_total_idx,
                       rows, starts, stops, query_ids, slots, own_keys, first_keys, key_stops,
                       losses, d_q, d_k, scale, index_scale, n_items, n_blocks, nowhere, stride_qt,
                       stride_qh, G: gl.constexpr, HKV: gl.constexpr, TOP: gl.constexpr,
                       TOP_K: gl.constexpr, GRADIENT: gl.constexpr, BATCH: gl.constexpr,
                       STAGES: gl.constexpr, MMA: gl.constexpr, I_MMA: gl.constexpr,
                       DK_MMA: gl.constexpr, LINE: gl.constexpr, NARROW: gl.constexpr,
                       LN2: gl.constexpr, TEACHER: gl.constexpr, STUDENT: gl.constexpr,
                       PRODUCER: gl.constexpr):  # fmt: skip
    """Items p, p + programs, ... of program p.

    Parameters:
        q_desc: descriptors of [Tq * Hq, 128], 16-bit, in tiles of G rows and half of the columns
        k_desc: descriptors of [Tk, Hkv * 128], as q, in blocks of one group
        k_idx_desc: descriptors of [Tk, Di], as q, in blocks and half of the columns
        q_idx: [Tq, Hkv, Di], as q
        top: [Tq, Hq], float32; highest scores of the main branch, not scaled, read with TOP only
        log_total: [Tq, Hq], float32, natural logarithm; see `softmax_sums`; without TOP the LSE
        top_idx, log_total_idx: [Tq, Hkv], float32; the same of the index branch
        rows: [items], int32; the row of the reverse index: group * n_blocks + block
        starts, stops: [items], int64; the item's edges
        query_ids, slots: [edges], int32; query of an edge, place of the block in its selection
        own_keys: [Tq], int32; each query's own key among the packed keys
        first_keys, key_stops: [blocks], int32; a `block_table`
        losses: [items, 2], float32; halves of the keys, written for items that have edges
        d_q: [Tq, Hkv, k, Di], float32; not yet times the scale, written with GRADIENT only
        d_k: [items, Bk, Di], float32; not yet times the scale, written with GRADIENT only
        scale, index_scale: float; softmax and index scale times log2(e)
        n_items, n_blocks: int; items, blocks of all sequences
        nowhere: int; a row behind the last one of q_desc
        stride_qt, stride_qh: elements from one token of q_idx to the next, from one group
        G, HKV: query heads of a group, groups
        TOP: bool; take off the highest score before the scale is multiplied on
        TOP_K: k
        GRADIENT: bool; write d_q and d_k
        BATCH: edges of a batch
        STAGES: chunks in the ring
        MMA: layout of the teacher's product [64, 64]
        I_MMA: layout of the student's products [64, BATCH]
        DK_MMA: layout of d_k_idx [64, Di]
        LINE, NARROW: layouts of the index queries [BATCH, Di] and of dS [Bk, BATCH]
        LN2: logarithm of 2
        TEACHER, STUDENT, PRODUCER: registers of a thread of the second teacher, of a student, of
            the producer and the loader
    """
    BK: gl.constexpr = k_desc.block_type.shape[0]
    DIM: gl.constexpr = k_desc.block_type.shape[1]
    DI: gl.constexpr = 2 * k_idx_desc.block_type.shape[1]
    ROWS: gl.constexpr = MMA.instr_shape[1]
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_tile = gl.allocate_shared_memory(k_desc.dtype, [BK, DIM], k_desc.layout)
    k_idx_tiles = gl.allocate_shared_memory(k_desc.dtype, [2, BK, DI // 2], k_idx_desc.layout)
    rows_tiles = gl.allocate_shared_memory(k_desc.dtype, [2 * STAGES, ROWS, DIM // 2],
                                           q_desc.layout)  # fmt: skip
    p_tiles = gl.allocate_shared_memory(gl.float32, [2, BK, BATCH], PLAIN)
    sums_tiles = gl.allocate_shared_memory(gl.float32, [4 if TOP else 2, BATCH * G], FLAT)
    asked = (
        gl.allocate_shared_memory(k_desc.dtype, [2, BATCH, DI], LINE),
        gl.allocate_shared_memory(gl.float32, [4, BATCH], FLAT),
        gl.allocate_shared_memory(gl.int32, [2, BATCH], FLAT),
        gl.allocate_shared_memory(gl.int64, [2, BATCH], FLAT),
    )
    ds_tiles = gl.allocate_shared_memory(k_desc.dtype, [2, BK, BATCH], NARROW)
    k_full, k_empty = make_barriers(1, 1), make_barriers(1, 2)
    q_full, q_empty = make_barriers(STAGES, 1), make_barriers(STAGES, 2)
    k_idx_full, k_idx_empty = make_barriers(1, 1), make_barriers(1, 2)
    asked_full, asked_empty = make_barriers(2, 1), make_barriers(2, 2)
    p_full = (make_barriers(2, 1), make_barriers(2, 1))
    p_empty = (make_barriers(2, 1), make_barriers(2, 1))
    ds_full = make_barriers(2, 2)
    work = (rows, starts, stops)
    teacher_tiles = (k_tile, rows_tiles, p_tiles, sums_tiles)
    teacher_barriers = (k_full, k_empty, q_full, q_empty, p_full, p_empty)
    student_tiles = (k_idx_tiles, asked[0], asked[1], asked[2], asked[3], p_tiles, ds_tiles)
    student_barriers = (k_idx_full, k_idx_empty, asked_full, asked_empty, p_full, p_empty, ds_full)
    gl.warp_specialize([
        (teach, (0, teacher_tiles, teacher_barriers, (top, log_total), work, query_ids, n_items,
                 n_blocks, scale, G, HKV, TOP, BATCH, STAGES, MMA)),
        (teach, (1, teacher_tiles, teacher_barriers, (top, log_total), work, query_ids, n_items,
                 n_blocks, scale, G, HKV, TOP, BATCH, STAGES, MMA)),
        (learn, (0, student_tiles, student_barriers, work, (first_keys, key_stops),
                 (losses, d_q, d_k), index_scale, n_items, n_blocks, G, GRADIENT, I_MMA, DK_MMA,
                 LN2)),
        (learn, (1, student_tiles, student_barriers, work, (first_keys, key_stops),
                 (losses, d_q, d_k), index_scale, n_items, n_blocks, G, GRADIENT, I_MMA, DK_MMA,
                 LN2)),
        (load_edges, (asked, (asked_full, asked_empty), (top_idx, log_total_idx), work,
                      (query_ids, slots, own_keys), q_idx, n_items, n_blocks, stride_qt, stride_qh,
                      HKV, TOP_K, 2)),
        (copy_edges, (q_desc, k_desc, k_idx_desc, (k_tile, k_idx_tiles, rows_tiles),
                      (k_full, k_empty, q_full, q_empty, k_idx_full, k_idx_empty), work, query_ids,
                      first_keys, n_items, n_blocks, nowhere, G, HKV, BATCH, STAGES)),
    ], [4, 4, 4, 2, 1], [TEACHER, STUDENT, STUDENT, PRODUCER, PRODUCER])  # fmt: skip


# -- host -----------------------------------------------------------------------------------------
OPTIONS = {
    "BATCH": BATCH,
    "MMA": gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16]),
    "I_MMA": gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BATCH, 16]),
    "DK_MMA": gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16]),
    "LINE": gl.NVMMASharedLayout.get_default_for([BATCH, DIM], gl.bfloat16),
    "NARROW": gl.NVMMASharedLayout.get_default_for([BLOCK, BATCH], gl.bfloat16),
    "LN2": math.log(2),
    "TEACHER": 104,
    "STUDENT": 112,
    "PRODUCER": 48,
    "num_warps": 4,
}
"""The compile-time options that are always the same."""


def stages_of(group: int, with_top: bool) -> int:
    """Chunks of 64 rows that fit into shared memory beside everything else.

    >>> stages_of(16, False), stages_of(16, True), stages_of(64, True)
    (7, 7, 7)
    """
    others = 4 * BLOCK * DIM + 8 * BLOCK * BATCH + 4 * (DIM + BLOCK) * BATCH + 1024
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
    losses = torch.zeros(items, 2, dtype=torch.float32, device=device)
    parts = [losses, losses]
    if gradients:
        shapes = ((n_q, groups, index.top_k, 1, dim), (items, block, dim))
        parts = [torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes]
    if items:
        group = heads // groups
        hopper_loss_kernel[(min(chips.current().multiprocessors, items),)](
            describe(as_matrix(q, True), group, DIM // 2),
            describe(as_matrix(k, False), block, DIM),
            describe(as_matrix(k_idx, False), block, dim // 2),
            q_idx, sums[1] if top is None else top, sums[1], *student, schedule.rows,
            schedule.starts, schedule.stops, index.query_ids, index.slots,
            query_table(sequences, block, device)[0], *block_table(sequences, block, device),
            losses, *parts, softmax_scale * LOG2E.value, index_scale * LOG2E.value, items,
            sequences.cu_blocks(block)[-1], n_q * heads, *q_idx.stride()[:2], G=group, HKV=groups,
            TOP=top is not None, TOP_K=index.top_k, GRADIENT=gradients is not None,
            STAGES=stages_of(group, top is not None), **OPTIONS, **EVERY_LAUNCH,
        )  # fmt: skip
    if gradients:
        sum_slots(parts[0], index.counts, gradients[0], index_scale)
        sum_items(parts[1], schedule, gradients[1][:, None], index_scale, add=True)
    return losses.sum(dtype=torch.float64)
