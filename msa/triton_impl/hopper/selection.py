"""Index branch on Hopper: block scores to memory, then a top-k of each row (R4-R8).

    for each super-tile of queries:
        scores, maxima = block scores of its tiles, maxima of 8 of them    # index_scores.py
        selection      = best `places` of each row, and the forced blocks  # block_topk.py

What the fast form changes:
 1. Two kernels with one task each: the first keeps the tensor cores busy all the time, the second
    reads memory. A kernel that does both by turns does neither at full speed.
 2. The scores of a super-tile take SCORE_BYTES at most, whatever the number of queries. One tile
    of 256 rows always fits, however many keys there are.
 3. The copy engine reads the tensors where they lie. Where it cannot (rows that overlap, rows that
    do not start at a multiple of 16 bytes), they are copied first.

Order of the kernels: they run one after another on the current stream. The scores of the next
super-tile overwrite those of this one, after the top-k of this one has read them.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from msa.config import MSAConfig
from msa.ir import Array, Selection, Sequences
from msa.triton_impl.hopper.block_topk import select_scores
from msa.triton_impl.hopper.index_scores import score_segments
from msa.triton_impl.hopper.plan import PIECE, ROWS, SCORE_BYTES, plan_scores
from msa.triton_impl.launch import can_describe
from msa.triton_impl.paged_keys import IndexPages
from msa.triton_impl.places import on_its_device
from msa.triton_impl.quantize import to_fp8


def as_matrix(x: Float[Tensor, "*shape dim"]) -> Float[Tensor, "rows dim"]:
    """The same numbers as rows that the copy engine can read; copied only where it cannot."""
    rows = x.detach().reshape(-1, x.shape[-1])
    if can_describe(rows, rows.shape[1]):
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


@on_its_device
def select_on_hopper(
    q_idx: Float[Array, "Tq Hkv Di"], k_idx: Float[Array, "*where Di"], sequences: Sequences,
    config: MSAConfig, index_dtype: str | None = None, score_bytes: int = SCORE_BYTES,
    pages: IndexPages | None = None, out: Int[Tensor, "Tq Hkv k"] | None = None,
) -> Selection:  # fmt: skip
    """`select_fused` by the kernels of this package, for arguments that `msa.kernel_choice` takes.

    Args:
        k_idx: with `pages` [pages, Bk, Di], of the dtype of q_idx, with a `page_matrix`.
        index_dtype: see `triton_impl.select_fused`; for packed index keys.
        out: contiguous memory for the ids; None makes it.
        score_bytes: bound on the memory of the scores; queries are taken in super-tiles below it.
    """
    n_q, groups, dim = q_idx.shape
    scale = config.index_scale_for(dim)
    if index_dtype is not None:
        q_idx, k_idx = to_fp8(q_idx, k_idx)
    if out is None:
        out = torch.empty((n_q, groups, config.top_k), dtype=torch.int32, device=q_idx.device)
    token_bytes = dim * k_idx.dtype.itemsize
    plan = plan_scores(sequences, config, groups, token_bytes, score_bytes, q_idx.device)
    most = max((part.blocks for part in plan.parts), default=0) // PIECE
    any_long = any(part.long for part in plan.parts)
    scores = torch.empty((most, ROWS, PIECE), dtype=torch.float32, device=out.device)
    room = torch.empty((most, ROWS), dtype=torch.float32, device=out.device) if any_long else None
    queries, keys = as_matrix(q_idx), k_idx if pages is not None else as_matrix(k_idx)
    for part in plan.parts:
        maxima = room if part.long else None
        if part.blocks:
            runs = plan.runs[part.first_run : part.first_run + plan.programs + 1]
            score_segments(
                queries, keys, plan.segments, runs, scores, maxima, groups, config.block_size,
                config.local_blocks, scale, pages,
            )  # fmt: skip
        select_scores(scores, maxima, plan, part, config, out)
    return Selection(out, sequences, config.block_size)
