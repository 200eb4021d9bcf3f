"""Decoding: few new queries of each sequence over a paged cache (R2), in two launches.

    scores = score_pages(q_idx, cache)              # of every block that is not forced, by one of
                                                    # two kernels (`msa.kernel_choice`)
    out, lse, ids = attend_pages(q, cache, scores)  # select, attend to what was selected

No shape depends on a length, and nothing is read back to the host, so both can be captured in a
CUDA graph; `decode_step` reads the lengths only to assign the selection to the live sequences.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from msa import kernel_choice
from msa.config import MSAConfig
from msa.ir import Output, PagedKV, Selection
from msa.triton_impl.launch import require_kernels
from msa.triton_impl.page_attention import attend_pages, head_tile
from msa.triton_impl.page_scores import score_pages
from msa.triton_impl.paged_keys import page_matrix
from msa.triton_impl.places import on_its_device


@on_its_device
@torch.no_grad()
def decode_step(
    q: Float[Tensor, "B n Hq D"], q_idx: Float[Tensor, "B n Hkv Di"] | None,
    cache: PagedKV, config: MSAConfig, ids: Int[Tensor, "B n Hkv k"] | None = None,
    kernels: kernel_choice.Kernels = "auto",
) -> Output:  # fmt: skip
    """MSA for the last n tokens of each cached sequence (R2), which the cache holds already.

    The blocks are those of `ids`, or they are selected by q_idx. Not recorded by autograd.
    While a CUDA graph is captured the selection is None: which sequences are live is not known
    before the graph is replayed.

    Returns:
        out [B, n, Hq, Dv] in q's dtype, lse float32 [B, n, Hq]: zeros and -inf for a sequence of
        length 0; the selection of the live sequences, packed.
    """
    q, n = q if q.stride(-1) == 1 else q.contiguous(), q.shape[1]
    arrivals, scores, given = counters(q, cache.k_pages.shape[2]), None, None
    if ids is None:
        assert q_idx is not None
        require_kernels(config.block_size, config.top_k, q=q, q_idx=q_idx)
        q_idx = q_idx if q_idx.stride(-1) == 1 else q_idx.contiguous()
        chosen = kernel_choice.choose(kernels, score_call(q_idx, cache))
        scores = score_step(q_idx, cache, config, arrivals, chosen)
    else:
        require_kernels(config.block_size, ids.shape[-1], q=q)
        given, arrivals = ids.contiguous(), arrivals.zero_()
    out, lse, ids = attend_pages(q, cache, config, scores, arrivals, given=given)
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        return Output(out, lse)
    live, sequences = cache.live(n)
    return Output(out, lse, Selection(ids[live].flatten(0, 1), sequences, config.block_size))


def score_call(q_idx: Float[Tensor, "B n Hkv Di"], cache: PagedKV) -> kernel_choice.PageCall:
    """What the choice of the kernel for the scores depends on."""
    readable = not len(cache.k_idx_pages) or page_matrix(cache.k_idx_pages) is not None
    return replace(kernel_choice.page_call_of(q_idx, cache), readable=readable)


def score_step(
    q_idx: Float[Tensor, "B n Hkv Di"], cache: PagedKV, config: MSAConfig,
    arrivals: Int[Tensor, "B programs"], kernels: str, rows: Int[Tensor, " B"] | None = None,
) -> Float[Tensor, "B n Hkv width"]:  # fmt: skip
    """The scores of blocks by the kernel that was chosen, "portable" or "hopper"."""
    if kernels == "hopper" and len(cache.k_idx_pages):  # without pages nothing is scored
        # imported here, because older releases of triton have no Gluon
        from msa.triton_impl.hopper.page_scores import score_pages_on_hopper

        return score_pages_on_hopper(q_idx, cache, config, arrivals, rows=rows)
    return score_pages(q_idx, cache, config, arrivals, rows=rows)


def counters(q: Float[Tensor, "B n Hq D"], groups: int) -> Int[Tensor, "B programs"]:
    """Counters of the programs that have arrived, for each row and each tile of its heads."""
    batch, n, heads, _ = q.shape
    tiles = -(-(heads // groups) // head_tile(heads // groups))
    return torch.empty((batch, n * groups * tiles), dtype=torch.int32, device=q.device)
