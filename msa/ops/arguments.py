"""Check the arguments of the functions of `msa.ops`, cast them, and pack them for an operator.

A call is checked as `msa.attention` checks it (`msa.layout`), before batched tensors are packed.
While torch.compile or torch.export traces a call, its tensors have no numbers, and inside
torch.func.vmap they are views of a batch. Then the shapes are checked here, and the operator checks
the rest when it runs (R20).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from msa import cache_checks, checks
from msa.config import MSAConfig
from msa.ir import PagedKV, Selection, Sequences
from msa.layout import read_layout
from msa.paged_kv import PAGE_DIMS
from msa.selection import check_ids

Given = Sequence[int] | Tensor | None
"""cu_seqlens as a caller gives them."""
Borders = tuple[list[int], list[int]]
"""cu_seqlens of queries and of keys as an operator takes them."""


def enter(
    tensors: dict[str, Tensor], cu_seqlens_q: Given, cu_seqlens_k: Given
) -> tuple[list[Tensor], Borders]:
    """Check the tensors of a call; return them cast and packed, and the borders of sequences.

    Args:
        tensors: some of q, k, v, q_idx, k_idx and lse.
        cu_seqlens_q, cu_seqlens_k: as in the functions of `msa.ops`.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came (R20).
    """
    if is_traced(*tensors.values()):
        sizes, batched = checks.check_shapes(tensors)
        checks.check_given(batched, cu_seqlens_q, cu_seqlens_k)
        tensors, count = cast(tensors), sizes["B"] if batched else 1
        borders = (
            traced_borders(cu_seqlens_q, count, sizes["Tq"]),
            traced_borders(cu_seqlens_k, count, sizes["Tk"]),
        )
    else:
        for name, tensor in tensors.items():
            check_tensor(name, tensor)
            dtypes = checks.LSE_DTYPES if name == "lse" else checks.FLOAT_DTYPES
            checks.check_array(name, tensor, dtypes)
        tensors = cast(tensors)
        layout = read_layout(tensors, cu_seqlens_q, cu_seqlens_k)
        batched = len(layout.lead) == 2
        read = layout.sequences
        borders = list(read.cu_seqlens_q), list(read.cu_seqlens_k)
    return [x.flatten(0, 1) if batched else x for x in tensors.values()], borders


def check_indices(indices: Tensor, borders: Borders, block_size: int) -> None:
    """Check the block size, and the kind, dtype and shape of ids; their order is checked later."""
    if is_traced(indices):
        return
    check_tensor("indices", indices)
    cu_seqlens_q, cu_seqlens_k = (tuple(part) for part in borders)
    check_ids(Selection(indices, Sequences(cu_seqlens_q, cu_seqlens_k), block_size))


def check_step(q: Tensor, q_idx: Tensor, cache: PagedKV, config: MSAConfig) -> None:
    """Check what a step of decoding needs before its operator is called; it checks the rest."""
    checks.check_type("cache", cache, PagedKV)
    checks.check_type("config", config, MSAConfig)
    sizes = {"Bk": config.block_size}
    if not is_traced(q, q_idx, cache.k_pages):
        for name, tensor in (("q", q), ("q_idx", q_idx)):
            check_tensor(name, tensor)
            checks.check_array(name, tensor)
        for field in fields(cache):
            if getattr(cache, field.name) is not None:
                check_tensor(f"cache.{field.name}", getattr(cache, field.name))
        cache_checks.check_cache(cache, sizes)
    else:
        checks.check_shape("cache.k_pages", cache.k_pages, PAGE_DIMS["k_pages"], sizes)


def check_tensor(name: str, tensor: Any) -> None:
    """An object of torch.Tensor or of a class that is made from it."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {checks.kind(tensor)}")


def is_traced(*tensors: Any) -> bool:
    """Whether only the shapes of the tensors can be checked: in a traced call, and inside vmap."""
    if torch.compiler.is_compiling():
        return True
    return any(
        type(x).__name__ in ("FakeTensor", "FunctionalTensor")
        or (isinstance(x, Tensor) and torch._C._functorch.is_batchedtensor(x))
        for x in tensors
    )


def traced_borders(given: Given, count: int, length: int) -> list[int]:
    """The borders that were given, else those of `count` sequences of `length` tokens."""
    if given is None:
        return [length * b for b in range(count + 1)]
    return given.tolist() if isinstance(given, Tensor) else list(given)


def cast(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cast tensors except lse to the dtype of autocast, where autocast is on."""
    device = next(iter(tensors.values())).device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return {name: x if name == "lse" else x.to(dtype) for name, x in tensors.items()}
