"""What several kernels share: the tables that tell a program where its tile lies, and tile verbs.

Tables are small int32 tensors made on the host from the borders of the sequences, one per
(sequences, block size, device), and kept (see `places`): a second call with the same borders copies
nothing.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor
from triton.language.extra import libdevice
from triton.tools.tensor_descriptor import TensorDescriptor

from msa.checks import check_kernels, check_top_k, check_triton_device
from msa.ir import Sequences
from msa.triton_impl.places import device_table

INTERPRETED = bool(triton.knobs.runtime.interpret)
FAST = tl.constexpr(not INTERPRETED)  # device functions are there
NO_SCORE = tl.constexpr(-(2**31))  # below the key of any score, -inf included
NO_BLOCK = tl.constexpr(2**31 - 1)  # behind any block id
ABOVE_BITS = tl.constexpr(12)  # of a count of keys above a threshold, KERNEL_TOP_K and some
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-(2.0**128 - 2.0**104))  # float32's lowest number: a maximum that saw nothing

Form = TypeVar("Form", bound=Any)


# -- host: checks ---------------------------------------------------------------------------------
def require_kernels(block_size: int, top_k: int = 1, **tensors: Tensor) -> None:
    """What only these kernels ask for: a GPU or the interpreter, a dtype, sizes.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came (R20).
    """
    check_kernels(block_size, top_k, **tensors)
    for tensor in tensors.values():
        check_triton_device(tensor, INTERPRETED)


def require_top_k(top_k: int) -> None:
    """What is asked of a selection alone, where no block is read.

    Raises:
        ValueError: more blocks per query than the kernels have room for (R20).
    """
    check_top_k(top_k)


def pad(size: int, least: int = 16) -> int:
    """The next power of two, at least `least`: tile sides are powers of two."""
    return max(least, 1 << max(size - 1, 0).bit_length())


def positions_of(group: int) -> int:
    """Neighbouring queries of one tile: with their heads 64 rows, at most 16 queries."""
    return max(1, min(16, 64 // pad(group, 1)))


def heads_of(group: int, positions: int, rows: int) -> int:
    """Heads of one program: with its query positions about `rows` rows, 16 at least.

    >>> heads_of(16, 4, 64), heads_of(64, 1, 32), heads_of(3, 2, 64)
    (16, 32, 8)
    """
    return max(min(pad(group, 1), rows // positions), 16 // positions, 1)


def is_exact(tensor: Tensor) -> str:
    """The input precision of tl.dot: float32 operands stay float32."""
    return "ieee" if tensor.dtype == torch.float32 else "tf32"


def can_describe(tensor: Tensor, dim: int) -> bool:
    """Whether tiles of a packed [T, (heads,) dim] tensor can come by the bulk copy engine (TMA).

    It counts rows and columns in 32 bits, wants rows that do not overlap, fewer than 2^40 bytes and
    a multiple of 16 apart. So a head-major view goes without it, and so does an expanded one.
    """
    step, size = tensor.stride(0), tensor.element_size()
    return (
        tensor.is_cuda
        and dim == pad(dim)
        and tensor.data_ptr() % 16 == 0
        and 0 < len(tensor) < 2**31
        and tensor.shape[1:].numel() <= min(step, 2**31 - 1)
        and step * size % 16 == 0
        and step * size < 2**40
        and (tensor.dim() == 2 or tensor.stride(1) == dim)
    )


def describe(tensor: Tensor, rows: int) -> TensorDescriptor:
    """A packed [T, (heads,) dim] tensor as a matrix of T rows, read in tiles of `rows` by dim."""
    columns = tensor.shape[1:].numel()
    return TensorDescriptor(
        tensor, [len(tensor), columns], [tensor.stride(0), 1], [rows, tensor.shape[-1]]
    )


def contiguous(form: Form) -> Form:
    """The same form with every tensor contiguous: kernels find its entries by its shapes alone."""
    tensors = {f.name: getattr(form, f.name) for f in fields(form)}
    tensors = {name: x.contiguous() for name, x in tensors.items() if isinstance(x, Tensor)}
    return replace(form, **tensors)


# -- host: tables ---------------------------------------------------------------------------------
def to_device(table: np.ndarray, device: torch.device) -> Int[Tensor, "..."]:
    """An int32 table on the device, copied; called by what a `device_table` keeps alone."""
    return torch.from_numpy(np.ascontiguousarray(table, dtype=np.int32)).to(device)


def _spread(values: np.ndarray, borders: tuple[int, ...]) -> np.ndarray:
    """values[s] repeated for every member of sequence s."""
    return np.repeat(values, np.diff(np.array(borders, np.int64)))


@device_table
def query_table(sequences: Sequences, block_size: int, device: torch.device) -> Int[Tensor, "3 Tq"]:
    """For each query: the packed index of its own key, its position (R2), its first block's number.

    A key j of the same sequence is visible exactly when j <= the own key.

    >>> query_table(Sequences((0, 2, 3), (0, 5, 6)), 2, torch.device("cpu")).tolist()
    [[3, 4, 5], [3, 4, 0], [0, 0, 3]]
    """
    cu_q, cu_k = (np.array(b, np.int64) for b in (sequences.cu_seqlens_q, sequences.cu_seqlens_k))
    cu_blocks = np.array(sequences.cu_blocks(block_size), np.int64)
    index = np.arange(sequences.total_q)
    own = index + _spread(cu_k[1:] - cu_q[1:], sequences.cu_seqlens_q)
    position = own - _spread(cu_k[:-1], sequences.cu_seqlens_q)
    first_block = _spread(cu_blocks[:-1], sequences.cu_seqlens_q)
    return to_device(np.stack([own, position, first_block]), device)


@device_table
def block_table(
    sequences: Sequences, block_size: int, device: torch.device
) -> Int[Tensor, "2 blocks"]:
    """For each block, all sequences numbered through: its first packed key and its sequence's end.

    >>> block_table(Sequences((0, 2, 3), (0, 5, 6)), 2, torch.device("cpu")).tolist()
    [[0, 2, 4, 5], [5, 5, 5, 6]]
    """
    cu_k = np.array(sequences.cu_seqlens_k, np.int64)
    cu_blocks = sequences.cu_blocks(block_size)
    blocks = np.arange(cu_blocks[-1]) - _spread(np.array(cu_blocks[:-1], np.int64), cu_blocks)
    first_key = _spread(cu_k[:-1], cu_blocks) + blocks * block_size
    return to_device(np.stack([first_key, _spread(cu_k[1:], cu_blocks)]), device)


@device_table
def tile_table(
    sequences: Sequences, tile_size: int, device: torch.device
) -> Int[Tensor, "tiles 5"]:
    """Tiles of neighbouring queries: start, stop, own key of the start, first key, end of keys.

    Tiles start at each sequence's first query, so none holds queries of two sequences.

    >>> tile_table(Sequences((0, 3, 4), (0, 5, 6)), 2, torch.device("cpu")).tolist()
    [[0, 2, 2, 0, 5], [2, 3, 4, 0, 5], [3, 4, 5, 5, 6]]
    """
    rows = []
    for qs, ks in sequences.spans():
        start = np.arange(qs.start, qs.stop, tile_size)
        stop = np.minimum(start + tile_size, qs.stop)
        own = start + (ks.stop - qs.stop)
        ends = np.broadcast_to(np.array([[ks.start, ks.stop]]), (len(start), 2))
        rows.append(np.column_stack([start, stop, own, ends]))
    return to_device(np.concatenate(rows) if rows else np.zeros((0, 5)), device)


# -- kernels: addresses ---------------------------------------------------------------------------
@triton.jit
def along(o_x, stride):
    """How far index o_x lies along a dim of that stride, in 64 bits: a view may reach that far.

    Every product of an index and a stride is this one. Offsets within a tile of a contiguous tensor
    stay in 32 bits.
    """
    return tl.cast(o_x, tl.int64) * stride


# -- kernels: scores as integers ------------------------------------------------------------------
@triton.jit
def score_key(b_score):
    """float32 -> int32 in the same order; NaN becomes -inf (R4), -0 becomes 0."""
    b_score = tl.where(b_score == b_score, b_score, float("-inf")) + 0.0
    b_bits = b_score.to(tl.int32, bitcast=True)
    return b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)


@triton.jit
def key_score(b_key):
    """The way back from `score_key`."""
    return (b_key ^ ((b_key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def threshold_of(b_key, m_valid, b_low, PLACES: tl.constexpr, SLACK: tl.constexpr,
                 AXIS: tl.constexpr):  # fmt: skip
    """A key that the best PLACES valid keys along AXIS reach, and few others; or all valid keys.

    Bisection, counting how many keys reach the middle. Three steps of four halve the distance as
    scores, which is quick on ordinary ones, the fourth halves it as integers, which ends always.
    A row is done when at most PLACES + SLACK keys reach its threshold, or when it is one key, tied.
    Keys that are not valid must be NO_SCORE; b_low, where it starts, is a key that the best PLACES
    reach: the least valid one, or better.
    """
    b_n = tl.sum((m_valid & (b_key >= tl.expand_dims(b_low, AXIS))).to(tl.int32), AXIS)
    b_high = tl.max(b_key, AXIS)
    step = 0
    while tl.max(((b_n > PLACES + SLACK) & (b_low < b_high)).to(tl.int32)) > 0:
        b_mid = (b_low | b_high) - ((b_low ^ b_high) >> 1)  # mean, rounded up, cannot overflow
        if step % 4 != 3:
            b_mid = score_key(0.5 * key_score(b_low) + 0.5 * key_score(b_high))
            b_mid = tl.minimum(tl.maximum(b_mid, b_low + 1), b_high)
        b_reach = tl.sum((b_key >= tl.expand_dims(b_mid, AXIS)).to(tl.int32), AXIS)
        m_open, m_up = (b_n > PLACES + SLACK) & (b_low < b_high), b_reach >= PLACES
        b_n = tl.where(m_open & m_up, b_reach, b_n)
        b_high = tl.where(m_open & ~m_up, b_mid - 1, b_high)
        b_low = tl.where(m_open & m_up, b_mid, b_low)
        step += 1
    return b_low


@triton.jit
def keep_best(b_key, m_valid, b_low, PLACES: tl.constexpr, AXIS: tl.constexpr):
    """Which keys stay: all above the threshold, and of those equal to it the first (R7).

    Returns the mask and each kept key's rank in the order of its place, and how many were kept.
    """
    b_low = tl.expand_dims(b_low, AXIS)
    m_above, m_tied = m_valid & (b_key > b_low), m_valid & (b_key == b_low)
    b_both = tl.cumsum(m_above.to(tl.int32) + (m_tied.to(tl.int32) << ABOVE_BITS), AXIS)
    b_above = tl.sum(m_above.to(tl.int32), AXIS)
    b_room = tl.maximum(PLACES - b_above, 0)
    b_kept = b_above + tl.minimum(tl.sum(m_tied.to(tl.int32), AXIS), b_room)
    b_tied = b_both >> ABOVE_BITS  # at most PLACES + SLACK keys lie above; 19 bits are left
    b_room = tl.expand_dims(b_room, AXIS)
    b_rank = b_both - (b_tied << ABOVE_BITS) + tl.minimum(b_tied, b_room) - 1
    return m_above | (m_tied & (b_tied <= b_room)), b_rank, b_kept


@triton.jit
def store_selection(p_out, m_row, m_keep, b_rank, b_id, b_kept, b_own, TOP_K: tl.constexpr,
                    P: tl.constexpr, SINK: tl.constexpr, LOCAL: tl.constexpr,
                    AXIS: tl.constexpr):  # fmt: skip
    """Write rows of a Selection: first blocks, kept candidates, recent blocks, then -1 (R8).

    Candidates lie between the forced blocks, so this order is ascending. p_out, m_row, b_kept,
    b_own [R]; m_keep, b_rank, b_id with the candidates along AXIS.
    """
    b_first = tl.minimum(b_own + 1, SINK)  # [R] forced first blocks
    b_recent = tl.maximum(b_own - LOCAL + 1, SINK)  # [R] first of the recent blocks
    p_x = tl.expand_dims(p_out + b_first, AXIS) + b_rank
    tl.store(p_x, b_id, mask=m_keep & tl.expand_dims(m_row, AXIS))
    o_k = tl.expand_dims(tl.arange(0, P), 1 - AXIS)
    b_first, b_own = tl.expand_dims(b_first, AXIS), tl.expand_dims(b_own, AXIS)
    b_after = o_k - b_first - tl.expand_dims(b_kept, AXIS)  # >= 0 behind the candidates
    b_last = tl.expand_dims(b_recent, AXIS) + b_after
    b_x = tl.where(o_k < b_first, o_k, tl.where(b_last <= b_own, b_last, -1))
    m_x = (o_k < TOP_K) & ((o_k < b_first) | (b_after >= 0)) & tl.expand_dims(m_row, AXIS)
    tl.store(tl.expand_dims(p_out, AXIS) + o_k, b_x, mask=m_x)


# -- kernels: attention ---------------------------------------------------------------------------
@triton.jit
def load_keys(base, first, stop, stride, o_d, DIM: tl.constexpr, BD: tl.constexpr,
              BN: tl.constexpr):  # fmt: skip
    """Tokens first ... first + BN of one head as [BN, BD]; zeros from `stop` on."""
    o_n = first + tl.arange(0, BN)
    p_x = base + along(o_n, stride)[:, None] + o_d[None, :]
    return tl.load(p_x, mask=(o_n < stop)[:, None] & (o_d < DIM)[None, :], other=0.0)


@triton.jit
def fast_log(x):
    """Natural logarithm off by 2^-22 at most, or as much of itself; 0 becomes -inf."""
    if FAST:
        return libdevice.fast_logf(x)  # one instruction, where tl.log takes about twenty
    else:
        return tl.log(x)


@triton.jit
def edge_rows(query_ids, x, length, G: tl.constexpr, GP: tl.constexpr, BM: tl.constexpr):
    """Rows x ... x + BM of an item, edges times heads padded to GP: query, head, whether real."""
    o_x = x + tl.arange(0, BM)
    m_x = o_x < length
    b_t = tl.load(query_ids + o_x // GP, mask=m_x, other=0).to(tl.int64)
    return b_t, o_x % GP, m_x & (o_x % GP < G)


@triton.jit
def count_bits(b_mask):
    """Number of set bits of each uint32."""
    b_mask = b_mask - ((b_mask >> 1) & 0x55555555)
    b_mask = (b_mask & 0x33333333) + ((b_mask >> 2) & 0x33333333)
    b_mask = (b_mask + (b_mask >> 4)) & 0x0F0F0F0F
    return ((b_mask * 0x01010101) >> 24).to(tl.int32)
