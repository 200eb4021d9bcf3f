"""What the operators do: check (R20), then call the backend that "auto" means for the device.

Gradients are the backend's own: each has its attention and its loss as an autograd Function, whose
two halves are called here one at a time, since between them lies the operators' own autograd.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

from msa import checks
from msa.api import decode
from msa.config import MSAConfig
from msa.dispatch import load_backend, resolve
from msa.ir import PagedKV, Selection, Sequences
from msa.layout import read_layout

P = ParamSpec("P")
R = TypeVar("R")
Borders = tuple[Sequence[int], Sequence[int]]


def in_given_dtypes(kernel: Callable[P, R]) -> Callable[P, R]:
    """Nothing inside an operator is cast by autocast: the functions before it have cast its inputs.

    A backend's own products would lose the float32 that they are accumulated in.
    """

    @wraps(kernel)
    def run(*args: P.args, **options: P.kwargs) -> R:
        if not torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda"):
            return kernel(*args, **options)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return kernel(*args, **options)

    return run


class Kept:
    """Stands where autograd's context does: what a forward keeps and a backward finds."""

    dtypes: tuple[torch.dtype, torch.dtype]

    def __init__(self, saved_tensors: tuple[Tensor, ...] = (), **others: Any) -> None:
        self.saved_tensors = saved_tensors
        vars(self).update(others)

    def save_for_backward(self, *tensors: Tensor) -> None:
        """As autograd's own."""
        self.saved_tensors = tensors


def backend_of(tensor: Tensor) -> Literal["torch", "triton"]:
    """Which backend runs an operator: triton for CUDA tensors, torch for other tensors."""
    return "triton" if resolve("auto", tensor) == "triton" else "torch"


def read(
    arrays: dict[str, Tensor], borders: Borders, config: MSAConfig
) -> tuple[Literal["torch", "triton"], Sequences]:
    """The backend, and the sequences that checked packed tensors hold."""
    cu_seqlens_q, cu_seqlens_k = borders
    sequences = read_layout(arrays, cu_seqlens_q, cu_seqlens_k).sequences
    name = backend_of(next(iter(arrays.values())))
    if name == "triton":
        checks.check_kernels(config.block_size, config.top_k, **arrays)
    return name, sequences


def autograd_function(name: str, file: str, function: str) -> Any:
    """SelectedAttention or Alignment of a backend."""
    load_backend(name)  # or the error that says what to install
    return getattr(importlib.import_module(f"msa.{name}_impl.{file}"), function)


def loop_order(name: str) -> tuple[str, ...]:
    """The option that only triton's attention takes."""
    return ("auto",) if name == "triton" else ()


@in_given_dtypes
def select(q_idx: Tensor, k_idx: Tensor, borders: Borders, config: MSAConfig) -> Tensor:
    """Ids int32 [Tq, Hkv, k] (R4-R8)."""
    name, sequences = read({"q_idx": q_idx, "k_idx": k_idx}, borders, config)
    selection = load_backend(name).select_fused(q_idx, k_idx, sequences, config)
    return selection.indices.contiguous()


@in_given_dtypes
def attend_selection(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, borders: Borders,
    config: MSAConfig, validate: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Out in q's dtype and lse in the working precision (R9, R10)."""
    arrays = {"q": q, "k": k, "v": v}
    name, sequences = read(arrays, borders, config)
    selection = Selection(indices.contiguous(), sequences, config.block_size)
    if validate and not checks.is_captured(q):
        checks.check_selection_for(selection, arrays)
    scale = config.softmax_scale_for(q.shape[-1])
    forward = autograd_function(name, "attention", "SelectedAttention").forward
    return forward(Kept(), q, k, v, selection, scale, *loop_order(name))


@torch.no_grad()
@in_given_dtypes
def selection_gradients(
    d_out: Tensor, d_lse: Tensor, saved: tuple[Tensor, ...], indices: Tensor,
    borders: Borders, block_size: int, softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients for q, k and v; `saved` is q, k, v, out, lse (R18)."""
    name, (*inputs, out, lse) = backend_of(d_out), saved
    if name == "torch":  # which works in the precision of out, and keeps it before it is rounded
        out = out.to(lse.dtype)
    sequences = Sequences(*(tuple(border) for border in borders))
    selection = Selection(indices, sequences, block_size)
    kept = Kept(
        (*inputs, out, lse), selection=selection, scale=softmax_scale, softmax_scale=softmax_scale
    )
    backward = autograd_function(name, "attention", "SelectedAttention").backward
    d_q, d_k, d_v = (x.contiguous() for x in backward(kept, d_out, d_lse)[:3])
    return d_q, d_k, d_v


@torch.no_grad()
@in_given_dtypes
def align(
    tensors: dict[str, Tensor], indices: Tensor | None, lse: Tensor | None,
    borders: Borders, config: MSAConfig, with_gradient: bool, validate: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss, and its gradients for q_idx and k_idx in the working precision, or empty (R17)."""
    arrays = tensors if lse is None else tensors | {"lse": lse}
    name, sequences = read(arrays, borders, config)
    selection = None
    if indices is not None:
        selection = Selection(indices.contiguous(), sequences, config.block_size)
        if validate and not checks.is_captured(indices):
            checks.check_selection_for(selection, tensors)
    function, kept = autograd_function(name, "alignment", "Alignment"), Kept()
    args = (*tensors.values(), lse, selection, sequences, config, with_gradient)
    loss = function.forward(kept, *args)
    if not with_gradient:
        return loss, loss.new_empty(0), loss.new_empty(0)
    kept.dtypes = (loss.dtype, loss.dtype)  # not yet rounded to those of q_idx and k_idx
    d_q_idx, d_k_idx = function.backward(kept, torch.ones_like(loss))[2:4]
    return loss, d_q_idx.contiguous(), d_k_idx.contiguous()


def decode_step(
    q: Tensor, q_idx: Tensor, cache: PagedKV, config: MSAConfig
) -> tuple[Tensor, Tensor]:
    """Out and lse of the last tokens of each cached sequence (R2)."""
    output = decode(q, q_idx, cache, config=config, backend=backend_of(q))
    return output.out.contiguous(), output.lse.contiguous()
