"""Backward of attention, the keys' half: dK, dV of a block over the queries that read it (R18).

    for each program, for each row (block, group) of the reverse index in its share:
        dK, dV = 0, 0                                           # of the block's 128 keys
        for each four queries t of the row, with their heads:   # 64 rows q, dO
            P  = exp(softmax_scale * K q^T - lse)               # 0 where token > t
            dS = P (V dO^T - delta)                             # delta = <dO, out> - dlse
            dV += P dO
            dK += dS q
    dK, dV of a block = the sum over the programs, in order; dK times softmax_scale

What the asynchronous form changes:
 1. Groups of warps run at the same time. One warp copies keys and values, one warp the rows of
    queries, one warp the numbers lse and delta. Two consumers of four warps compute.
 2. Edges are single queries. The copy engine gathers the rows of one query at a time (its heads
    lie side by side), so only queries that read the block cost a product, whatever their
    neighbours select.
 3. Everything is transposed, keys along the rows. A consumer owns 64 keys of the block: their dK
    and dV stay in its registers for the whole item. P and dS are the result of one product and
    the left operand of the next, and do not go through memory. Both consumers read the same rows.
 4. The products K q^T and V dO^T start from -lse / softmax_scale and from -delta. What they give is
    ready for exp2 and for dS, and no thread keeps lse and delta while the products run. A token
    that its query does not see starts from -inf. Only blocks at the diagonal need this.
 5. P dO starts as soon as P is there, while V dO^T may still run. dS is computed while P dO runs.
    The two consumers are out of step, so the products of one fill the time of the other.
 6. Every program has an equal share of all edges (`edge_shares.py`), and a row of the reverse index
    is cut only where a share ends. The keys of the next item arrive while the last one is written.
 7. Missing queries at the end of an item come from behind the last row of q: the copy engine
    fills in zeros. Their lse is +inf.

Who waits for whom (R: ring of STAGES tiles of 64 rows of q and of dO; KV: one stage):

    keys' warp     KV0 ........................... KV1 ..
                    |                               ^ released by both after the item's last product
    rows' warp      |  R0  R1  R2  R3 ..wait.. R4
                    v   |   |              ^ R0 is released by both
    consumer 0      S0 dP0 | P0 | dV0, dS0 | dK0 | S1 dP1 | P1 ..
    consumer 1         S0 dP0 | P0 | dV0, dS0 | dK0 | S1 dP1 | ..
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from msa.triton_impl.hopper.edge_rows import (
    copy_keys,
    copy_numbers,
    copy_rows,
    load_row,
    load_share,
)
from msa.triton_impl.hopper.edge_shares import EdgeShares
from msa.triton_impl.hopper.ring import make_barriers, release, wait_full
from msa.triton_impl.hopper.union_walk import KINDS, LOG2E
from msa.triton_impl.item_sums import sum_parts
from msa.triton_impl.launch import can_describe
from msa.triton_impl.tables import own_key_table

ROWS, HALF, DIM, BLOCK = 64, 64, 128, 128
"""Rows of a tile, keys of a consumer, D and Dv, keys of a block."""
OPTIONS = {
    "STAGES": 4,
    "MMA": gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16]),
    "S_MMA": gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16]),
    "REGISTERS": 240,
    "num_warps": 4,
}
"""The compile-time options that are always the same."""


@gluon.jit
def settle(x):
    """The same numbers, in registers of their own before the next instruction that is not moved.

    Otherwise the compiler writes them to the registers of a product when another one already runs,
    and waits for the other one first.
    """
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def consume(W: gl.constexpr, keys, rows, numbers, empty, tables, d_k, d_v, scale, n_blocks,
            POS: gl.constexpr, STAGES: gl.constexpr, MMA: gl.constexpr,
            S_MMA: gl.constexpr):  # fmt: skip
    """Consumer W: keys 64 * W ... 64 * W + 64 of every item."""
    k_tile, v_tile, key_full, key_empty = keys
    q_tiles, do_tiles, full = rows
    lse_tiles, delta_tiles, t_tiles, number_full = numbers
    ids, _offsets, _cuts, _first_rows, firsts, shifts = tables
    HALF: gl.constexpr = k_tile.shape[1]
    DIM: gl.constexpr = k_tile.shape[2]
    ROWS: gl.constexpr = q_tiles.shape[1]
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    C: gl.constexpr = gl.SliceLayout(0, S_MMA)
    edge, last, row = load_share(tables)
    step, item = 0, 0
    while edge < last:
        stop, n, _group, i_b = load_row(tables, row, edge, last, n_blocks, POS)
        if n > 0:
            first = gl.load(firsts + i_b)
            shift = gl.load(shifts + i_b)
            b_dk = gl.zeros([HALF, DIM], gl.float32, layout=MMA)
            b_dv = gl.zeros([HALF, DIM], gl.float32, layout=MMA)
            p_id = ids + edge
            t = gl.load(p_id)
            wait_full(key_full, item, 1)
            for i in range(n):
                s = step % STAGES
                wait_full(number_full, step, STAGES)
                less = gl.expand_dims(lse_tiles.index(s).load(C), 0).broadcast_to([HALF, ROWS])
                if t + shift < first + 2 * HALF - 1:  # a query does not see all of the block
                    o_n = first + W * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, S_MMA))
                    own = t_tiles.index(s).load(C) + shift
                    less = gl.where(o_n[:, None] <= own[None, :], less, float("-inf"))
                delta = gl.expand_dims(delta_tiles.index(s).load(C), 0)
                delta = settle(delta.broadcast_to([HALF, ROWS]))
                t = gl.load(p_id + gl.minimum(i + 1, n - 1) * POS)
                wait_full(full, step, STAGES)
                b_q = q_tiles.index(s)
                b_do = do_tiles.index(s)
                s_next = warpgroup_mma(k_tile.index(W), b_q.permute((1, 0)), less, is_async=True)
                dp_next = warpgroup_mma(v_tile.index(W), b_do.permute((1, 0)), delta,
                                        is_async=True)  # fmt: skip
                b_s = warpgroup_mma_wait(1, deps=[s_next])
                b_p = gl.exp2(b_s * scale)
                a_p = gl.convert_layout(b_p.to(b_q.dtype), A)
                dv_next = warpgroup_mma(a_p, b_do, b_dv, is_async=True)
                b_dp = warpgroup_mma_wait(1, deps=[dp_next])
                a_ds = gl.convert_layout((b_p * b_dp).to(b_q.dtype), A)
                dk_next = warpgroup_mma(a_ds, b_q, b_dk, is_async=True)
                b_dv = warpgroup_mma_wait(1, deps=[dv_next])
                b_dk = warpgroup_mma_wait(0, deps=[dk_next])
                release(empty, step, STAGES)
                step += 1
            release(key_empty, item, 1)
            o_n = W * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, MMA))
            o_d = gl.arange(0, DIM, layout=gl.SliceLayout(0, MMA))
            place = (row + gl.program_id(0)).to(gl.int64) * (2 * HALF * DIM)
            o_x = o_n[:, None] * DIM + o_d[None, :]
            gl.store(d_k + place + o_x, b_dk)
            gl.store(d_v + place + o_x, b_dv)
            item += 1
        edge = stop
        row += 1


@gluon.jit(do_not_specialize=["n_blocks", "n_q"])  # so other sizes compile nothing anew
def hopper_key_gradients_kernel(q_desc, k_desc, v_desc, do_desc, lse, delta, ids, offsets, cuts,
                                first_rows, firsts, shifts, d_k, d_v, scale, factor, n_blocks, n_q,
                                G: gl.constexpr, HKV: gl.constexpr, POS: gl.constexpr,
                                STAGES: gl.constexpr, MMA: gl.constexpr, S_MMA: gl.constexpr,
                                REGISTERS: gl.constexpr):  # fmt: skip
    """The edges cuts[p] ... cuts[p + 1] of program p.

    Parameters:
        q_desc, do_desc: descriptors of q and the gradient of the output, [Tq, Hq, 128], 16-bit, in
            tiles of one query, G heads and 64 columns
        k_desc, v_desc: descriptors of [Tk, Hkv * 128], as q, in tiles of 64 rows of one group
        lse: [Tq, Hq], float32, natural logarithm; the forward's LSE
        delta: [Tq, Hq], float32; <d_out, out> - d_lse
        ids: [edges], int32; the query of each edge
        offsets: [rows + 1], int64; where the edges of a row of the reverse index start
        cuts: [programs + 1], int64; see `EdgeShares`
        first_rows: [programs], int64; see `EdgeShares`
        firsts, shifts: [blocks], int32; an `own_key_table`
        d_k: [items, 128, 128], float32; not yet times the softmax scale, written
        d_v: [items, 128, 128], float32; written
        scale: float; softmax scale times log2(e)
        factor: float; -1 / softmax scale
        n_blocks: int; blocks of all sequences
        n_q: int; queries
        G, HKV: query heads of a group, groups
        POS: queries of one tile
        STAGES: tiles of rows in the ring
        MMA: layout of the gradients of a consumer, [64, 128]
        S_MMA: layout of its scores, [64, 64]
        REGISTERS: of a thread of the second consumer
    """
    HALF: gl.constexpr = k_desc.block_type.shape[0]
    DIM: gl.constexpr = k_desc.block_type.shape[1]
    ROWS: gl.constexpr = POS * G
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, DIM], q_desc.dtype)
    empty = make_barriers(STAGES, 2)
    keys = (
        gl.allocate_shared_memory(k_desc.dtype, [2, HALF, DIM], k_desc.layout),
        gl.allocate_shared_memory(v_desc.dtype, [2, HALF, DIM], v_desc.layout),
        make_barriers(1, 1), make_barriers(1, 2),
    )  # fmt: skip
    rows = (
        gl.allocate_shared_memory(q_desc.dtype, [STAGES, ROWS, DIM], TILE),
        gl.allocate_shared_memory(do_desc.dtype, [STAGES, ROWS, DIM], TILE),
        make_barriers(STAGES, 1),
    )
    numbers = (
        gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], PLAIN),
        gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], PLAIN),
        gl.allocate_shared_memory(gl.int32, [STAGES, ROWS], PLAIN),
        make_barriers(STAGES, 1),
    )
    tables = (ids, offsets, cuts, first_rows, firsts, shifts)
    gl.warp_specialize([
        (consume, (0, keys, rows, numbers, empty, tables, d_k, d_v, scale, n_blocks, POS,
                   STAGES, MMA, S_MMA)),
        (consume, (1, keys, rows, numbers, empty, tables, d_k, d_v, scale, n_blocks, POS,
                   STAGES, MMA, S_MMA)),
        (copy_rows, (q_desc, do_desc, rows, empty, tables, n_blocks, n_q, POS, STAGES)),
        (copy_numbers, (lse, delta, numbers, empty, tables, factor, n_blocks, G, HKV, POS,
                        STAGES)),
        (copy_keys, (k_desc, v_desc, keys, tables, n_blocks, POS)),
    ], [4, 1, 1, 1], [REGISTERS, 32, 32, 32])  # fmt: skip


# -- host -----------------------------------------------------------------------------------------
def programs_of(device: torch.device) -> int:
    """One program for each multiprocessor: its shared memory has no room for two."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def describe_keys(x: Float[Tensor, "Tk Hkv D"]) -> TensorDescriptor:
    """A matrix of one row for each token, to be copied in 64 rows of one group."""
    x = x if can_describe(x, DIM) else x.clone(memory_format=torch.contiguous_format)
    layout = gl.NVMMASharedLayout.get_default_for([HALF, DIM], KINDS[x.dtype])
    return TensorDescriptor(
        x, [len(x), x.shape[1] * DIM], [x.stride(0), 1], [HALF, DIM], layout
    )  # fmt: skip


