"""Lowering, fourth arrow: weigh the partial results by their LSE and add up (R16).

    for each query and head:
        LSE = logsumexp over its slots s of lse[s]
        out = sum over s of exp(lse[s] - LSE) * out[s]

What the fast form changes:
 1. The time is that of reading memory: each partial is read once, and a program has up to 16 heads
    of one query, which lie side by side.
 2. Slots beyond the query's count are not read: they may hold anything.
 3. Where a walk along unions has done the other blocks, its result lies in out already, and is one
    more slot. A query without other slots is finished, and nothing of it is read.
 4. A slot has two numbers in place of its LSE: the highest score and the sum beside it.
    `slot_weight` says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from msa.ir import Output, Partials
from msa.triton_impl.launch import contiguous, pad, require_top_k
from msa.triton_impl.places import on_its_device
from msa.triton_impl.tile_verbs import LN2, LOG2E, LOWEST, load_tile, slot_weight, store_tile
from msa.triton_impl.tuning import EVERY_LAUNCH


@dataclass(frozen=True)
class Slots:
    """Partials before the logarithm: the LSE of a slot is scale * top + log(total).

    The heads of a group lie side by side, so each edge has one run of memory.
    """

    out: Float[Tensor, "Tq Hkv k G Dv"]
    top: Float[Tensor, "Tq Hkv k G"]
    """The highest score, not scaled."""
    total: Float[Tensor, "Tq Hkv k G"]
    """The sum of exp(scale * (score - top))."""
    counts: Int[Tensor, "Tq Hkv"]
    """Slots in use; the others hold anything."""


def empty_slots(
    q: Float[Tensor, "Tq Hq D"], groups: int, top_k: int, dim_v: int,
    counts: Int[Tensor, "Tq Hkv"],
) -> Slots:  # fmt: skip
    """Slots for the outputs of these queries, in their dtype; nothing is written to them."""
    shape = len(q), groups, top_k, q.shape[1] // groups
    out = torch.empty((*shape, dim_v), dtype=q.dtype, device=q.device)
    top, total = (torch.empty(shape, dtype=torch.float32, device=q.device) for _ in range(2))
    return Slots(out, top, total, counts)


@triton.jit
def combine_kernel(parts, tops, totals, counts, walk_tops, walk_totals, out, lse, scale,
                   HKV: tl.constexpr, G: tl.constexpr, TOP_K: tl.constexpr, P: tl.constexpr,
                   DIM_V: tl.constexpr, BDV: tl.constexpr, BH: tl.constexpr,
                   WALKED: tl.constexpr):  # fmt: skip
    """BH heads of one group of one query.

    Parameters:
        parts: [Tq, Hkv, k, G, Dv], 16-bit or float32; partial outputs
        tops: [Tq, Hkv, k, G], float32; the highest score of each slot, not scaled
        totals: [Tq, Hkv, k, G], float32; each slot's sum of exp2(scale * (score - top))
        counts: [Tq, Hkv], int32; slots in use
        walk_tops, walk_totals: [Tq, Hq], float32; the same of what lies in out, read with WALKED
        out: [Tq, Hq, Dv], 16-bit or float32; written, with WALKED read before, and written only for
            queries that have slots
        lse: [Tq, Hq], float32, natural logarithm; written as out
        scale: float; softmax scale times log2(e)
        HKV, G: groups, query heads of a group
        TOP_K, P: k, and rounded up to a power of two
        DIM_V, BDV: Dv, and rounded up to a power of two
        BH: heads of one program
        WALKED: bool; out has the attention to other blocks, which is one more slot
    """
    i_t, i_r = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_x = i_t * HKV + i_r
    o_g = tl.program_id(2) * BH + tl.arange(0, BH)
    m_g = o_g < G
    o_x = i_x * G + o_g  # [BH] row of out
    o_s, o_d = tl.arange(0, P), tl.arange(0, BDV)
    count = tl.load(counts + i_x)
    if (count == 0) & WALKED:  # the walk has done all blocks
        return
    m_s = m_g[:, None] & (o_s < count)[None, :]
    p_s = (i_x * TOP_K + o_s)[None, :] * G + o_g[:, None]
    b_tops = tl.load(tops + p_s, mask=m_s, other=LOWEST)
    b_totals = tl.load(totals + p_s, mask=m_s, other=0.0)
    b_most = tl.maximum(tl.max(b_tops, 1), LOWEST)  # [BH]
    if WALKED:
        b_top = tl.load(walk_tops + o_x, mask=m_g, other=LOWEST)
        b_total = tl.load(walk_totals + o_x, mask=m_g, other=0.0)
        b_most = tl.maximum(b_most, b_top)
    b_sum = tl.sum(slot_weight(b_tops, b_totals, b_most[:, None], scale), 1)
    b_out = tl.zeros([BH, BDV], tl.float32)
    if WALKED:
        b_w = slot_weight(b_top, b_total, b_most, scale)
        b_sum += b_w
        b_x = load_tile(out + o_x * DIM_V, m_g & (b_total != 0.0), o_d, DIM_V)
        b_out += b_w[:, None] * b_x.to(tl.float32)
    for i_s in range(0, count):
        p_x = (i_x * TOP_K + i_s) * G + o_g
        b_w = slot_weight(tl.load(tops + p_x, mask=m_g, other=LOWEST),
                          tl.load(totals + p_x, mask=m_g, other=0.0), b_most, scale)  # fmt: skip
        b_x = load_tile(parts + p_x * DIM_V, m_g, o_d, DIM_V)  # [BH, BDV]
        b_out += b_w[:, None] * b_x.to(tl.float32)
    store_tile(out + o_x * DIM_V, m_g, o_d, b_out / b_sum[:, None], DIM_V)
    tl.store(lse + o_x, b_most * (scale * LN2) + tl.log(b_sum), mask=m_g)


def weigh_slots(
    slots: Slots, softmax_scale: float, into: Output, walked: tuple[Tensor, Tensor] | None = None
) -> Output:
    """Write the combination of contiguous slots to `into`, whose tensors are contiguous too.

    walked: the top and the total, [Tq, Hq], of the attention to other blocks that `into` holds; it
    is one more slot. None: `into` holds nothing yet.
    """
    n_q, groups, top_k, group, dim_v = slots.out.shape
    some = min(pad(group, 1), 16)
    if n_q:
        combine_kernel[n_q, groups, triton.cdiv(group, some)](
            slots.out, slots.top, slots.total, slots.counts, *(walked or (into.lse, into.lse)),
            into.out, into.lse, softmax_scale * LOG2E.value, HKV=groups, G=group, TOP_K=top_k,
            P=pad(top_k, 1), DIM_V=dim_v, BDV=pad(dim_v, 1), BH=some, WALKED=walked is not None,
            num_warps=4 if some * dim_v >= 1024 else 1, **EVERY_LAUNCH,
        )  # fmt: skip
    return into


def split_lse(partials: Partials) -> Slots:
    """Slots with a scale of 1: the LSE rounded to float32, and what the rounding left over."""
    top = partials.lse.float()
    rest = torch.where(top.isfinite(), partials.lse - top, 0.0)
    groups = partials.counts.shape[1]
    out, top, total = (
        x.unflatten(1, (groups, x.shape[1] // groups)).transpose(2, 3).contiguous()
        for x in (partials.out, top, rest.exp().float())
    )
    return Slots(out, top, total, partials.counts)


@on_its_device
def combine_partials(partials: Partials, dtype: Any = None) -> Output:
    """The LSE-weighted mean of the slots (R16); out in `dtype`, by default that of the partials."""
    partials = contiguous(partials)
    n_q, heads, top_k, dim_v = partials.out.shape
    require_top_k(top_k)
    device = partials.out.device
    out = torch.empty((n_q, heads, dim_v), dtype=dtype or partials.out.dtype, device=device)
    lse = torch.empty((n_q, heads), dtype=torch.float32, device=device)
    return weigh_slots(split_lse(partials), 1.0, Output(out, lse))
