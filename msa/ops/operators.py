"""torch.ops.msa.*: for each operator its schema, its shapes without data, and its gradient.

All tensors are packed (R1); the queries of decode are batched, those of prefill either. Borders of
sequences and sizes are integers, so that they are part of a graph and no operator reads them from
the device. (decode and prefill read the cache.) The number of outputs is fixed:

    select_blocks      -> indices                     no gradient (R18)
    sparse_attention   -> out, lse                    backward: sparse_attention_backward
    attention          -> out, lse, indices           backward: the same
    align_index        -> kl, d_q_idx, d_k_idx        backward: the two, scaled
    decode             -> out, lse                    no gradient
    prefill            -> out, lse                    no gradient

lse is float32, or float64 where q is.

>>> import torch
>>> q_idx, k_idx = torch.ones(6, 1, 1), torch.tensor([[0.0], [9], [1], [2], [3], [4]])
>>> torch.ops.msa.select_blocks(q_idx, k_idx, [0, 6], [0, 6], 2, 2)[5]
tensor([[0, 2]], dtype=torch.int32)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from msa.autograd import differentiable_once
from msa.config import MSAConfig
from msa.ir import PagedKV
from msa.ops import kernels


def lse_dtype(q: Tensor) -> torch.dtype:
    """float64 for float64 inputs, else float32 (R10)."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


# -- the index branch -----------------------------------------------------------------------------
@custom_op("msa::select_blocks", mutates_args=())
def select_blocks(
    q_idx: Tensor, k_idx: Tensor, cu_seqlens_q: Sequence[int], cu_seqlens_k: Sequence[int],
    block_size: int, top_k: int, sink_blocks: int = 0, local_blocks: int = 1,
    index_scale: float | None = None,
) -> Tensor:  # fmt: skip
    """The blocks that each query and group reads: int32 [Tq, Hkv, k] (R4-R8)."""
    config = MSAConfig(block_size, top_k, sink_blocks, local_blocks, index_scale=index_scale)
    return kernels.select(q_idx, k_idx, (cu_seqlens_q, cu_seqlens_k), config)


@select_blocks.register_fake
def _(q_idx: Tensor, k_idx: Tensor, cu_q: Any, cu_k: Any, block_size: int, top_k: int, *_: Any,
      **__: Any) -> Tensor:  # fmt: skip
    return q_idx.new_empty((*q_idx.shape[:2], top_k), dtype=torch.int32)


def _no_gradient(ctx: Any, d_indices: Tensor) -> tuple[None, ...]:
    return (None,) * 9


select_blocks.register_autograd(_no_gradient)


# -- the main branch ------------------------------------------------------------------------------
@custom_op("msa::sparse_attention", mutates_args=())
def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, cu_seqlens_q: Sequence[int],
    cu_seqlens_k: Sequence[int], block_size: int, softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention over blocks that were chosen before; the indices are validated (R8-R10)."""
    config = MSAConfig(block_size, indices.shape[-1], softmax_scale=softmax_scale)
    return kernels.attend_selection(q, k, v, indices, (cu_seqlens_q, cu_seqlens_k), config)


@sparse_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    out = q.new_empty((*q.shape[:2], v.shape[-1]))
    return out, q.new_empty(q.shape[:2], dtype=lse_dtype(q))


@custom_op("msa::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, q_idx: Tensor, k_idx: Tensor, cu_seqlens_q: Sequence[int],
    cu_seqlens_k: Sequence[int], block_size: int, top_k: int, sink_blocks: int = 0,
    local_blocks: int = 1, softmax_scale: float | None = None, index_scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Select, then attend (R4-R12)."""
    config = MSAConfig(block_size, top_k, sink_blocks, local_blocks, softmax_scale, index_scale)
    arrays = {"q": q, "k": k, "v": v, "q_idx": q_idx, "k_idx": k_idx}
    return kernels.attend(arrays, (cu_seqlens_q, cu_seqlens_k), config)


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, q_idx: Tensor, k_idx: Tensor, cu_q: Any, cu_k: Any,
      block_size: int, top_k: int, *_: Any, **__: Any) -> tuple[Tensor, ...]:  # fmt: skip
    out = q.new_empty((*q.shape[:2], v.shape[-1]))
    lse = q.new_empty(q.shape[:2], dtype=lse_dtype(q))
    return out, lse, q.new_empty((*q_idx.shape[:2], top_k), dtype=torch.int32)


