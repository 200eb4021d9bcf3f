"""Prefill over a paged cache: many queries of each sequence, keys and values in pages (R2).

    selection = select(q_idx, pages of index keys)     # selection.py
    out, lse  = attend(q, pages of k and v, selection) # attention.py: union, kv_outer, or both

These are the kernels of `attend`, which find each block of keys through the page table
(`paged_keys.py`). Nothing is gathered, and the memory beside the results is that of `attend`. Only
keys and values of 8 bits are written once more, in 16 bits, where queries are many
(`wide_pages.py`); `msa.kernel_choice.widens` decides this.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from msa.config import MSAConfig
from msa.ir import Output, PagedKV, Selection, Sequences
from msa.kernel_choice import Kernels, call_of, choose, obstacle, walk_call_of, widens
from msa.triton_impl.attention import LoopOrder, attend_super_tiles, paged_call
from msa.triton_impl.launch import require_kernels
from msa.triton_impl.paged_keys import IndexPages, Pages, page_matrix
from msa.triton_impl.places import on_its_device
from msa.triton_impl.quantize import to_fp8
from msa.triton_impl.selection import select_portable
from msa.triton_impl.wide_pages import widen_pages, with_queries


@on_its_device
@torch.no_grad()
def prefill_chunk(
    q: Float[Tensor, "Tq Hq D"], q_idx: Float[Tensor, "Tq Hkv Di"],
    cache: PagedKV, sequences: Sequences, config: MSAConfig, loop_order: LoopOrder = "auto",
    index_dtype: str | None = None, kernels: Kernels = "auto",
) -> Output:  # fmt: skip
    """MSA for the last tokens of each cached sequence (R2), which the cache holds already.

    Not recorded by autograd. Nothing here reads the device: `sequences` says the lengths, and the
    kernels read the table.

    Args:
        loop_order: as in `attend`.
        index_dtype: "fp8_e4m3" rounds q_idx to 8 bits, for index keys of 8 bits.
        kernels: as in `attend`.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came (R20).
    """
    require_kernels(config.block_size, config.top_k, q=q, q_idx=q_idx)
    q, q_idx = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, q_idx))
    selection = select_pages(q_idx, cache, sequences, config, index_dtype, kernels)
    scale = config.softmax_scale_for(q.shape[-1])
    out, lse = attend_pages(q, cache, selection, scale, loop_order, kernels)
    return Output(out, lse, selection)


def attend_pages(
    q: Float[Tensor, "Tq Hq D"], cache: PagedKV, selection: Selection, scale: float,
    loop_order: LoopOrder = "auto", kernels: Kernels = "auto",
    out: Float[Tensor, "Tq Hq Dv"] | None = None,
) -> tuple[Float[Tensor, "Tq Hq Dv"], Float[Tensor, "Tq Hq"]]:  # fmt: skip
    """Out and lse of attention over selected blocks of a cache, which is widened where that pays.

    The walk runs on the kernels that are named where it can. `out` is contiguous memory for the
    output; None makes it.
    """
    k, v, sequences = cache.k_pages, cache.v_pages, with_queries(selection.sequences)
    pages = Pages(cache.page_table, cache.k_scales, cache.v_scales)
    selection = replace(selection, indices=selection.indices.contiguous())
    if widens(q, k, v, sequences, kernels):
        k, v, pages = widen_pages(k, v, pages, selection, q.dtype)
    call = paged_call(walk_call_of(q, k, v, selection, scale, loop_order), k, v, pages)
    if kernels == "hopper" and obstacle(call) is not None:
        kernels = "portable"
    return attend_super_tiles(q, k, v, selection, scale, loop_order, kernels, pages, out)


def select_pages(
    q_idx: Float[Tensor, "Tq Hkv Di"], cache: PagedKV, sequences: Sequences, config: MSAConfig,
    index_dtype: str | None = None, kernels: Kernels = "auto",
) -> Selection:  # fmt: skip
    """The selected blocks, straight from index queries and pages of index keys (R4-R8)."""
    keys, pages = cache.k_idx_pages, IndexPages(cache.page_table, cache.k_idx_scales)
    readable = not len(keys) or page_matrix(keys) is not None  # without pages nothing is read
    call = replace(call_of(q_idx, keys, config), readable=readable)
    if index_dtype is not None:  # then both are of 8 bits
        call = replace(call, k_dtype=call.q_dtype)
    chosen = choose(kernels, call)
    if index_dtype is not None:
        q_idx, _ = to_fp8(q_idx, q_idx[:0])
    if chosen == "hopper" and len(keys):
        # imported here, because older releases of triton have no Gluon
        from msa.triton_impl.hopper.selection import select_on_hopper

        return select_on_hopper(q_idx, keys, sequences, config, pages=pages)
    return select_portable(q_idx, keys, sequences, config, pages=pages)
