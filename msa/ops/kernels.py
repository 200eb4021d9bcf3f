"""What the operators do: check arguments (`msa.entry`), then call a forward or backward function.

Each backend has its attention and its loss as a forward and a backward function
(`msa.interface.BackendWithGradients`). An operator calls one of them; the autograd of the operators
connects the two. Autocast is off inside, because the functions of `msa.ops` have already cast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

from torch import Tensor

from msa.api import decode, prefill
from msa.config import MSAConfig
from msa.dispatch import resolve
from msa.entry import Entry, enter
from msa.interface import BackendWithGradients
from msa.ir import PagedKV, Selection, Sequences
from msa.selection import mark_canonical

Borders = tuple[Sequence[int], Sequence[int]]


def backend_of(tensor: Tensor) -> Literal["torch", "triton"]:
    """The backend of an operator: triton for CUDA tensors, torch for other tensors."""
    return "triton" if resolve("auto", tensor) == "triton" else "torch"


def gradients_of(entry: Entry) -> BackendWithGradients:
    """The backend of an operator; torch and triton both have the forward and backward functions."""
    return cast(BackendWithGradients, entry.module)


def selection_of(indices: Tensor, borders: Borders, block_size: int) -> Selection:
    """The form of the ids that an operator is given."""
    cu_seqlens_q, cu_seqlens_k = borders
    sequences = Sequences(tuple(cu_seqlens_q), tuple(cu_seqlens_k))
    return Selection(indices.contiguous(), sequences, block_size)


def select(q_idx: Tensor, k_idx: Tensor, borders: Borders, config: MSAConfig) -> Tensor:
    """Ids int32 [Tq, Hkv, k] (R4-R8)."""
    entry = enter({"q_idx": q_idx, "k_idx": k_idx}, backend_of(q_idx), *borders, config=config)
    selection = entry.run(entry.module.select_fused, *entry.arrays, entry.sequences, config)
    return selection.indices.contiguous()


def attend(
    arrays: dict[str, Tensor], borders: Borders, config: MSAConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Out in q's dtype, lse in the working precision, ids; q, k, v, q_idx, k_idx (R4-R12)."""
    entry = enter(arrays, backend_of(arrays["q"]), *borders, config=config)
    q, k, v, q_idx, k_idx = entry.arrays
    selection = entry.run(entry.module.select_fused, q_idx, k_idx, entry.sequences, config)
    scale = config.softmax_scale_for(q.shape[-1])
    forward = gradients_of(entry).attend_selection_forward
    out, lse = entry.run(forward, q, k, v, selection, scale)
    return out.to(q.dtype), lse, selection.indices.contiguous()


def attend_selection(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, borders: Borders, config: MSAConfig
) -> tuple[Tensor, Tensor]:
    """Out in q's dtype and lse in the working precision (R9, R10)."""
    selection = selection_of(indices, borders, config.block_size)
    entry = enter({"q": q, "k": k, "v": v}, backend_of(q), selection=selection)
    scale = config.softmax_scale_for(q.shape[-1])
    forward = gradients_of(entry).attend_selection_forward
    out, lse = entry.run(forward, *entry.arrays, entry.selection, scale)
    return out.to(q.dtype), lse


def selection_gradients(
    d_out: Tensor, d_lse: Tensor, saved: tuple[Tensor, ...], indices: Tensor, borders: Borders,
    block_size: int, softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients for q, k and v; `saved` is q, k, v, out, lse (R18)."""
    entry = Entry(backend_of(d_out), d_out)
    selection = selection_of(indices, borders, block_size)
    backward = gradients_of(entry).attend_selection_backward
    d_q, d_k, d_v = entry.run(backward, d_out, d_lse, *saved, selection, softmax_scale)
    return d_q.contiguous(), d_k.contiguous(), d_v.contiguous()


def align(
    tensors: dict[str, Tensor], indices: Tensor | None, lse: Tensor | None,
    borders: Borders, config: MSAConfig, with_gradient: bool, validate: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss, and its gradients for q_idx and k_idx in the working precision, or empty (R17)."""
    arrays = tensors if lse is None else tensors | {"lse": lse}
    backend = backend_of(tensors["q"])
    if indices is None:
        entry = enter(arrays, backend, *borders, config=config)
    else:
        selection = selection_of(indices, borders, config.block_size)
        if not validate:
            mark_canonical(selection)
        entry = enter(arrays, backend, selection=selection)
    q, k, q_idx, k_idx, *known = entry.arrays
    args = (entry.selection, entry.sequences, config, known[0] if known else None, with_gradient)
    forward = gradients_of(entry).align_index_forward
    loss, d_q_idx, d_k_idx = entry.run(forward, q, k, q_idx, k_idx, *args)
    if not with_gradient:
        return loss, loss.new_empty(0), loss.new_empty(0)
    return loss, d_q_idx.contiguous(), d_k_idx.contiguous()


def decode_step(
    q: Tensor, q_idx: Tensor, cache: PagedKV, config: MSAConfig
) -> tuple[Tensor, Tensor]:
    """Out and lse of the last tokens of each cached sequence (R2)."""
    output = decode(q, q_idx, cache, config=config, backend=backend_of(q))
    return output.out.contiguous(), output.lse.contiguous()


def prefill_tokens(
    q: Tensor, q_idx: Tensor, cache: PagedKV, cu_seqlens_q: Sequence[int] | None,
    config: MSAConfig, index_dtype: str | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Out and lse of new tokens of each cached sequence (R2)."""
    borders = None if cu_seqlens_q is None else tuple(cu_seqlens_q)
    output = prefill(
        q, q_idx, cache, cu_seqlens_q=borders, config=config, backend=backend_of(q),
        index_dtype=cast(Literal["fp8_e4m3"] | None, index_dtype),  # which `prefill` checks
    )  # fmt: skip
    return output.out.contiguous(), output.lse.contiguous()
