"""The whole path: select, then attend tile by tile, with gradients (eq. 8, R9-R12, R18)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from msa.autograd import differentiable_once
from msa.config import MSAConfig
from msa.ir import Output, Selection, Sequences
from msa.torch_impl.alignment import align_index
from msa.torch_impl.combine import weigh_slots
from msa.torch_impl.gradients import selection_gradients
from msa.torch_impl.item_batches import edges_per_item
from msa.torch_impl.numerics import working_dtype
from msa.torch_impl.partials import fill_slots, slot_buffers
from msa.torch_impl.scheduled_tiles import (
    queries_in_cache,
    queries_per_tile,
    schedule_tiles,
    trimmed,
)
from msa.torch_impl.selection import select_fused


def attend(
    q: Float[Tensor, "Tq Hq D"], k: Float[Tensor, "Tk Hkv D"], v: Float[Tensor, "Tk Hkv Dv"],
    q_idx: Float[Tensor, "Tq Hkv Di"], k_idx: Float[Tensor, "Tk Di"],
    sequences: Sequences, config: MSAConfig, align: bool = False,
) -> Output:  # fmt: skip
    """Select, then attend: MSA itself (eq. 6-8, R4-R12). Differentiable in q, k and v (R18).

    Returns:
        out [Tq, Hq, Dv] in q's dtype, lse float32 [Tq, Hq], the selection that was used, and with
        align=True the alignment loss, differentiable in q_idx and k_idx (R17).

    >>> x = torch.arange(4.0)[:, None, None]
    >>> config = MSAConfig(block_size=1, top_k=1)  # every token reads itself alone
    >>> attend(x, x, x, x, x[:, 0], Sequences.one(4, 4), config).out.flatten()
    tensor([0., 1., 2., 3.])
    """
    selection = select_fused(q_idx, k_idx, sequences, config)
    out, lse = SelectedAttention.apply(q, k, v, selection, config.softmax_scale_for(q.shape[-1]))
    args = (q, k, q_idx, k_idx, selection, sequences, config, lse)
    return Output(out, lse.float(), selection, align_index(*args) if align else None)


def attend_selection(
    q: Float[Tensor, "Tq Hq D"], k: Float[Tensor, "Tk Hkv D"], v: Float[Tensor, "Tk Hkv Dv"],
    selection: Selection, softmax_scale: float,
) -> Output:  # fmt: skip
    """Softmax attention over the visible tokens of the selected blocks (eq. 8, R9-R12).

    Differentiable in q, k and v with the selection held fixed (R18), lse included.

    Returns:
        out [Tq, Hq, Dv] in q's dtype, lse float32 [Tq, Hq], the given selection.

    >>> ids = torch.tensor([[0, -1], [0, -1], [0, 1]], dtype=torch.int32)[:, None]
    >>> selection = Selection(ids, Sequences.one(3, 3), block_size=2)
    >>> v = torch.tensor([1.0, 3.0, 8.0]).view(3, 1, 1)
    >>> attend_selection(torch.zeros(3, 1, 1), v, v, selection, 1.0).out.flatten().round(decimals=4)
    tensor([1., 2., 4.])
    """
    out, lse = SelectedAttention.apply(q, k, v, selection, softmax_scale)
    return Output(out, lse.float(), selection)


class SelectedAttention(torch.autograd.Function):
    """Forward through the lowering; backward by recomputing each tile (see gradients.py).

    Autograd would keep every edge's probabilities, and add up gradients in an order that may change
    between runs. This function keeps q, k, v, out and lse, and every sum has one order (R19).
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, selection: Selection, softmax_scale: float
    ) -> tuple[Tensor, Tensor]:
        """out in q's dtype, lse in the working precision; keeps out before it is rounded."""
        out, lse = attend_selection_forward(q, k, v, selection, softmax_scale)
        ctx.save_for_backward(q, k, v, out, lse, selection.indices)  # refuses ids written since
        ctx.selection, ctx.softmax_scale = selection, softmax_scale
        return out.to(q.dtype), lse

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients for q, k, v; none for the selection (R18)."""
        q, k, v, out, lse, _ = ctx.saved_tensors
        fixed = ctx.selection, ctx.softmax_scale
        return *attend_selection_backward(d_out, d_lse, q, k, v, out, lse, *fixed), None, None


@torch.no_grad()
def attend_selection_forward(
    q: Float[Tensor, "Tq Hq D"], k: Float[Tensor, "Tk Hkv D"], v: Float[Tensor, "Tk Hkv Dv"],
    selection: Selection, softmax_scale: float,
) -> tuple[Float[Tensor, "Tq Hq Dv"], Float[Tensor, "Tq Hq"]]:  # fmt: skip
    """Run each tile of queries down to its combined out and lse, in the working precision."""
    dtype, selection = working_dtype(q, k, softmax_scale), trimmed(selection)
    out = q.new_empty((*q.shape[:2], v.shape[-1]), dtype=dtype)
    lse = q.new_empty(q.shape[:2], dtype=dtype)
    q_, k_, v_ = (x.to(dtype) for x in (q, k, v))
    per_query = q.shape[1] * selection.top_k * v.shape[-1]
    chunk = edges_per_item(q.shape[1] // k.shape[1])
    size = min(queries_per_tile(per_query, q), queries_in_cache(selection, chunk, q))
    buffers = slot_buffers(q_, v, selection.top_k, size)
    for tile in schedule_tiles(selection, size, chunk):
        qs, ks = tile.queries, tile.keys
        slots = fill_slots(q_[qs], k_[ks], v_[ks], tile.schedule, softmax_scale, buffers)
        out[qs], lse[qs] = weigh_slots(slots)
    return out, lse


@torch.no_grad()
def attend_selection_backward(
    d_out: Float[Tensor, "Tq Hq Dv"], d_lse: Float[Tensor, "Tq Hq"],
    q: Float[Tensor, "Tq Hq D"], k: Float[Tensor, "Tk Hkv D"], v: Float[Tensor, "Tk Hkv Dv"],
    out: Float[Tensor, "Tq Hq Dv"], lse: Float[Tensor, "Tq Hq"],
    selection: Selection, softmax_scale: float,
) -> tuple[
    Float[Tensor, "Tq Hq D"], Float[Tensor, "Tk Hkv D"], Float[Tensor, "Tk Hkv Dv"]
]:  # fmt: skip
    """Gradients for q, k and v in the precision of lse, each rounded to its input's dtype."""
    outputs = out.to(lse.dtype), lse
    return selection_gradients((q, k, v), outputs, (d_out, d_lse), selection, softmax_scale)
