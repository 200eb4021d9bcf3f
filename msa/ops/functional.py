"""The functions of `msa.ops`: they have the layouts of `msa.attention`, and each calls an operator.

Tensors are packed [T, H, D] with cu_seqlens, packed without (one sequence), or batched
[B, T, H, D]. cu_seqlens are integers. (A tensor of them is read, which waits for its device and is
not possible under `torch.compile`.) Where autocast is on, tensors are cast as for a matrix product.

>>> import torch, msa, msa.ops
>>> q, q_idx, k_idx = torch.randn(100, 4, 16), torch.randn(100, 2, 8), torch.randn(100, 8)
>>> k, v = torch.randn(100, 2, 16), torch.randn(100, 2, 16, requires_grad=True)
>>> config = msa.MSAConfig(block_size=16, top_k=3)
>>> compiled = torch.compile(msa.ops.attention, fullgraph=True, backend="aot_eager")
>>> out, lse, indices, kl = compiled(q, k, v, q_idx, k_idx, config=config)
>>> out.shape, lse.shape, indices.shape, kl
(torch.Size([100, 4, 16]), torch.Size([100, 4]), torch.Size([100, 2, 3]), None)
>>> bool((out == msa.attention(q, k, v, q_idx, k_idx, config=config).out).all())
True
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from msa import checks
from msa.config import MSAConfig
from msa.ir import PagedKV
from msa.ops import operators
from msa.ops.arguments import (
    Borders,
    Given,
    check_indices,
    check_step,
    enter,
    is_traced,
    traced_borders,
)


class Attended(NamedTuple):
    """The results of `attention`."""

    out: Tensor
    """[*q, Hq, Dv] in q's layout and dtype (that of autocast, where it is on)."""
    lse: Tensor
    """[*q, Hq], natural logarithm; float32, or float64 for float64 inputs (R10)."""
    indices: Tensor
    """int32 [Tq, Hkv, k], packed, canonical (R8)."""
    kl: Tensor | None
    """The alignment loss with align=True, else None (R17)."""


def attention(
    q: Tensor, k: Tensor, v: Tensor, q_idx: Tensor, k_idx: Tensor, cu_seqlens_q: Given = None,
    cu_seqlens_k: Given = None, config: MSAConfig = MSAConfig(), align: bool = False,
) -> Attended:  # fmt: skip
    """MSA (R4-R12), differentiable in q, k and v; with align=True its loss in q_idx and k_idx.

    Args:
        q, k, v, q_idx, k_idx: as in `msa.attention`.
        cu_seqlens_q, cu_seqlens_k: borders of packed sequences, integers (R1).
        config: block size, blocks kept, forced blocks, scales.
        align: also give kl (R17).

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came (R20).
    """
    checks.check_type("config", config, MSAConfig)
    checks.check_flag("align", align)
    tensors = {"q": q, "k": k, "v": v, "q_idx": q_idx, "k_idx": k_idx}
    packed, borders = enter(tensors, cu_seqlens_q, cu_seqlens_k)
    lead, (q, k, v, q_idx, k_idx) = q.shape[:-2], packed
    fixed = q_idx.detach(), k_idx.detach()  # the selection has no gradient (R18)
    out, lse, indices = operators.attention(
        q, k, v, *fixed, *borders, config.block_size, config.top_k, config.sink_blocks,
        config.local_blocks, config.softmax_scale, config.index_scale,
    )  # fmt: skip
    kl = None
    if align:
        of_loss = q, k, q_idx, k_idx
        kl = _loss(of_loss, indices, lse.detach(), borders, config, validate=False)
    return Attended(out.unflatten(0, lead), lse.unflatten(0, lead), indices, kl)


