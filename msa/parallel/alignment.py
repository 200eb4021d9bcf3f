"""The warm-up form of the alignment loss, over tokens of all ranks (eq. 9-10, R17)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from msa import api
from msa.config import MSAConfig
from msa.dispatch import BackendName
from msa.parallel.gathering import SumOverRanks
from msa.parallel.groups import Group, process_group
from msa.parallel.prefixes import attach, key_prefixes


def context_parallel_align_index(
    q: Float[Tensor, "rows Hq D"], k: Float[Tensor, "rows Hkv D"],
    q_idx: Float[Tensor, "rows Hkv Di"], k_idx: Float[Tensor, "rows Di"],
    *, group: Group | None = None, cu_seqlens: Any = None, config: MSAConfig = MSAConfig(),
    backend: BackendName = "auto",
) -> Float[Tensor, ""]:  # fmt: skip
    """KL(main branch || index branch) over all visible tokens: the mean over all ranks' queries.

    For the form over a selection, call `context_parallel_attention` with align=True, which has it.
    Arguments and errors are those of `context_parallel_attention`.
    """
    block_size = config.block_size if isinstance(config, MSAConfig) else 0
    halves = key_prefixes(
        k.detach(), k_idx, group=group, cu_seqlens=cu_seqlens, block_size=block_size
    )
    wide = torch.float64 if torch.float64 in (q.dtype, q_idx.dtype) else torch.float32
    kl, count = q.new_zeros((), dtype=wide), torch.tensor(len(q), device=q.device)
    total = SumOverRanks.apply(count, process_group(group))
    for half in halves:
        borders = half.sequences
        if not borders.total_q:
            continue
        part = api.align_index(
            q[half.rows], half.keys[0], q_idx[half.rows], half.keys[1],
            cu_seqlens_q=borders.cu_seqlens_q, cu_seqlens_k=borders.cu_seqlens_k, config=config,
            backend=backend,
        )  # fmt: skip
        kl = kl + part * borders.total_q
    kl = attach(kl / total.clamp(min=1), q_idx, *(half.keys[1] for half in halves))
    return SumOverRanks.apply(kl, process_group(group))
