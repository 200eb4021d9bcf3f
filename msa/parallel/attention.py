"""Context parallel attention: each rank has a part of the tokens, and reads the keys of all.

    start to gather index keys, keys, values            the collectives run while the GPU selects
    for each half of this rank's queries:
        selection = select(q_idx of the half, index keys of its prefix)
    for each half:
        out, lse = attention over the selection         waits for keys and values
        kl of the half                                  with align=True
    kl = the mean over all ranks' queries

Every half is a call of the public functions, so all backends and both loop orders serve it, and the
result is that of one process: a selection bit for bit where scores are, out up to nothing where a
backend computes each query alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from msa import api, checks
from msa.api import IndexDtype, LoopOrder
from msa.config import MSAConfig
from msa.dispatch import BackendName
from msa.ir import Selection
from msa.kernel_choice import Kernels
from msa.parallel.agreement import agree
from msa.parallel.gathering import Attached, Gathered, Rows, SumOverRanks, start_gather
from msa.parallel.groups import Group, process_group
from msa.parallel.prefixes import half_rows
from msa.parallel.shards import Shards, key_places


@dataclass(frozen=True)
class ContextOutput:
    """What a rank gets: out and lse of its own rows, the selections of its two halves, and kl."""

    out: Float[Tensor, "rows Hq Dv"]
    lse: Float[Tensor, "rows Hq"]
    selections: tuple[Selection, ...]
    """Of the early half and of the late half, where the half has queries."""
    shards: Shards
    kl: Float[Tensor, ""] | None = None


def context_parallel_attention(
    q: Float[Tensor, "rows Hq D"], k: Float[Tensor, "rows Hkv D"], v: Float[Tensor, "rows Hkv Dv"],
    q_idx: Float[Tensor, "rows Hkv Di"], k_idx: Float[Tensor, "rows Di"],
    *, group: Group | None = None, cu_seqlens: Any = None, config: MSAConfig = MSAConfig(),
    align: bool = False, backend: BackendName = "auto", loop_order: LoopOrder = "auto",
    index_dtype: IndexDtype | None = None, kernels: Kernels = "auto",
) -> ContextOutput:  # fmt: skip
    """MSA over sequences whose tokens are dealt out to the ranks of a group (eq. 6-10, R1-R18).

    Every rank of the group calls it, with its own rows. The result is that of `msa.attention` on
    the whole tensors, of which each rank gets its rows.

    Args:
        q, k, v, q_idx, k_idx: this rank's rows, those that `shard` gives it. Torch tensors.
        group: a process group, or a mesh of one dimension; None means all processes. With tensor
            parallelism over KV heads, this is the other dimension of the mesh, and each rank gives
            its own heads.
        cu_seqlens: borders of the whole sequences [batch + 1], not of this rank's rows; None means
            one sequence.
        config: the same on every rank. Chunks begin at multiples of its block size.
        align: also give kl, the mean over the queries of all ranks, the same number on every rank.
        backend, loop_order, index_dtype, kernels: as in `msa.attention`.

    Returns:
        Differentiable in q, k, v as in `msa.attention`, and kl in q_idx and k_idx. Backward runs
        collectives, so all ranks have to run it, in the same order. The loss of the model is the
        sum of the ranks' losses, in which kl, which is the same everywhere, counts once.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came (R20); also where
            ranks differ in borders, sizes or options. Then every rank raises, and none waits.
        RuntimeError: another rank's arguments were refused.

    >>> import msa, torch, torch.distributed as dist
    >>> store = dist.HashStore()
    >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)  # torchrun does this
    >>> x, k_idx = torch.randn(9, 1, 8), torch.randn(9, 8)
    >>> config = msa.MSAConfig(block_size=2, top_k=2)
    >>> output = context_parallel_attention(
    ...     x, x, x, x, k_idx, config=config)
    >>> torch.equal(output.out, msa.attention(x, x, x, x, k_idx, config=config).out)
    True
    >>> dist.destroy_process_group()
    """
    tensors = {"q": q, "k": k, "v": v, "q_idx": q_idx, "k_idx": k_idx}
    options: dict[str, Any] = {"loop_order": loop_order, "kernels": kernels}
    said = options | {"config": config, "align": align, "backend": backend}
    said |= {"index_dtype": index_dtype}
    block_size = config.block_size if isinstance(config, MSAConfig) else 0
    shards = agree(
        group, tensors, cu_seqlens, block_size, said, lambda: check_own(tensors, config, align)
    )  # fmt: skip
    ranks = process_group(group)
    rank = ranks.rank()
    keys = {"k_idx": k_idx, "k": k, "v": v}
    gathers = {name: start_gather(x, shards, ranks) for name, x in keys.items()}
    places = key_places(shards, rank, q.device)
    selections = select_halves(
        q_idx, gathers["k_idx"], places, shards, rank, config=config, backend=backend,
        index_dtype=index_dtype, kernels=kernels,
    )  # fmt: skip
    used = list(keys) if align else ["k", "v"]
    taken = Rows.apply(
        [gathers[name] for name in used], places, shards, ranks, *(keys[name] for name in used)
    )
    prefixes = {name: taken[2 * i : 2 * i + 2] for i, name in enumerate(used)}
    scale = config.softmax_scale_for(q.shape[-1])
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    kl = q.new_zeros((), dtype=loss_dtype(q, q_idx))
    for half, rows in enumerate(half_rows(shards, rank)):
        selection = selections[half]
        if selection is None:
            continue
        k_half, v_half = prefixes["k"][half], prefixes["v"][half]
        output = api.sparse_attention(
            q[rows], k_half, v_half, selection, softmax_scale=scale, backend=backend, **options
        )
        outs.append(output.out)
        lses.append(output.lse)
        if align:
            # lse is float32; where kl is float64, it is computed again in float64
            known = None if kl.dtype == torch.float64 else output.lse.detach()
            part = api.align_index(
                q[rows].detach(), k_half.detach(), q_idx[rows], prefixes["k_idx"][half], selection,
                lse=known, config=config, backend=backend,
            )  # fmt: skip
            kl = kl + part * ((rows.stop - rows.start) / shards.total)
    out = torch.cat(outs) if outs else q.new_empty(0, q.shape[1], v.shape[2])
    lse = torch.cat(lses) if lses else q.new_empty(0, q.shape[1], dtype=torch.float32)
    out, lse = (Attached.apply(x, q, *prefixes["k"], *prefixes["v"]) for x in (out, lse))
    found = tuple(selection for selection in selections if selection is not None)
    total = None
    if align:
        total = SumOverRanks.apply(Attached.apply(kl, q_idx, *prefixes["k_idx"]), ranks)
    return ContextOutput(out, lse, found, shards, total)


def select_halves(
    q_idx: Tensor, gather: Gathered, places: list[Tensor], shards: Shards, rank: int, **options: Any
) -> list[Selection | None]:
    """The selection of each half; None for a half without queries."""
    selections: list[Selection | None] = []
    for half, rows in enumerate(half_rows(shards, rank)):
        if rows.start == rows.stop:
            selections.append(None)
            continue
        sequences = shards.half(rank, half)
        selections.append(
            api.select(
                q_idx[rows].detach(), gather.take(places[half]),
                cu_seqlens_q=sequences.cu_seqlens_q, cu_seqlens_k=sequences.cu_seqlens_k, **options,
            )
        )  # fmt: skip
    return selections


def loss_dtype(q: Tensor, q_idx: Tensor) -> torch.dtype:
    """The dtype of kl: float64 if q or q_idx is, else float32 (R17)."""
    return torch.float64 if torch.float64 in (q.dtype, q_idx.dtype) else torch.float32


def check_own(tensors: dict[str, Tensor], config: MSAConfig, align: bool) -> None:
    """The shapes, dtypes and devices of this rank's rows, which `agree` then compares."""
    checks.check_type("config", config, MSAConfig)
    checks.check_flag("align", align)
    sizes: dict[str, int] = {}
    dims = {
        "q": "Tq Hq D", "k": "Tq Hkv D", "v": "Tq Hkv Dv", "q_idx": "Tq Hkv Di", "k_idx": "Tq Di",
    }  # fmt: skip
    for name, tensor in tensors.items():
        checks.check_array(name, tensor)
        checks.check_shape(name, tensor, dims[name], sizes)
    checks.check_heads(sizes["Hq"], sizes["Hkv"])
    checks.check_same_place(**tensors)
    for names in (("q", "k", "v"), ("q_idx", "k_idx")):
        checks.check_same_dtype(**{name: tensors[name] for name in names if name in tensors})