def select_blocks(
    q_idx: Tensor, k_idx: Tensor, cu_seqlens_q: Given = None, cu_seqlens_k: Given = None,
    config: MSAConfig = MSAConfig(),
) -> Tensor:  # fmt: skip
    """The blocks that each query and group would read: int32 [Tq, Hkv, k], packed (R4-R8).

    >>> q_idx, k_idx = torch.ones(6, 1, 1), torch.tensor([[0.0], [9], [1], [2], [3], [4]])
    >>> select_blocks(q_idx, k_idx, config=msa.MSAConfig(block_size=2, top_k=2))[5]
    tensor([[0, 2]], dtype=torch.int32)
    """
    checks.check_type("config", config, MSAConfig)
    packed, borders = enter({"q_idx": q_idx, "k_idx": k_idx}, cu_seqlens_q, cu_seqlens_k)
    return operators.select_blocks(
        *packed, *borders, config.block_size, config.top_k,
        config.sink_blocks, config.local_blocks, config.index_scale,
    )  # fmt: skip


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, cu_seqlens_q: Given = None,
    cu_seqlens_k: Given = None, *, block_size: int = 128, softmax_scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention over blocks of your own choice: out and lse in q's layout (R9-R12).

    The indices, int32 [Tq, Hkv, k], are validated when it runs (R8). While a CUDA graph is captured
    they are not, because that would read them.

    >>> x = torch.arange(4.0).view(4, 1, 1)
    >>> own = torch.tensor([0, 0, 1, 1], dtype=torch.int32).view(4, 1, 1)
    >>> sparse_attention(torch.zeros(4, 1, 1), x, x, own, block_size=2)[0].flatten()
    tensor([0.0000, 0.5000, 2.0000, 2.5000])
    """
    packed, borders = enter({"q": q, "k": k, "v": v}, cu_seqlens_q, cu_seqlens_k)
    check_indices(indices, borders, block_size)
    lead = q.shape[:-2]
    out, lse = operators.sparse_attention(*packed, indices, *borders, block_size, softmax_scale)
    return out.unflatten(0, lead), lse.unflatten(0, lead)


def align_index(
    q: Tensor, k: Tensor, q_idx: Tensor, k_idx: Tensor, indices: Tensor | None = None,
    cu_seqlens_q: Given = None, cu_seqlens_k: Given = None, *, lse: Tensor | None = None,
    config: MSAConfig = MSAConfig(),
) -> Tensor:  # fmt: skip
    """KL(main branch || index branch), a scalar; its gradient reaches q_idx and k_idx (R17).

    indices=None is the warm-up form, over all visible tokens. lse is that of an attention over the
    same tokens; without it, it is computed. A second derivative is refused.

    >>> x = torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1)
    >>> round(align_index(x, x, x, 0 * x[:, 0]).item(), 4)
    0.4744
    """
    checks.check_type("config", config, MSAConfig)
    tensors = {"q": q, "k": k, "q_idx": q_idx, "k_idx": k_idx}
    if lse is not None:
        tensors["lse"] = lse
    packed, borders = enter(tensors, cu_seqlens_q, cu_seqlens_k)
    if indices is not None:
        check_indices(indices, borders, config.block_size)
    known = None if lse is None else packed[4].detach()
    return _loss(packed[:4], indices, known, borders, config, validate=True)


@torch.no_grad()
def decode(
    q: Tensor, q_idx: Tensor, cache: PagedKV, config: MSAConfig = MSAConfig()
) -> tuple[Tensor, Tensor]:
    """MSA for the last n tokens of each sequence of a paged cache: out and lse (R2).

    Arguments and rules are those of `msa.decode`; nothing is recorded for gradients. The selection
    is not given, because its shape depends on how many sequences are not empty.

    >>> pages = torch.arange(8.0).view(4, 2, 1, 1)  # four pages of two tokens
    >>> table, lengths = torch.tensor([[3, 0], [2, 0]]), torch.tensor([3, 0])
    >>> cache = msa.PagedKV(pages, pages, pages[..., 0], table, lengths)
    >>> zero = torch.zeros(2, 1, 1, 1)  # tokens 6, 7 and 0 lie in pages 3 and 0
    >>> decode(zero, zero, cache, msa.MSAConfig(block_size=2, top_k=2))[0].flatten()
    tensor([4.3333, 0.0000])
    """
    check_step(q, q_idx, cache, config)
    return operators.decode(
        q, q_idx, cache.k_pages, cache.v_pages, cache.k_idx_pages, cache.page_table, cache.lengths,
        config.top_k, config.sink_blocks, config.local_blocks, config.softmax_scale,
        config.index_scale, cache.k_scales, cache.v_scales, cache.k_idx_scales,
    )  # fmt: skip


@torch.no_grad()
def prefill(
    q: Tensor, q_idx: Tensor, cache: PagedKV, cu_seqlens_q: Given = None,
    config: MSAConfig = MSAConfig(), *, index_dtype: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """MSA for many new tokens of each sequence of a paged cache: out and lse in q's layout (R2).

    Arguments and rules are those of `msa.prefill`; nothing is recorded for gradients. The lengths
    of the cache are read when it runs.

    >>> pages = torch.arange(8.0).view(4, 2, 1, 1)  # four pages of two tokens
    >>> table, lengths = torch.tensor([[3, 0], [2, 0]]), torch.tensor([3, 1])
    >>> cache = msa.PagedKV(pages, pages, pages[..., 0], table, lengths)
    >>> zero, config = torch.zeros(3, 1, 1), msa.MSAConfig(block_size=2, top_k=2)
    >>> prefill(zero, zero, cache, (0, 2, 3), config)[0].flatten()
    tensor([6.5000, 4.3333, 4.0000])
    """
    check_step(q, q_idx, cache, config)
    borders = cu_seqlens_q
    if borders is not None:
        traced = is_traced(q, q_idx, cache.k_pages)
        read = (
            traced_borders(borders, 0, 0)
            if traced
            else checks.read_borders("cu_seqlens_q", borders)
        )
        borders = list(read)
    return operators.prefill(
        q, q_idx, cache.k_pages, cache.v_pages, cache.k_idx_pages, cache.page_table, cache.lengths,
        borders, config.top_k, config.sink_blocks, config.local_blocks, config.softmax_scale,
        config.index_scale, cache.k_scales, cache.v_scales, cache.k_idx_scales, index_dtype,
    )  # fmt: skip


def _loss(
    tensors: Sequence[Tensor], indices: Tensor | None, lse: Tensor | None,
    borders: Borders, config: MSAConfig, validate: bool,
) -> Tensor:  # fmt: skip
    q, k, q_idx, k_idx = tensors
    with_gradient = torch.is_grad_enabled() and (q_idx.requires_grad or k_idx.requires_grad)
    return operators.align_index(
        q.detach(), k.detach(), q_idx, k_idx, indices, lse, *borders, config.block_size,
        with_gradient, config.softmax_scale, config.index_scale, validate,
    )[0]  # fmt: skip
