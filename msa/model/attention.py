"""An attention layer, dense or MSA: projections, per-head norms, RoPE, and one call of msa.

Tokens travel packed (R1): x is [T, width], all sequences behind one another, and T counts new
tokens only. A `LayerCache` holds the tokens before them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

import msa
from msa import moved
from msa.dispatch import BackendName
from msa.model.cache import LayerCache
from msa.model.config import ModelConfig
from msa.model.context import Context
from msa.model.dense import attend_densely
from msa.model.norm_rope import RMSNorm, Turns

Mode = Literal["sparse", "dense"]
"""How MSA layers attend: to the selected blocks, or to all tokens."""
MODES: tuple[Mode, ...] = ("sparse", "dense")


@dataclass(frozen=True)
class Seen:
    """What an MSA layer attended with: its heads after norms and RoPE, and its selection."""

    q: Float[Tensor, "Tq Hq D"]
    k: Float[Tensor, "Tk Hkv D"]
    softmax_scale: float
    selection: msa.Selection


Watch = Callable[[Seen], None]
"""A function that each MSA layer calls in mode "sparse", except in single steps of decoding."""


@dataclass(frozen=True)
class LayerCall:
    """What every layer of one forward pass is given besides its input."""

    sequences: msa.Sequences
    """The new tokens are the queries; old and new tokens are the keys (R2)."""
    turns: Turns
    slots: list[int]
    """The slot of each sequence in the cache."""
    mode: Mode
    """How MSA layers attend; with align, "dense" is the index warm-up."""
    align: bool
    """Whether to compute the loss of the index branch (R17)."""
    backend: BackendName
    watch: Watch | None = None
    context: Context | None = None
    """The tokens of the other processes, if there are any; then there is no cache."""

    @property
    def counts(self) -> list[int]:
        """The number of new tokens of each sequence, or of each chunk of this process."""
        if self.context is not None:
            return [stop - start for start, stop in self.context.spans]
        return [queries.stop - queries.start for queries, _ in self.sequences.spans()]

    @property
    def one_by_one(self) -> bool:
        """Whether this is one step of decoding, without a loss."""
        return self.mode == "sparse" and not self.align and set(self.counts) == {1}


class IndexBranch(nn.Module):
    """One index query per group and one index key, from a hidden state without gradient.

    With `config.index_gradient` the hidden state has a gradient. The paper advises against it; the
    ablations show why.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dim, self.gradient = config.index_dim, config.index_gradient
        self.q = nn.Linear(config.width, config.groups * config.index_dim, bias=False)
        self.k = nn.Linear(config.width, config.index_dim, bias=False)
        self.q_norm = RMSNorm(config.index_dim, config.norm_eps)
        self.k_norm = RMSNorm(config.index_dim, config.norm_eps)

    def forward(
        self, x: Float[Tensor, "T width"], turns: Turns
    ) -> tuple[Float[Tensor, "T Hkv Di"], Float[Tensor, "T Di"]]:
        """q_idx and k_idx."""
        if not self.gradient:
            x = x.detach()  # eq. 11: the loss of the index must not change the backbone
        q = self.q_norm(self.q(x).unflatten(-1, (-1, self.dim)))
        k = self.k_norm(self.k(x).unflatten(-1, (1, self.dim)))
        return turns(q), turns(k)[:, 0]


class Mixing(nn.Module):
    """y[t] = x[t] + sum over i >= 1 of weight[i - 1] * x[t - i], within each sequence.

    The released model has no such layer. It lets a small model find "what follows this key" in one
    layer. Each channel and distance starts with a random weight, so that the result depends on the
    order of the tokens.

    >>> mixing = Mixing(width=1, tokens=2)
    >>> with torch.no_grad(): _ = mixing.weight.fill_(10.0)
    >>> x = torch.tensor([[1.0], [2.0], [3.0]])  # a sequence of two tokens, one of a single token
    >>> mixed, last = mixing(x, [2, 1], torch.zeros(2, 1, 1))
    >>> mixed.flatten().tolist(), last.flatten().tolist()
    ([1.0, 12.0, 3.0], [2.0, 3.0])
    """

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.5 * torch.randn(tokens - 1, width))

    def forward(
        self, x: Float[Tensor, "T width"], counts: list[int], before: Float[Tensor, "S reach width"]
    ) -> tuple[Float[Tensor, "T width"], Float[Tensor, "S reach width"]]:
        """The mixed tokens, and the last `reach` tokens of each sequence for the next call.

        `before` holds the `reach` tokens before the new tokens of each sequence.
        """
        if len(set(counts)) > 1:
            parts = zip(x.split(counts), before)
            mixed, last = zip(*(self(own, [len(own)], old[None]) for own, old in parts))
            return torch.cat(mixed), torch.cat(last)
        n, reach = counts[0], len(self.weight)
        long = torch.cat([before.to(x.dtype), x.unflatten(0, (len(counts), n))], dim=1)
        mixed = long[:, reach:]
        for i, weight in enumerate(self.weight, start=1):
            mixed = mixed + weight.to(x.dtype) * long[:, reach - i : reach - i + n]
        return mixed.flatten(0, 1), long[:, n:]


