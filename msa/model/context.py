"""A forward pass over several processes, each with a part of the tokens (`msa.parallel`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from msa.config import MSAConfig
from msa.dispatch import BackendName
from msa.model.dense import attend_densely
from msa.parallel import (
    Shards,
    attach,
    context_parallel_align_index,
    context_parallel_attention,
    key_prefixes,
)
from msa.parallel.gathering import Rows, start_gather
from msa.parallel.groups import Group, process_group
from msa.parallel.shards import HALVES


@dataclass(frozen=True)
class Context:
    """Where this process's tokens lie, and what its layers compute together with other processes.

    Each process has the rows that `msa.parallel.shard` gives it.
    """

    group: Group
    shards: Shards

    @property
    def rank(self) -> int:
        """This process, in the group."""
        return process_group(self.group).rank()

    @property
    def spans(self) -> list[tuple[int, int]]:
        """For each chunk of this process where it begins and ends, as positions."""
        return [span for half in HALVES for span in self.shards.spans(self.rank, half)]

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, q_idx: Tensor, k_idx: Tensor, config: MSAConfig,
        align: bool, backend: BackendName,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """MSA: out of this process's tokens; with align the KL over all processes' tokens."""
        output = context_parallel_attention(
            q, k, v, q_idx, k_idx, group=self.group, cu_seqlens=self.shards.cu_seqlens,
            config=config, align=align, backend=backend,
        )  # fmt: skip
        return output.out, output.kl

    def dense(
        self, q: Float[Tensor, "T Hq D"], k: Float[Tensor, "T Hkv D"], v: Float[Tensor, "T Hkv D"],
        scale: float,
    ) -> Float[Tensor, "T Hq D"]:  # fmt: skip
        """Attention to all earlier tokens, of all processes."""
        shards = self.shards
        halves = key_prefixes(
            k, v, group=self.group, cu_seqlens=shards.cu_seqlens, block_size=shards.block_size
        )
        outs: list[Tensor] = []
        for half in halves:
            k_half, v_half = half.keys
            outs.append(attend_densely(q[half.rows], k_half, v_half, half.sequences, scale))
        return attach(torch.cat(outs), q, *(x for half in halves for x in half.keys))

    def align_densely(
        self, q: Tensor, k: Tensor, q_idx: Tensor, k_idx: Tensor, config: MSAConfig,
        backend: BackendName,
    ) -> Tensor:  # fmt: skip
        """The loss of the index warm-up: the mean over all processes' tokens."""
        return context_parallel_align_index(
            q, k, q_idx, k_idx, group=self.group, cu_seqlens=self.shards.cu_seqlens,
            config=config, backend=backend,
        )  # fmt: skip

    def before(
        self, x: Float[Tensor, "T width"], reach: int
    ) -> Float[Tensor, "chunks reach width"]:
        """The `reach` tokens before each chunk; zeros before the start of a sequence.

        All rows are gathered, since short chunks reach back over several others. The released model
        has no layer that needs this.
        """
        group = process_group(self.group)
        places, known = self._places_before(reach)
        places, known = places.to(x.device), known.to(x.device)
        (early, late) = Rows.apply(
            [start_gather(x, self.shards, group)], list(places.chunk(2)), self.shards, group, x
        )
        rows = torch.cat([early, late]).unflatten(0, (-1, reach))
        return rows.masked_fill(~known.view(-1, reach, 1), 0.0)

    def _places_before(self, reach: int) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
        """Where these tokens lie among the gathered rows, and which of them exist."""
        starts = torch.tensor(self.shards.cu_seqlens[:-1] * len(HALVES))[:, None]
        firsts = torch.tensor([a for a, _ in self.spans])[:, None]
        tokens = firsts + torch.arange(-reach, 0)
        known = tokens >= 0
        whole = (starts + tokens.clamp(min=0)).flatten()
        whole = whole.clamp(max=max(self.shards.total - 1, 0))  # an empty sequence at the end
        return self.shards.places()[whole], known.flatten()
