"""MiniMax-M3 of Hugging Face with the attention of this project, in one of two ways.

    register()      makes attn_implementation="msa" available. The indexer of transformers selects,
                    with scores of every query and key; attention over the selected blocks runs
                    here. "msa_torch" and "msa_reference" do the same on the named backend.
    enable(model)   the selection runs here too, so no tensor of size [heads, T, T] or [T, blocks]
                    is built.

Both support prefill, generate() with dynamic and static caches, padding on the right, gradients.
Padding on the left and packed sequences (position_ids that start again) need enable(), because the
indexer of transformers counts blocks from the start of a row, and R3 from the first token of a
sequence. Calls that are not supported raise an error that says what to do. Layers without an
indexer use the causal attention of torch. torch.compile leaves attention and indexer out of its
graphs; see `uncompiled`.

>>> import transformers
>>> from msa.integrations.transformers import enable
>>> config = transformers.MiniMaxM3VLTextConfig(
...     vocab_size=50, hidden_size=16, intermediate_size=8, num_hidden_layers=1, head_dim=8,
...     num_attention_heads=2, num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1,
...     shared_intermediate_size=8, layer_types=["minimax_m3_sparse"], index_n_heads=1,
...     index_head_dim=8, index_block_size=4, index_topk_blocks=2, bos_token_id=1, eos_token_id=2)
>>> model = enable(transformers.MiniMaxM3VLForCausalLM(config))
>>> model(torch.arange(20)[None]).logits.shape
torch.Size([1, 20, 50])
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import (
    MiniMaxM3VLAttention,
    MiniMaxM3VLIndexer,
    apply_rotary_pos_emb,
)

import msa
from msa import ops
from msa.config import MSAConfig
from msa.dispatch import BackendName
from msa.integrations import calls, layouts, messages
from msa.integrations.plan import LastPlan, Plan
from msa.ir import Output, Sequences

BACKENDS: dict[str, BackendName] = {
    "msa": "auto",
    "msa_torch": "torch",
    "msa_reference": "reference",
}
LAST_PLAN = LastPlan()
"""The plan that all layers of one forward pass share."""
M = TypeVar("M", bound=nn.Module)
uncompiled: Any = torch.compiler.disable(
    reason="msa reads the mask and the positions, so this part runs between graphs: compile "
    "without fullgraph=True, export with attn_implementation='sdpa', or build a graph of msa.ops, "
    "where borders of sequences are integers"
)
"""A decorator for functions that read numbers of tensors, so torch.compile must leave them out.