class Attention(nn.Module):
    """Grouped-query attention, over all earlier tokens or over the blocks that the index chose."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config = config.msa
        self.head_dim = config.head_dim
        heads, groups = config.heads * config.head_dim, config.groups * config.head_dim
        self.q = nn.Linear(config.width, heads, bias=False)
        self.k = nn.Linear(config.width, groups, bias=False)
        self.v = nn.Linear(config.width, groups, bias=False)
        self.out = nn.Linear(heads, config.width, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.index = IndexBranch(config) if config.attention[layer] == "msa" else None
        mixed = config.mixed_tokens
        self.mixing = Mixing(config.width, mixed) if mixed > 1 else None

    def forward(
        self, x: Float[Tensor, "T width"], call: LayerCall, cache: LayerCache | None
    ) -> tuple[Float[Tensor, "T width"], Float[Tensor, ""] | None]:
        """The output of the layer. With call.align also the KL of its index, if it has an index."""
        if self.mixing is not None:
            x = self._mix(self.mixing, x, call, cache)
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q, self.k, self.v)
        )
        q, k = call.turns(self.q_norm(q)), call.turns(self.k_norm(k))
        q_idx, k_idx = (None, None)
        if self.index is not None:
            q_idx, k_idx = self.index(x, call.turns)
        if cache is not None:
            cache.append(call.slots, call.counts, k, v, k_idx)
            q = q.to(cache.dtype)
        if call.context is not None:
            out, kl = self._attend_together(q, k, v, q_idx, k_idx, call, call.context)
        elif q_idx is None or k_idx is None:
            if cache is not None:
                k, v, _ = cache.packed(call.slots)
            out, kl = attend_densely(q, k, v, call.sequences, self._scale), None
        else:
            out, kl = self._attend(q, k, v, q_idx, k_idx, call, cache)
        return self.out(out.flatten(1)), kl

    @property
    def _scale(self) -> float:
        return self.config.softmax_scale_for(self.head_dim)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, q_idx: Tensor, k_idx: Tensor,
        call: LayerCall, cache: LayerCache | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """MSA. In mode "dense": attention to all tokens, and the loss of the index warm-up."""
        borders = {
            "cu_seqlens_q": call.sequences.cu_seqlens_q,
            "cu_seqlens_k": call.sequences.cu_seqlens_k,
        }
        if cache is not None and call.one_by_one:
            output = msa.decode(
                q[:, None], q_idx[:, None].to(cache.dtype), cache.view(call.slots),
                config=self.config, backend=call.backend,
            )  # fmt: skip
            return output.out[:, 0], None
        if cache is not None:
            k, v, k_idx = cache.packed(call.slots)
            q_idx = q_idx.to(cache.dtype)
        if call.mode == "sparse":
            output = msa.attention(
                q, k, v, q_idx, k_idx, **borders,
                config=self.config, align=call.align, backend=call.backend,
            )  # fmt: skip
            if call.watch is not None and output.selection is not None:
                call.watch(Seen(q, k, self._scale, output.selection))
            return output.out, output.kl
        out, kl = attend_densely(q, k, v, call.sequences, self._scale), None
        if call.align:
            kl = msa.align_index(
                q, k, q_idx, k_idx, **borders,
                config=self.config, backend=call.backend,
            )  # fmt: skip
        return out, kl

    def _attend_together(
        self, q: Tensor, k: Tensor, v: Tensor, q_idx: Tensor | None, k_idx: Tensor | None,
        call: LayerCall, context: Context,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The same, with the tokens of other processes."""
        if q_idx is None or k_idx is None:
            return context.dense(q, k, v, self._scale), None
        if call.mode == "sparse":
            return context.attention(
                q, k, v, q_idx, k_idx, self.config, call.align, call.backend
            )  # fmt: skip
        out, kl = context.dense(q, k, v, self._scale), None
        if call.align:
            kl = context.align_densely(q, k, q_idx, k_idx, self.config, call.backend)
        return out, kl

    def _mix(self, mixing: Mixing, x: Tensor, call: LayerCall, cache: LayerCache | None) -> Tensor:
        counts = call.counts
        if call.context is not None:
            return mixing(x, counts, call.context.before(x, len(mixing.weight)))[0]
        if cache is None:
            return mixing(x, counts, x.new_zeros(len(counts), len(mixing.weight), x.shape[1]))[0]
        x, last = mixing(x, counts, cache.tails[call.slots])
        cache.tails[call.slots] = last.detach().to(cache.dtype)
        return x


__getattr__ = moved.names_of(__name__)
