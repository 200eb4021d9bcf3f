"""Index branch on Hopper: block scores to memory, then a top-k of each row (R4-R8).

    for each super-tile of queries:
        scores, maxima = block scores of its tiles, maxima of 8 of them    # index_scores.py
        selection      = best `places` of each row, and the forced blocks  # block_topk.py

What the fast form changes:
 1. Two kernels, each with one work: the first keeps the tensor cores busy all the time, the second
    reads memory. A kernel that does both by turns does neither at full speed.
 2. The scores of a super-tile take SCORE_BYTES at most, whatever the number of queries.
 3. 8-bit index tensors come out of three launches (`quantize.py`).

Who waits for whom: kernels run one after another on one stream. The scores of the next super-tile
overwrite those of this one, after this one's top-k has read them.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from msa.config import MSAConfig
from msa.ir import Array, Selection, Sequences
from msa.triton_impl.hopper.block_topk import select_scores
from msa.triton_impl.hopper.index_scores import KINDS, score_segments
from msa.triton_impl.hopper.plan import PIECE, ROWS, SCORE_BYTES, plan_scores
from msa.triton_impl.hopper.quantize import to_fp8_pair
from msa.triton_impl.places import on_its_device
from msa.triton_impl.tiles import can_describe, require_kernels

__all__ = ["require_hopper", "select_fused"]

DIMS = (64, 128)
"""Index dims for which the kernels have been measured."""

MOST_PLACES = 64
"""Blocks of a row that are not forced, at most: as many scores stay in registers of a thread."""

BLOCK_SIZES = (64, 128)
"""Block sizes whose products fit into the registers of a consumer."""


def require_hopper(
    q_idx: Float[Tensor, "Tq Hkv Di"], k_idx: Float[Tensor, "Tk Di"], config: MSAConfig
) -> None:
    """What these kernels ask for beyond what the portable ones do.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came (R20).
    """
    require_kernels(config.block_size, config.top_k, q_idx=q_idx, k_idx=k_idx)
    portable = "use kernels='portable'"
    for name, tensor in (("q_idx", q_idx), ("k_idx", k_idx)):
        if tensor.dtype not in KINDS:
            raise TypeError(
                f"{name} must have dtype bfloat16 or float16 for kernels='hopper', "
                f"got {tensor.dtype}: {portable}"
            )
    if q_idx.dtype != k_idx.dtype:
        raise TypeError(
            f"k_idx must have dtype {q_idx.dtype} as q_idx has for kernels='hopper', "
            f"got {k_idx.dtype}: {portable}"
        )
    for name, value, wanted in (
        ("index dim", q_idx.shape[2], DIMS),
        ("block_size", config.block_size, BLOCK_SIZES),
    ):
        if value not in wanted:
            raise ValueError(
                f"{name} must be {wanted[0]} or {wanted[1]} for kernels='hopper', got {value}: "
                f"{portable}"
            )
    for name, value, most in (
        ("the number of groups", q_idx.shape[1], ROWS),
        ("top_k less the forced blocks", config.top_k - config.forced_blocks, MOST_PLACES),
    ):
        if value > most:
            raise ValueError(
                f"{name} must be at most {most} for kernels='hopper', got {value}: {portable}"
            )
    capability = torch.cuda.get_device_capability(q_idx.device) if q_idx.is_cuda else None
    if capability != (9, 0):
        got = f"{q_idx.device}" + (f" of {capability[0]}.{capability[1]}" if capability else "")
        raise ValueError(
            "kernels='hopper' must be given tensors on a GPU of compute capability 9.0, "
            f"got {got}: {portable}"
        )


def as_matrix(x: Float[Tensor, "*shape dim"]) -> Float[Tensor, "rows dim"]:
    """The same numbers as rows that the copy engine can read; copied only where it cannot."""
    rows = x.reshape(-1, x.shape[-1])
    return (
        rows
        if can_describe(rows, rows.shape[1])
        else rows.clone(memory_format=torch.contiguous_format)
    )


@on_its_device
def select_fused(
    q_idx: Float[Array, "Tq Hkv Di"],
    k_idx: Float[Array, "Tk Di"],
    sequences: Sequences,
    config: MSAConfig,
    index_dtype: str | None = None,
    score_bytes: int = SCORE_BYTES,
) -> Selection:
    """The selected blocks from index queries and keys, as `triton_impl.selection` finds them.

    Args:
        index_dtype: None keeps the tensors as they are; "fp8_e4m3" rounds both to 8 bits (see
            `msa.triton_impl.quantize`): faster, and no longer the same function.
        score_bytes: bound on the memory of the scores; queries are taken in super-tiles below it.
    """
    require_hopper(q_idx, k_idx, config)
    n_q, groups, dim = q_idx.shape
    scale = config.index_scale_for(dim)
    if index_dtype is not None:
        q_idx, k_idx = to_fp8_pair(q_idx, k_idx)
    out = torch.empty((n_q, groups, config.top_k), dtype=torch.int32, device=q_idx.device)
    token_bytes = dim * k_idx.dtype.itemsize
    plan = plan_scores(sequences, config, groups, token_bytes, score_bytes, q_idx.device)
    most = max((part.blocks for part in plan.parts), default=0) // PIECE
    scores = torch.empty((most, ROWS, PIECE), dtype=torch.float32, device=q_idx.device)
    any_long = any(part.long for part in plan.parts)
    room = torch.empty((most, ROWS), dtype=torch.float32, device=out.device) if any_long else None
    queries, keys = as_matrix(q_idx), as_matrix(k_idx)
    for part in plan.parts:
        maxima = room if part.long else None
        if part.blocks:
            runs = plan.runs[part.first_run : part.first_run + plan.programs + 1]
            score_segments(queries, keys, plan.segments, runs, scores, maxima, groups,
                           config.block_size, config.local_blocks, scale)  # fmt: skip
        select_scores(scores, maxima, plan, part, config, out)
    return Selection(out, sequences, config.block_size)
