"""Lowering, fourth arrow: weigh the partial results by their LSE and add up (R16).

    for each query and head:
        LSE = logsumexp over its slots s of lse[s]
        out = sum over s of exp(lse[s] - LSE) * out[s]

What the fast form changes:
 1. The time is that of reading memory: each partial is read once, and a program has up to 16 heads
    of one query, which lie side by side.
 2. Slots beyond the query's count are not read: they may hold anything.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from msa.ir import Output, Partials
from msa.triton_impl.launch import contiguous, pad, require_top_k
from msa.triton_impl.places import on_its_device
from msa.triton_impl.tile_verbs import load_tile, store_tile


@triton.jit
def combine_kernel(parts, lses, counts, out, lse, HQ: tl.constexpr, HKV: tl.constexpr,
                   G: tl.constexpr, TOP_K: tl.constexpr, P: tl.constexpr, DIM_V: tl.constexpr,
                   BDV: tl.constexpr, BH: tl.constexpr):  # fmt: skip
    """BH heads of one group of one query.

    Parameters:
        parts: [Tq, Hq, k, Dv], 16-bit or float32; partial outputs
        lses: [Tq, Hq, k], float32, natural logarithms
        counts: [Tq, Hkv], int32; slots in use
        out: [Tq, Hq, Dv], 16-bit or float32; written
        lse: [Tq, Hq], float32, natural logarithm; written
        HQ, HKV, G: query heads, groups, query heads of a group
        TOP_K, P: k, and rounded up to a power of two
        DIM_V, BDV: Dv, and rounded up to a power of two
        BH: heads of one program
    """
    i_t, i_r = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_g = tl.program_id(2) * BH + tl.arange(0, BH)
    m_g = o_g < G
    o_x = i_t * HQ + i_r * G + o_g  # [BH]
    o_s, o_d = tl.arange(0, P), tl.arange(0, BDV)
    count = tl.load(counts + i_t * HKV + i_r)
    m_s = m_g[:, None] & (o_s < count)[None, :]
    b_lse = tl.load(lses + o_x[:, None] * TOP_K + o_s[None, :], mask=m_s, other=float("-inf"))
    b_top = tl.max(b_lse, 1)  # [BH]
    b_top = tl.where(b_top == float("-inf"), 0.0, b_top)
    b_sum = tl.sum(tl.exp(b_lse - b_top[:, None]), 1)
    b_out = tl.zeros([BH, BDV], tl.float32)
    for i_s in range(0, count):
        p_lse = lses + o_x * TOP_K + i_s
        b_w = tl.exp(tl.load(p_lse, mask=m_g, other=float("-inf")) - b_top)
        b_x = load_tile(parts + (o_x * TOP_K + i_s) * DIM_V, m_g, o_d, DIM_V)  # [BH, BDV]
        b_out += b_w[:, None] * b_x.to(tl.float32)
    store_tile(out + o_x * DIM_V, m_g, o_d, b_out / b_sum[:, None], DIM_V)
    tl.store(lse + o_x, b_top + tl.log(b_sum), mask=m_g)


@on_its_device
def combine_partials(partials: Partials, dtype: Any = None, into: Output | None = None) -> Output:
    """The LSE-weighted mean of the slots (R16); out in `dtype` (None: the partials'), lse float32.

    Args:
        into: write to these contiguous tensors instead of new ones.
    """
    partials = contiguous(partials)
    n_q, heads, top_k, dim_v = partials.out.shape
    require_top_k(top_k)
    device, groups = partials.out.device, partials.counts.shape[1]
    group = heads // groups
    if into is None:
        out = torch.empty((n_q, heads, dim_v), dtype=dtype or partials.out.dtype, device=device)
        into = Output(out, torch.empty((n_q, heads), dtype=torch.float32, device=device))
    some = min(pad(group, 1), 16)
    if n_q:
        combine_kernel[n_q, groups, triton.cdiv(group, some)](
            partials.out, partials.lse, partials.counts, into.out, into.lse, HQ=heads, HKV=groups,
            G=group, TOP_K=top_k, P=pad(top_k, 1), DIM_V=dim_v, BDV=pad(dim_v, 1), BH=some,
            num_warps=4 if some * dim_v >= 1024 else 1,
        )  # fmt: skip
    return into
