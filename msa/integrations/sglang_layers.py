"""SGLang's two functions of sparse attention, by the kernels of this project (see `sglang.py`).

SGLang keeps slots of tokens, and for each request the slot of each of its tokens. With pages of
128 tokens the slots of a block lie one after another. So the slot of its first token names a block:

    decode     table = every 128th column of req_to_token; rows = the requests' row numbers. K
               [slots, Hkv, D] is also pages [slots, 128, Hkv, D] that overlap, one at each slot.
               Nothing is gathered, and a captured graph stays right.
    prefill    table = the pages of the requests, gathered once for a step; all layers share it.

Few new tokens of every request, such as drafts that are verified, take the way of a decode.
"""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from msa import serving
from msa.config import MSAConfig
from msa.integrations.engine_checks import check_gpu, refuse, warm_up_once

PAGE = 128
MOST_ROWS = 32
"""New tokens of a request times groups, up to which it takes the way of a decode."""
stop = partial(refuse, "SGLang")


# -- what is refused ------------------------------------------------------------------------------
def check_call(
    q: Tensor, k_cache: Tensor, idx_q: Tensor, *, sinks: tuple[Any, ...], page_size: int,
    block_size: int, local_blocks: int, score_type: str, disable_index_value: bool,
    others: dict[str, Any],
) -> None:  # fmt: skip
    """These kernels can serve a call.

    Raises:
        RuntimeError: they cannot; the message says why.
    """
    check_gpu("SGLang")
    if any(x is not None for x in sinks):
        stop("attention sinks must be off")
    if page_size != PAGE or block_size != PAGE:
        stop(f"--page-size and the block size must be {PAGE}, got {page_size} and {block_size}")
    if score_type != "max":
        stop(f"score_type must be 'max', got {score_type!r}")
    if local_blocks < 1:
        stop(f"local_blocks must be at least 1, got {local_blocks}")
    if not disable_index_value:
        stop("index values must be disabled in each sparse layer")
    if idx_q.shape[1] != k_cache.shape[1]:
        stop(f"index heads must be as many as KV heads, {k_cache.shape[1]} on this rank, "
             f"got {idx_q.shape[1]}")  # fmt: skip
    if q.dtype.itemsize == 1:
        stop("attention products in 8 bits (--fp8-attn-gemm) must be off")
    for name, value in others.items():
        if value is not None:
            stop(f"{name} must be off")


def config_of(
    dim: int, topk: int, init_blocks: int, local_blocks: int, sm_scale: float | None,
    q_scale: float | None, k_scale: float | None,
) -> MSAConfig:  # fmt: skip
    """The configuration of a call; scales of the logits are in its softmax scale."""
    scale = (dim**-0.5 if sm_scale is None else sm_scale) * (q_scale or 1.0) * (k_scale or 1.0)
    return MSAConfig(PAGE, topk, sink_blocks=init_blocks, local_blocks=local_blocks,
                     softmax_scale=scale, index_scale=1.0)  # fmt: skip


def times(out: Tensor, v_scale: float | None) -> Tensor:
    """The output times the scale of the values."""
    return out if v_scale is None or v_scale == 1.0 else out.mul_(v_scale)