Under fullgraph=True the error of torch says the reason.
"""


def register() -> None:
    """Register the names "msa", "msa_torch" and "msa_reference" in transformers.

    >>> register()
    >>> "msa" in AttentionInterface().valid_keys()
    True
    """
    for name, backend in BACKENDS.items():
        AttentionInterface.register(name, partial(attention_forward, backend))
        AttentionMaskInterface.register(name, seen_tokens)


def enable(model: M, implementation: str = "msa") -> M:
    """Let every MiniMax-M3 attention of a model select and attend here; returns the model.

    Weights and their names stay. `model.set_attn_implementation("eager")` switches back, both the
    attention and the selection.

    Raises:
        TypeError: the model has no MiniMax-M3 attention.
        ValueError: the implementation is unknown, the index heads do not divide the groups, or the
            model is tensor-parallel.
    """
    register()
    messages.check_implementation(implementation, tuple(BACKENDS))
    found = [m for m in model.modules() if isinstance(m, MiniMaxM3VLAttention)]
    messages.check_has_layers(len(found), "MiniMaxM3VLAttention layers", model)
    calls.check_whole(model)
    # search the whole model: an adapter may have wrapped the indexer of an attention
    indexers = [m for m in model.modules() if isinstance(m, MiniMaxM3VLIndexer)]
    for indexer in indexers:
        messages.check_index_heads(indexer.num_heads, indexer.config.num_key_value_heads)
        config_of(indexer)  # raises an error if a size is out of range
    for attention in found:
        attention.config._attn_implementation = implementation
    for indexer in indexers:
        indexer.__class__ = Indexer
    return model


@dataclass(frozen=True)
class IndexBranch:
    """The tensors by which the attention selects blocks. The indexer returns it in place of ids."""

    q_idx: Tensor
    """Index queries [B, T, Hkv, Di]."""
    k_idx: Tensor
    """Index keys [B, n_k or longer, Di]."""
    config: MSAConfig

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, backend: BackendName
    ) -> Tensor:
        """Select and attend: packed q, k, v to packed out."""
        return self.run(q, k, v, plan, scale, backend).out

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, backend: BackendName,
        align: bool = False,
    ) -> ops.Attended | Output:  # fmt: skip
        """Select and attend in one call; with align=True also compute the KL loss (R17)."""
        messages.check_groups(self.q_idx.shape[2], k.shape[1])
        q_idx, k_idx = plan.pack_queries(self.q_idx), plan.pack_keys(self.k_idx)
        config = replace(self.config, softmax_scale=scale)
        cu_q, cu_k = plan.cu_seqlens_q, plan.cu_seqlens_k
        if backend == "auto":
            return ops.attention(q, k, v, q_idx, k_idx, cu_q, cu_k, config, align)
        return msa.attention(
            q, k, v, q_idx, k_idx, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, config=config,
            align=align, backend=backend,
        )  # fmt: skip


class Indexer(MiniMaxM3VLIndexer):
    """The indexer of transformers without its scores: it returns an IndexBranch."""

    def forward(self, *args: Any, **options: Any) -> Any:
        """The IndexBranch; with an attention of transformers its own block_indices."""
        if self.config._attn_implementation not in BACKENDS:
            return super().forward(*args, **options)
        return self.branch(args, options)

    @uncompiled
    def branch(self, args: tuple[Any, ...], options: dict[str, Any]) -> IndexBranch:
        """Index queries, and index keys with those of the cache."""
        call = calls.read_call(MiniMaxM3VLIndexer.forward, args, options)
        hidden_states, cache = call["hidden_states"], calls.cache_of(call)
        lead = hidden_states.shape[:2]
        q_idx = self.q_norm(self.q_proj(hidden_states).view(*lead, -1, self.head_dim))
        k_idx = self.k_norm(self.k_proj(hidden_states).view(*lead, 1, self.head_dim))
        cos, sin = (x[..., : self.head_dim] for x in call["position_embeddings"])
        q_idx, k_idx = apply_rotary_pos_emb(q_idx, k_idx, cos, sin, unsqueeze_dim=2)
        k_idx = k_idx.transpose(1, 2)
        if cache is not None:
            k_idx = cache.layers[self.layer_idx].update_index(k_idx)
        groups = self.config.num_key_value_heads // self.num_heads
        return IndexBranch(q_idx.repeat_interleave(groups, 2), k_idx[:, 0], config_of(self))


def config_of(indexer: MiniMaxM3VLIndexer) -> MSAConfig:
    """The MSAConfig of an indexer of transformers. Its scores are not scaled."""
    sizes = indexer.block_size, indexer.topk_blocks
    return MSAConfig(*sizes, local_blocks=indexer.local_blocks, index_scale=1.0)


# -- called by transformers -----------------------------------------------------------------------
@uncompiled
def seen_tokens(
    batch_size: int, q_length: int, kv_length: int, q_offset: Any = 0,
    attention_mask: Tensor | None = None, device: Any = None, **_: Any,
) -> Tensor | None:  # fmt: skip
    """The mask for the layers: bool [B, tokens seen], or None if all keys are seen."""
    messages.check_not_traced(calls.is_traced(q_offset, attention_mask))
    messages.check_mask_form(attention_mask)
    seen = int(q_offset) + q_length
    if attention_mask is None:
        return None if seen == kv_length else torch.ones(batch_size, seen, device=device).bool()
    messages.check_mask_length(attention_mask, seen)
    mask = attention_mask[:, :seen].bool()
    return None if seen == kv_length and bool(mask.all()) else mask


@uncompiled
def attention_forward(
    backend: BackendName, module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
    attention_mask: Tensor | None, scaling: float | None = None, dropout: float = 0.0,
    block_indices: Tensor | IndexBranch | None = None, position_ids: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The attention function for transformers: query [B, Hq, T, D] to out [B, T, Hq, Dv].

    Raises:
        ValueError: there is padding between tokens, a mask of another form, dropout, a sliding
            window, or a graph is being exported; see `messages`.
    """
    if not getattr(module, "is_causal", True):  # a vision tower with the same attn_implementation
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **options
        )
    messages.check_plain_attention(dropout, options)
    messages.check_not_traced(calls.is_traced(query, attention_mask, position_ids))
    messages.check_mask_form(attention_mask)
    batch, _, n_q, dim = query.shape
    if position_ids is None:
        n_k = key.shape[2] if attention_mask is None else attention_mask.shape[1]
        position_ids = torch.arange(n_k - n_q, n_k, device=query.device)
    plan = LAST_PLAN.get(position_ids, attention_mask, batch, key.shape[2])
    q = plan.pack_queries(query.transpose(1, 2))
    k, v = (plan.pack_keys(x.transpose(1, 2)) for x in (key, value))
    scale = dim**-0.5 if scaling is None else scaling
    if block_indices is None:
        out = attend_densely(q, k, v, plan, scale)
    elif isinstance(block_indices, IndexBranch):
        out = block_indices.attend(q, k, v, plan, scale, backend)
    else:
        block_size: int = getattr(module, "indexer").block_size  # noqa: B009
        out = attend_blocks(q, k, v, block_indices, block_size, plan, scale, backend)
    return plan.unpack(out), None


# -- attention over given blocks, and dense attention, on packed tensors ---------------------------
def attend_blocks(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, block_size: int, plan: Plan,
    scale: float, backend: BackendName,
) -> Tensor:  # fmt: skip
    """Check the blocks that the indexer of transformers selected (R8), and attend to them."""
    messages.check_not_packed(plan.packs)
    messages.check_not_shifted(plan.first)
    messages.check_index_heads(block_indices.shape[1], k.shape[1])
    ids = plan.pack_queries(block_indices.transpose(1, 2))
    ids = ids.repeat_interleave(k.shape[1] // ids.shape[1], 1)
    sequences = Sequences(plan.cu_seqlens_q, plan.cu_seqlens_k)
    selection = layouts.canonical(ids, sequences, block_size)
    if backend == "auto":
        return ops.sparse_attention(
            q, k, v, selection.indices, plan.cu_seqlens_q, plan.cu_seqlens_k,
            block_size=block_size, softmax_scale=scale,
        )[0]  # fmt: skip
    return msa.sparse_attention(q, k, v, selection, softmax_scale=scale, backend=backend).out


def attend_densely(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> Tensor:
    """Dense causal attention, for one sequence after another (R2)."""
    outs = []
    for queries, keys in Sequences(plan.cu_seqlens_q, plan.cu_seqlens_k).spans():
        one = (x.transpose(0, 1)[None] for x in (q[queries], k[keys], v[keys]))
        n_q, n_k = queries.stop - queries.start, keys.stop - keys.start
        whole, last = n_q == n_k, n_q == 1
        mask = None if whole or last else causal_lower_right(n_q, n_k)
        out = scaled_dot_product_attention(
            *one, attn_mask=mask, is_causal=whole and not last, scale=scale, enable_gqa=True
        )
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)