@custom_op("msa::sparse_attention_backward", mutates_args=())
def sparse_attention_backward(
    d_out: Tensor, d_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    indices: Tensor, cu_seqlens_q: Sequence[int], cu_seqlens_k: Sequence[int], block_size: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients for q, k and v from the results of either attention (R18)."""
    saved, borders = (q, k, v, out, lse), (cu_seqlens_q, cu_seqlens_k)
    args = (d_out, d_lse, saved, indices, borders, block_size, softmax_scale)
    return kernels.selection_gradients(*args)


@sparse_attention_backward.register_fake
def _(d_out: Tensor, d_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any
      ) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _keep_sparse(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, indices, cu_q, cu_k, block_size, scale = inputs
    _keep(ctx, (q, k, v), output[:2], indices, (cu_q, cu_k, block_size), scale)
    ctx.inputs = len(inputs)


def _keep_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, _, _, cu_q, cu_k, block_size, _, _, _, scale, _ = inputs
    _keep(ctx, (q, k, v), output[:2], output[2], (cu_q, cu_k, block_size), scale)
    ctx.inputs = len(inputs)


def _keep(
    ctx: Any, qkv: tuple[Tensor, ...], output: tuple[Tensor, ...], indices: Tensor,
    sizes: tuple[Any, ...], scale: float | None,
) -> None:  # fmt: skip
    ctx.save_for_backward(*qkv, *output, indices)
    ctx.sizes, ctx.scale = sizes, scale if scale is not None else qkv[0].shape[-1] ** -0.5


def _attention_gradients(ctx: Any, d_out: Tensor, d_lse: Tensor, *_: Any) -> tuple[Any, ...]:
    *saved, indices = ctx.saved_tensors
    grads = torch.ops.msa.sparse_attention_backward(
        d_out, d_lse, *saved, indices, *ctx.sizes, ctx.scale
    )
    return *grads, *([None] * (ctx.inputs - 3))


sparse_attention.register_autograd(_attention_gradients, setup_context=_keep_sparse)
attention.register_autograd(_attention_gradients, setup_context=_keep_attention)


# -- training the index ---------------------------------------------------------------------------
@custom_op("msa::align_index", mutates_args=())
def align_index(
    q: Tensor, k: Tensor, q_idx: Tensor, k_idx: Tensor, indices: Tensor | None, lse: Tensor | None,
    cu_seqlens_q: Sequence[int], cu_seqlens_k: Sequence[int], block_size: int, with_gradient: bool,
    softmax_scale: float | None = None, index_scale: float | None = None, validate: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss and, with_gradient, its gradients for q_idx and k_idx; else empty tensors (R17).

    indices=None is the warm-up form. Other indices are validated (R8), unless validate is False,
    which is for those that `attention` gave.
    """
    top_k = 1 if indices is None else indices.shape[-1]
    config = MSAConfig(block_size, top_k, softmax_scale=softmax_scale, index_scale=index_scale)
    tensors = {"q": q, "k": k, "q_idx": q_idx, "k_idx": k_idx}
    borders = cu_seqlens_q, cu_seqlens_k
    return kernels.align(tensors, indices, lse, borders, config, with_gradient, validate)


@align_index.register_fake
def _(q: Tensor, k: Tensor, q_idx: Tensor, k_idx: Tensor, indices: Any, lse: Any, cu_q: Any,
      cu_k: Any, block_size: int, with_gradient: bool, *_: Any, **__: Any
      ) -> tuple[Tensor, ...]:  # fmt: skip
    wide = torch.float64 in (q.dtype, q_idx.dtype)
    dtype = torch.float64 if wide else torch.float32
    shapes = (q_idx.shape, k_idx.shape) if with_gradient else ((0,), (0,))
    return q.new_empty((), dtype=dtype), *(q.new_empty(shape, dtype=dtype) for shape in shapes)


def _keep_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, d_q_idx, d_k_idx = output
    ctx.save_for_backward(d_q_idx, d_k_idx)
    ctx.mark_non_differentiable(d_q_idx, d_k_idx)
    ctx.dtypes = inputs[2].dtype, inputs[3].dtype
    ctx.with_gradient, ctx.inputs = inputs[9], len(inputs)


@differentiable_once
def _scale_gradients(ctx: Any, d_loss: Tensor, *_: Any) -> tuple[Any, ...]:
    check_with_gradient(ctx.with_gradient)
    d_q_idx, d_k_idx = ((x * d_loss).to(t) for x, t in zip(ctx.saved_tensors, ctx.dtypes))
    return None, None, d_q_idx, d_k_idx, *([None] * (ctx.inputs - 4))


def check_with_gradient(with_gradient: bool) -> None:
    """Check that the operator of the loss found the gradient that is now asked for (R20)."""
    if not with_gradient:
        raise ValueError(
            "with_gradient must be True where q_idx or k_idx requires a gradient, got False"
        )


align_index.register_autograd(_scale_gradients, setup_context=_keep_loss)


# -- decoding -------------------------------------------------------------------------------------
@custom_op("msa::decode", mutates_args=())
def decode(
    q: Tensor, q_idx: Tensor, k_pages: Tensor, v_pages: Tensor, k_idx_pages: Tensor,
    page_table: Tensor, lengths: Tensor, top_k: int, sink_blocks: int = 0, local_blocks: int = 1,
    softmax_scale: float | None = None, index_scale: float | None = None,
    k_scales: Tensor | None = None, v_scales: Tensor | None = None,
    k_idx_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """MSA for the last n tokens of each cached sequence: [B, n, Hq, Dv] and [B, n, Hq] (R2)."""
    cache = PagedKV(
        k_pages, v_pages, k_idx_pages, page_table, lengths, k_scales, v_scales, k_idx_scales
    )
    block_size = k_pages.shape[1]
    config = MSAConfig(block_size, top_k, sink_blocks, local_blocks, softmax_scale, index_scale)
    return kernels.decode_step(q, q_idx, cache, config)


@decode.register_fake
def _(q: Tensor, q_idx: Tensor, k_pages: Tensor, v_pages: Tensor, *_: Any, **__: Any
      ) -> tuple[Tensor, Tensor]:  # fmt: skip
    out = q.new_empty((*q.shape[:3], v_pages.shape[-1]))
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


@custom_op("msa::prefill", mutates_args=())
def prefill(
    q: Tensor, q_idx: Tensor, k_pages: Tensor, v_pages: Tensor, k_idx_pages: Tensor,
    page_table: Tensor, lengths: Tensor, cu_seqlens_q: Sequence[int] | None, top_k: int,
    sink_blocks: int = 0, local_blocks: int = 1, softmax_scale: float | None = None,
    index_scale: float | None = None, k_scales: Tensor | None = None,
    v_scales: Tensor | None = None, k_idx_scales: Tensor | None = None,
    index_dtype: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """MSA for new tokens of each sequence of a paged cache: out and lse in q's layout (R2)."""
    cache = PagedKV(
        k_pages, v_pages, k_idx_pages, page_table, lengths, k_scales, v_scales, k_idx_scales
    )
    block_size = k_pages.shape[1]
    config = MSAConfig(block_size, top_k, sink_blocks, local_blocks, softmax_scale, index_scale)
    return kernels.prefill_tokens(q, q_idx, cache, cu_seqlens_q, config, index_dtype)


@prefill.register_fake
def _(q: Tensor, q_idx: Tensor, k_pages: Tensor, v_pages: Tensor, *_: Any, **__: Any
      ) -> tuple[Tensor, Tensor]:  # fmt: skip
    out = q.new_empty((*q.shape[:-1], v_pages.shape[-1]))
    return out, q.new_empty(q.shape[:-1], dtype=torch.float32)