def describe_rows(x: Float[Tensor, "Tq Hq D"], group: int) -> TensorDescriptor:
    """Rows of one query and group, to be copied in 64 columns."""
    step, heads = x.stride(0), x.stride(1)
    near = heads >= DIM and x.shape[1] * heads <= step < 2**39 and len(x) < 2**31
    if not near or x.data_ptr() % 16 or step % 8 or heads % 8:
        x = x.clone(memory_format=torch.contiguous_format)
    shape = [1, group, 64]
    layout = gl.NVMMASharedLayout.get_default_for(shape, KINDS[x.dtype])
    return TensorDescriptor(x, list(x.shape), list(x.stride()), shape, layout)


def key_gradients(
    q: Float[Tensor, "Tq Hq D"], k: Float[Tensor, "Tk Hkv D"], v: Float[Tensor, "Tk Hkv D"],
    d_out: Float[Tensor, "Tq Hq D"], lse: Float[Tensor, "Tq Hq"], delta: Float[Tensor, "Tq Hq"],
    shares: EdgeShares, softmax_scale: float,
    add_to: tuple[Float[Tensor, "Tk Hkv D"], Float[Tensor, "Tk Hkv D"]] | None = None,
) -> tuple[Float[Tensor, "Tk Hkv D"], Float[Tensor, "Tk Hkv D"]]:  # fmt: skip
    """dK and dV in the dtypes of k and v; d_out, lse and delta are contiguous.

    For arguments that `msa.kernel_choice` takes. The items leave 128 KiB each: one item for each
    block and group, and one more for each program.

    Args:
        add_to: add to these tensors instead of making new ones.
    """
    index, groups = shares.reverse_index, k.shape[1]
    n_q, group = len(q), q.shape[1] // k.shape[1]
    table = own_key_table(index.sequences, BLOCK, q.device)
    shape = (shares.items, BLOCK, DIM)
    parts = [torch.empty(shape, dtype=torch.float32, device=q.device) for _ in range(2)]
    if n_q and len(index.query_ids):
        hopper_key_gradients_kernel[(len(shares.first_rows),)](
            describe_rows(q, group), describe_keys(k), describe_keys(v),
            describe_rows(d_out, group), lse, delta, index.query_ids, index.row_offsets,
            shares.cuts, shares.first_rows, *table, *parts, softmax_scale * LOG2E,
            -1.0 / softmax_scale, table.shape[1], n_q, G=group, HKV=groups, POS=ROWS // group,
            **OPTIONS,
        )  # fmt: skip
    if add_to is None:
        d_k, d_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    else:
        d_k, d_v = add_to
    for part, out, factor in ((parts[0], d_k, softmax_scale), (parts[1], d_v, 1.0)):
        sum_parts(
            part, *shares.item_bounds, index.sequences, BLOCK, out, factor, add=add_to is not None
        )
    return d_k, d_v