# -- slots and pages ------------------------------------------------------------------------------
def pages_of(slots: Tensor) -> Tensor:
    """Slots [n * 128, ...] as pages [n, 128, ...]; page p begins at slot 128 p."""
    return slots[: len(slots) // PAGE * PAGE].unflatten(0, (-1, PAGE))


def pages_by_slot(slots: Tensor) -> Tensor:
    """Slots [n, ...] as overlapping pages [n - 127, 128, ...]; a page has the number of a slot."""
    step, *rest = slots.stride()
    shape = len(slots) - PAGE + 1, PAGE, *slots.shape[1:]
    return slots.as_strided(shape, (step, step, *rest))


def columns(req_to_token: Tensor, longest: int) -> Tensor:
    """The slots of the first tokens of blocks, for requests of up to `longest` tokens."""
    return req_to_token[:, : max(longest, 1) : PAGE]


# -- decode ---------------------------------------------------------------------------------------
def decode(
    original: Any, q: Tensor, sink: Any, k_cache: Tensor, v_cache: Tensor, idx_q: Tensor,
    idx_sink: Any, idx_k_cache: Tensor, idx_v_cache: Any, req_to_token: Tensor, slot_ids: Tensor,
    seq_lens: Tensor, max_seqlen: int, block_size_q: int, block_size_k: int, topk: int,
    init_blocks: int, local_blocks: int, sm_scale: float | None = None,
    idx_sm_scale: float | None = None, score_type: str = "max", disable_index_value: bool = False,
    dense_main_attn_fn: Any = None, page_size: int = 1, use_msa: bool = False,
    msa_kv_indices: Any = None, msa_plan: Any = None, q_scale: float | None = None,
    k_scale: float | None = None, v_scale: float | None = None, idx_q_scale: float | None = None,
    idx_k_scale: float | None = None, idx_v_scale: float | None = None,
    cached_topk_idx: Tensor | None = None, topk_out: Tensor | None = None,
    hisparse_swap_in_fn: Any = None, indexer_cp: Any = None, packed_queries: int = 1,
) -> tuple[None, Tensor]:  # fmt: skip
    """SGLang's minimax_sparse_decode: one new token for each row of the batch."""
    check_call(
        q, k_cache, idx_q, sinks=(sink, idx_sink), page_size=page_size, block_size=block_size_k,
        local_blocks=local_blocks, score_type=score_type, disable_index_value=disable_index_value,
        others={"HiSparse": hisparse_swap_in_fn, "context parallel indexing": indexer_cp,
                "dense attention over selected pages": dense_main_attn_fn},
    )  # fmt: skip
    config = config_of(q.shape[-1], topk, init_blocks, local_blocks, sm_scale, q_scale, k_scale)
    table = columns(req_to_token, min(max_seqlen, req_to_token.shape[1]))
    part = serving.DecodePart(table, seq_lens, 1, slot_ids)
    out, ids = step(q, k_cache, v_cache, idx_q, idx_k_cache, part, config, cached_topk_idx)
    if topk_out is not None:
        topk_out.copy_(ids.transpose(0, 1))
    return None, times(out, v_scale)


def step(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, idx_q: Tensor, idx_k_cache: Tensor,
    part: serving.DecodePart, config: MSAConfig, known: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [T, Hq, D] and ids [T, Hkv, k] of n tokens of each request; known: ids [Hkv, T, k]."""
    lead = len(part.lengths), part.n
    queries = q.view(*lead, *q.shape[1:])
    pages = serving.KVPages(pages_by_slot(k_cache), pages_by_slot(v_cache))
    if known is not None:
        ids = known.transpose(0, 1).reshape(*lead, *known.shape[::2])
        return serving.attend_given(queries, pages, part, config, ids).flatten(0, 1), ids.flatten(
            0, 1
        )
    keys = serving.IndexPages(pages_by_slot(idx_k_cache[:, 0]))
    scores = serving.score(idx_q.view(*lead, *idx_q.shape[1:]), keys, part, config, q.shape[1])
    out, ids = serving.attend_scored(queries, pages, part, config, scores)
    return out.flatten(0, 1), ids.flatten(0, 1)


# -- prefill --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Plan:
    """The part of the last step that was a prefill; SGLang gives all its layers one cu_seqlens."""

    key: weakref.ref[Tensor]
    version: int
    """How often cu_seqlens had been written to."""
    part: serving.PrefillPart


LAST: list[Plan] = []


def plan(
    req_to_token: Tensor, slot_ids: Tensor, cu_seqlens: Tensor, seq_lens: Tensor, new: list[int],
    longest: int, seq_lens_cpu: Tensor | None,
) -> serving.PrefillPart:  # fmt: skip
    """The part of this step, made by its first layer."""
    if LAST and LAST[0].key() is cu_seqlens and LAST[0].version == cu_seqlens._version:
        return LAST[0].part
    if seq_lens.is_cuda and torch.cuda.is_current_stream_capturing():
        stop("prefills of different lengths must not be captured in a CUDA graph")
    borders = [0]
    for n in new:
        borders.append(borders[-1] + n)
    bounds = [longest] * len(new) if seq_lens_cpu is None else seq_lens_cpu.tolist()
    table = columns(req_to_token, longest)[slot_ids] // PAGE
    part = serving.PrefillPart.of(table, seq_lens, borders, bounds)
    LAST[:] = [Plan(weakref.ref(cu_seqlens), cu_seqlens._version, part)]
    return part


def prefill(
    original: Any, q: Tensor, k_cache: Tensor, v_cache: Tensor, sink: Any, idx_q: Tensor,
    idx_k_cache: Tensor, idx_v_cache: Any, idx_sink: Any, req_to_token: Tensor, slot_ids: Tensor,
    cu_seqlens: Tensor, seq_lens: Tensor, prefix_lens: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, block_size_q: int, block_size_k: int, topk: int, init_blocks: int,
    local_blocks: int, sm_scale: float | None = None, idx_sm_scale: float | None = None,
    score_type: str = "max", disable_index_value: bool = False, use_msa: bool = False,
    cu_seqblocks_q: Any = None, max_seqblock_q: Any = None, all_seqblock_q: Any = None,
    seqlens_cpu: list[int] | None = None, q_scale: float | None = None,
    k_scale: float | None = None, v_scale: float | None = None, idx_q_scale: float | None = None,
    idx_k_scale: float | None = None, idx_v_scale: float | None = None,
    cached_topk_idx: Tensor | None = None, return_topk_idx: bool = False, loc_mapping: Any = None,
    page_size: int = 1, seq_lens_cpu: Tensor | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """SGLang's minimax_sparse_prefill: any number of new tokens of each request."""
    check_call(
        q, k_cache, idx_q, sinks=(sink, idx_sink), page_size=page_size, block_size=block_size_k,
        local_blocks=local_blocks, score_type=score_type, disable_index_value=disable_index_value,
        others={"HiSparse": loc_mapping},
    )  # fmt: skip
    config = config_of(q.shape[-1], topk, init_blocks, local_blocks, sm_scale, q_scale, k_scale)
    batch, tokens = len(slot_ids), len(q)
    new = seqlens_cpu
    if new is None:  # a captured graph has as many new tokens of every request
        if tokens != batch * max_seqlen_q:
            stop("seqlens_cpu must be given for requests with different numbers of new tokens")
        new = [max_seqlen_q] * batch
    if batch and min(new) == max(new) and new[0] * k_cache.shape[1] <= MOST_ROWS:
        table = columns(req_to_token, min(max_seqlen_k, req_to_token.shape[1]))
        part = serving.DecodePart(table, seq_lens, new[0], slot_ids)
        out, ids = step(q, k_cache, v_cache, idx_q, idx_k_cache, part, config, cached_topk_idx)
    else:
        part = plan(req_to_token, slot_ids, cu_seqlens, seq_lens, new, max_seqlen_k, seq_lens_cpu)
        pages = serving.KVPages(pages_of(k_cache), pages_of(v_cache))
        keys = serving.IndexPages(pages_of(idx_k_cache[:, 0]))
        warm_up_once(
            (q.device, k_cache.dtype, k_cache.stride(), idx_k_cache.stride()),
            lambda: serving.warm_up_layer(
                pages, keys, part.table, q.shape[1], config, (q.dtype, idx_q.dtype)
            ),
            logging.getLogger("sglang").info,
        )
        if cached_topk_idx is None:
            chosen = serving.select(idx_q, keys, part, config)
        else:
            chosen = serving.given(cached_topk_idx.transpose(0, 1), part, config)
        ids = chosen.indices
        out = serving.attend_selected(q, pages, part, chosen, config.softmax_scale_for(q.shape[-1]))
    found = None, times(out, v_scale)
    return (*found, ids.transpose(0, 1)) if return_topk_idx else found
