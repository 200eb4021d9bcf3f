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
    q: Float[Tensor, "B n Hq D"], q_idx: Float[Tensor, "B n Hkv Di"],
    cache: PagedKV, config: MSAConfig, kernels: kernel_choice.Kernels = "auto",
) -> Output:  # fmt: skip
    """MSA for the last n tokens of each cached sequence (R2), which the cache holds already.

    Not recorded by autograd. While a CUDA graph is captured the selection is None: which sequences
    are live is not known before the graph is replayed.

    Returns:
        out [B, n, Hq, Dv] in q's dtype, lse float32 [B, n, Hq]: zeros and -inf for a sequence of
        length 0; the selection of the live sequences, packed.
    """
    require_kernels(config.block_size, config.top_k, q=q, q_idx=q_idx)
    q, q_idx = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, q_idx))
    n, arrivals = q.shape[1], counters(q, q_idx.shape[2])
    some = len(cache.k_idx_pages) > 0  # without pages nothing is scored
    readable = not some or page_matrix(cache.k_idx_pages) is not None
    call = replace(kernel_choice.page_call_of(q_idx, cache), readable=readable)
    if kernel_choice.choose(kernels, call) == "hopper" and some:
        from msa.triton_impl.hopper.page_scores import score_pages_on_hopper

        scores = score_pages_on_hopper(q_idx, cache, config, arrivals)
    else:
        scores = score_pages(q_idx, cache, config, arrivals)
    out, lse, ids = attend_pages(q, cache, config, scores, arrivals)
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        return Output(out, lse)
    live, sequences = cache.live(n)
    return Output(out, lse, Selection(ids[live].flatten(0, 1), sequences, config.block_size))


def counters(q: Float[Tensor, "B n Hq D"], groups: int) -> Int[Tensor, "B programs"]:
    """Counters of the programs that have arrived, for each row and each tile of its heads."""
    batch, n, heads, _ = q.shape
    tiles = -(-(heads // groups) // head_tile(heads // groups))
    return torch.empty((batch, n * groups * tiles), dtype=torch.int32, device=q.device)
