"""The warm-up form of the alignment loss, over tokens of all ranks (eq. 9-10, R17)."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from msa import api
from msa.config import MSAConfig
from msa.dispatch import BackendName
from msa.kernel_choice import Kernels
from msa.parallel.agreement import agree
from msa.parallel.attention import check_own, loss_dtype
from msa.parallel.gathering import SumOverRanks
from msa.parallel.groups import Group, process_group
from msa.parallel.prefixes import attach, gather_prefixes


def context_parallel_align_index(
    q: Float[Tensor, "rows Hq D"], k: Float[Tensor, "rows Hkv D"],
    q_idx: Float[Tensor, "rows Hkv Di"], k_idx: Float[Tensor, "rows Di"],
    *, group: Group | None = None, cu_seqlens: Any = None, config: MSAConfig = MSAConfig(),
    backend: BackendName = "auto", kernels: Kernels = "auto",
) -> Float[Tensor, ""]:  # fmt: skip
    """KL(main branch || index branch) over all visible tokens: the mean over all ranks' queries.

    For the form over a selection, call `context_parallel_attention` with align=True, which has it.

    Args:
        q, k, q_idx, k_idx: this rank's rows, as in `context_parallel_attention`.
        group, cu_seqlens, config, backend, kernels: as there.

    Raises:
        TypeError, ValueError, RuntimeError: as there.
    """
    tensors = {"q": q, "k": k, "q_idx": q_idx, "k_idx": k_idx}
    said = {"config": config, "backend": backend, "kernels": kernels}
    block_size = config.block_size if isinstance(config, MSAConfig) else 0
    shards = agree(
        group, tensors, cu_seqlens, block_size, said, lambda: check_own(tensors, config, True)
    )
    halves = gather_prefixes((k.detach(), k_idx), shards, group)
    kl = q.new_zeros((), dtype=loss_dtype(q, q_idx))
    for half in halves:
        borders = half.sequences
        if not borders.total_q:
            continue
        part = api.align_index(
            q[half.rows], half.keys[0], q_idx[half.rows], half.keys[1],
            cu_seqlens_q=borders.cu_seqlens_q, cu_seqlens_k=borders.cu_seqlens_k, config=config,
            backend=backend, kernels=kernels,
        )  # fmt: skip
        kl = kl + part * (borders.total_q / shards.total)
    kl = attach(kl, q_idx, *(half.keys[1] for half in halves))
    return SumOverRanks.apply(kl, process_group(group))
