"""The forward pass of a converted layer: first its index branch, then its attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import (
    MiniMaxM3VLSparseCacheLayer,
    MiniMaxM3VLSparseStaticCacheLayer,
)
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

import msa
from msa import ops
from msa.dispatch import BackendName
from msa.integrations import calls, messages
from msa.integrations.index_projections import IndexProjections
from msa.integrations.plan import Plan
from msa.integrations.transformers import BACKENDS, IndexBranch, attend_densely, uncompiled
from msa.ir import Selection, Sequences
from msa.recall import measure

CONVERTED = "converted layers (msa.integrations.convert)"
KINDS = (LlamaAttention, MistralAttention, Qwen2Attention, Qwen3Attention)


def index_of(attention: Any) -> IndexProjections | None:
    """The index branch of a layer, or None. Under an adapter it is the copy in use."""
    index = getattr(getattr(attention, "indexer", None), "active", None)
    return index if isinstance(index, IndexProjections) else None


def indexes(model: nn.Module) -> dict[int, IndexProjections]:
    """The index branch of each converted layer, by the layer's number."""
    layers = (m for m in model.modules() if isinstance(m, KINDS))
    found = ((layer.layer_idx, index_of(layer)) for layer in layers)
    return {number: index for number, index in found if index is not None}


def hand_over(
    attention: Any, args: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Run the index branch before the forward of a layer, and pass it to the attention function."""
    if attention.config._attn_implementation not in BACKENDS or index_of(attention) is None:
        return None
    return args, options | {"block_indices": run_index(attention, args, options)}


@uncompiled
def run_index(attention: Any, args: tuple[Any, ...], options: dict[str, Any]) -> TrainedBranch:
    """Index queries, and index keys with those of the cache."""
    call = calls.read_call(type(attention).forward, args, options)
    q_idx, k_idx = attention.indexer(call["hidden_states"], *call["position_embeddings"])
    index, k_idx, cache = attention.indexer.active, k_idx.transpose(1, 2), calls.cache_of(call)
    if cache is not None:
        k_idx = cache_layer(cache, attention.layer_idx).update_index(k_idx)
    return TrainedBranch(q_idx, k_idx[:, 0], index.config, index)


def cache_layer(cache: Any, layer: int) -> Any:
    """The cache of one layer, changed to the class of MiniMax-M3, which also keeps index keys."""
    while len(cache.layers) <= layer:
        cache.layers.append(DynamicLayer())
    kept: Any = cache.layers[layer]
    kind = type(kept)
    if kind is DynamicLayer:
        kept.__class__, kept.idx_keys = MiniMaxM3VLSparseCacheLayer, None
    elif kind is StaticLayer:
        kept.__class__, kept.idx_keys = MiniMaxM3VLSparseStaticCacheLayer, None
        kept.idx_cumulative_length = torch.tensor([0], dtype=torch.int64)
    messages.check_cache_layer(kept)
    return kept


@dataclass(frozen=True)
class TrainedBranch(IndexBranch):
    """The index branch of a converted layer. Its attention depends on the phase."""

    index: IndexProjections

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, backend: BackendName
    ) -> Tensor:
        """Sparse or dense attention, with the loss or the recall that the phase needs."""
        index, args = self.index, (q, k, v, plan, scale, backend)
        match index.phase:
            case "sparse":
                return self.run(*args).out
            case "train":
                output = self.run(*args, align=True)
                return self.keep(output.out, output.kl)
            case "warm_up":
                out = attend_densely(q, k, v, plan, scale)
                return self.keep(out, self.dense_loss(q, k, plan, scale, backend))
            case "measure":
                selection = self.select(plan, backend)
                index.recall = measure(q, k, selection, scale)
        return attend_densely(q, k, v, plan, scale)

    def keep(self, out: Tensor, kl: Tensor | None) -> Tensor:
        """Keep the loss for `index_loss`, and return out."""
        self.index.kl = kl
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        return out if kl is None or not several else Beside.apply(out, kl)

    def select(self, plan: Plan, backend: BackendName) -> Selection:
        """The selection of the phase "sparse"."""
        tensors = plan.pack_queries(self.q_idx), plan.pack_keys(self.k_idx)
        cu_q, cu_k = plan.cu_seqlens_q, plan.cu_seqlens_k
        if backend == "auto":
            ids = ops.select_blocks(*tensors, cu_q, cu_k, self.config)
            return Selection(ids, Sequences(cu_q, cu_k), self.config.block_size)
        return msa.select(
            *tensors, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, config=self.config, backend=backend
        )

    def dense_loss(
        self, q: Tensor, k: Tensor, plan: Plan, scale: float, backend: BackendName
    ) -> Tensor:
        """The warm-up form of the KL loss (R17), over all visible tokens."""
        tensors = q, k, plan.pack_queries(self.q_idx), plan.pack_keys(self.k_idx)
        config = replace(self.config, softmax_scale=scale)
        cu_q, cu_k = plan.cu_seqlens_q, plan.cu_seqlens_k
        if backend == "auto":
            return ops.align_index(*tensors, None, cu_q, cu_k, config=config)
        return msa.align_index(
            *tensors, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, config=config, backend=backend
        )


class Beside(torch.autograd.Function):
    """Returns out unchanged, and puts the loss into its graph, without a gradient to the loss.

    DistributedDataParallel(find_unused_parameters=True) searches the graph of a model's outputs for
    parameters. Without this function it would not find those of the index, and would not wait for
    their gradients.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, loss: Tensor) -> Tensor:
        """Return a view of out."""
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Pass the gradient of out on; the loss gets none."""
        return grads[0], None
