"""Compile the Gluon kernels for compute capability 9.0 without a GPU; print facts as JSON.

A program of its own, because the tests' process runs Triton's interpreter where there is no GPU.
"""

from __future__ import annotations

import json
import os
import re
import sys

import torch
import triton
import triton.language as tl
from triton.runtime.driver import driver

from benchmarks.compile_target import Driver, assembled
from msa.chips import FAMILIES
from msa.triton_impl.hopper import (
    block_topk,
    index_loss,
    index_scores,
    key_gradients,
    page_scores,
    partials,
    query_gradients,
    union_walk,
)
from msa.triton_impl.hopper.plan import PIECE, ROWS
from msa.triton_impl.launch import pad
from msa.triton_impl.tuning import EVERY_LAUNCH


def compile_scores(dtype, dim, block_size, groups, long, paged=False, scaled=False):
    dtype = getattr(torch, dtype)
    queries, keys = (torch.zeros(4096, dim).to(dtype) for _ in range(2))
    table, scores = torch.zeros(64, dtype=torch.int32), torch.zeros(256)
    return index_scores.block_scores_kernel.warmup(
        index_scores.describe(queries, ROWS // 2), index_scores.describe(keys, block_size), table,
        table, scores, scores, table, scores, 0.1, *[48 * paged] * 5, HKV=groups, BK=block_size,
        LOCAL=1, LONG=long, PIECE=PIECE, PAGED=paged, SCALED=scaled, num_warps=4, grid=(1,),
        **index_scores.options(dtype, dim, block_size),
    )  # fmt: skip


def compile_topk(places, long):
    table, scores, warps = torch.zeros(64, dtype=torch.int32), torch.zeros(256), block_topk.WARPS
    return block_topk.pick_kernel.warmup(
        scores, scores, table, table, table, HKV=4, BK=128, TOP_K=places + 1, SINK=0, LOCAL=1,
        PLACES=places, LONG=long, LOG=pad(places).bit_length() - 1, ROWS=ROWS, PIECE=PIECE,
        WARPS=warps, num_warps=warps, grid=(1,),
    )  # fmt: skip


def compile_walk(dtype, group, apart, paged=False, scaled=False):
    q, k = (torch.zeros(64, heads, 128, dtype=getattr(torch, dtype)) for heads in (4 * group, 4))
    table, floats = torch.zeros(64, dtype=torch.int32), torch.zeros(256)
    keys = union_walk.describe(k)
    return union_walk.hopper_walk_kernel.warmup(
        q, keys, keys, table, table, table, table, q, floats, floats, floats, table, table, floats,
        0.1, 0.125, 640, 20, 8192, 128, *[129 * paged] * 8, G=group, HKV=4, HEADS=pad(group, 8),
        APART=apart, PAGED=paged, SCALED=scaled, grid=(1,), **union_walk.OPTIONS,
    )  # fmt: skip


def compile_chunks(dtype, group, paged=False, scaled=False):
    q, k = (torch.zeros(64, heads, 128, dtype=getattr(torch, dtype)) for heads in (4 * group, 4))
    table, longs, floats = (
        torch.zeros(64, dtype=dtype) for dtype in (torch.int32, torch.int64, torch.float32)
    )
    keys = union_walk.describe(k)
    return partials.hopper_chunk_kernel.warmup(
        partials.describe_queries(q, group), keys, keys, partials.describe_rows(q[0], group), table,
        longs, longs, table, table, table, table, table, floats, floats, table, table, floats, 0.1,
        640, 20, 8192, *[129 * paged] * 8, G=group, HKV=4, TOP_K=16, PAGED=paged, SCALED=scaled,
        grid=(1,), **partials.OPTIONS,
    )  # fmt: skip


def compile_keys(dtype, group):
    q, k = (torch.zeros(64, heads, 128, dtype=getattr(torch, dtype)) for heads in (4 * group, 4))
    rows, keys = key_gradients.describe_rows(q, group), key_gradients.describe_keys(k)
    floats = torch.zeros(256)
    table, longs = (torch.zeros(64, dtype=kind) for kind in (torch.int32, torch.int64))
    return key_gradients.hopper_key_gradients_kernel.warmup(
        rows, keys, keys, rows, floats, floats, table, longs, longs, longs, table, table, floats,
        floats, 0.1, -8.0, 64, 640, G=group, HKV=4, POS=key_gradients.ROWS // group, grid=(1,),
        **key_gradients.OPTIONS,
    )  # fmt: skip


def compile_query_gradients(dtype, group):
    q, k = (torch.zeros(64, heads, 128, dtype=getattr(torch, dtype)) for heads in (4 * group, 4))
    table, floats = torch.zeros(64, dtype=torch.int32), torch.zeros(256)
    keys, rows = union_walk.describe(k), query_gradients.describe_rows(q, group)
    return query_gradients.hopper_query_gradients_kernel.warmup(
        rows, keys, keys, rows, q, q, floats, floats, table, table, table, table, q, floats, 0.1,
        0.1, 640, 20, G=group, HKV=4, HEADS=pad(group, 8), grid=(1,), **query_gradients.OPTIONS,
    )  # fmt: skip


def compile_sum(fuse):
    """The smallest kernel with a product and a sum; None: launched as all kernels are."""
    parts, out = torch.zeros(256), torch.zeros(16)
    stated = EVERY_LAUNCH if fuse is None else EVERY_LAUNCH | {"enable_fp_fusion": fuse}
    return weighted_sum_kernel.warmup(parts, parts, out, N=16, grid=(1,), **stated)


@triton.jit
def weighted_sum_kernel(x, weights, out, N: tl.constexpr):
    """out = x * weights + out."""
    o_x = tl.arange(0, N)
    tl.store(out + o_x, tl.load(x + o_x) * tl.load(weights + o_x) + tl.load(out + o_x))


def compile_pages(dtype, q_dtype, dim, block_size, rows, named=False):
    dtype, q_dtype = getattr(torch, dtype), getattr(torch, q_dtype)
    q, pages = torch.zeros(2, 1, rows, dim).to(q_dtype), torch.zeros(4, block_size, dim).to(dtype)
    table, floats = torch.zeros(64, dtype=torch.int32), torch.zeros(256)
    keys, page_rows = page_scores.describe(pages)
    return page_scores.hopper_page_scores_kernel.warmup(
        q, keys, table, table, table, floats, floats, table, 0.1, 2, 4, 64, page_rows,
        *q.stride()[:3], 32, 1, 1, 1, N=1, HKV=rows, BK=block_size, SINK=0,
        LOCAL=1, NAMED=named, launch_pdl=True, grid=(1,),
        **page_scores.options(dtype, q_dtype, rows, dim, block_size),
    )  # fmt: skip


def compile_loss(dtype, group, with_top, with_gradient):
    dtype, table, floats = (
        getattr(torch, dtype),
        torch.zeros(64, dtype=torch.int32),
        torch.zeros(256),
    )
    q, k = torch.zeros(64 * 4 * group, 128, dtype=dtype), torch.zeros(256, 4 * 128, dtype=dtype)
    q_idx, edges = torch.zeros(64, 4, 128, dtype=dtype), table.long()
    return index_loss.hopper_loss_kernel.warmup(
        index_loss.describe(q, group, 64), index_loss.describe(k, 128, 128),
        index_loss.describe(k[:, :128].contiguous(), 128, 64), q_idx, floats, floats, floats,
        floats, table, edges, edges, table, table, table, table, table, floats, floats, floats, 0.1,
        0.1, 100, 20, 640, 512, 128, G=group, HKV=4, TOP=with_top, TOP_K=16, GRADIENT=with_gradient,
        STAGES=index_loss.stages_of(group, with_top), grid=(1,), **index_loss.OPTIONS,
    )  # fmt: skip


def facts(kernel):
    """What the assembler says about a kernel, and its PTX."""
    ptx = kernel.asm["ptx"]
    says = assembled(ptx)
    return {
        "says": says,
        "registers": int(re.search(r"Used (\d+) registers", says)[1]),
        "spilled": sum(map(int, re.findall(r"(\d+) bytes spill", says))),
        "threads": int(re.search(r"\.reqntid (\d+)", ptx)[1]),
        "shared": kernel.metadata.shared,
        "fused": ptx.count("fma.rn.f32"),
        "constants": re.findall(r"e4m3x2\.f32\s+%rs\d+, (%r\d+), \1;", ptx),  # twice the same
        "steps": re.findall(
            r"ldmatrix|wgmma\.mma_async|mbarrier\.arrive(?!\.expect)|bar\.sync|shfl", ptx
        ),
    }


if __name__ == "__main__":
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as every launch states it
    driver.set_active(Driver(FAMILIES["9.0"]))
    makers = {
        "scores": compile_scores, "topk": compile_topk, "walk": compile_walk, "keys": compile_keys,
        "queries": compile_query_gradients, "pages": compile_pages, "loss": compile_loss,
        "sum": compile_sum, "chunks": compile_chunks,
    }  # fmt: skip
    print(json.dumps([facts(makers[what](*options)) for what, *options in json.loads(sys.argv[1])]))
