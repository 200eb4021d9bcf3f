"""The exchanged parts of a sparse layer of vLLM: its indexer, its attention, a step's tables.

    vLLM's layer     indexer.forward(index_query)     impl.forward(layer, query, kv_cache, output)
    decodes          scores of the blocks             select from them and attend, in one launch
    prefills         ids of the blocks                attend

vLLM calls both for each layer, one after the other, inside one graph or between two. What the first
gives to the second is an attribute of the indexer. Ids of blocks also go where vLLM keeps them.

vLLM puts decodes before prefills. The tables of the prefills are made once for a step, where vLLM
builds its metadata (`MsaBuilder`), and all layers share them. Nothing here reads the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.models.minimax_m3.common import indexer as theirs
from vllm.models.minimax_m3.common import sparse_attention as attention

import msa
from msa import serving
from msa.config import MSAConfig
from msa.integrations.engine_checks import check_gpu, refuse, warm_up_once
from msa.warming import powers

logger: Any = init_logger("vllm.msa_stack")


# -- once for a step ------------------------------------------------------------------------------
class MsaBuilder(attention.MiniMaxM3SparseMetadataBuilder):
    """vLLM's metadata, with the sequences of the prefills as `msa_sequences`."""

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False):
        """vLLM's host lengths are bounds; the lengths themselves stay on the device."""
        made = super().build(common_prefix_len, common_attn_metadata, fast_build)
        made.msa_sequences = None
        if made.num_prefills:
            first, common = made.num_decodes, common_attn_metadata
            borders = (common.query_start_loc_cpu[first:] - made.num_decode_tokens).tolist()
            bounds = common.seq_lens_cpu_upper_bound[first : common.num_reqs].tolist()
            made.msa_sequences = serving.sequences_of(borders, bounds, made.prefill.seq_lens)
        return made


class MsaBackend(attention.MiniMaxM3SparseBackend):
    """vLLM's backend, with this builder."""

    @staticmethod
    def get_builder_cls() -> type[MsaBuilder]:
        """The class that builds a step's metadata."""
        return MsaBuilder


# -- for each layer -------------------------------------------------------------------------------
@dataclass
class Pending:
    """What the indexer of a layer gives to its attention."""

    scores: serving.Scores | None = None
    selection: Any = None


class MsaIndexer(theirs.MiniMaxM3IndexerTritonImpl):
    """Scores the blocks for decodes, selects them for prefills."""

    msa_config: MSAConfig
    msa_heads: int
    msa_pending: Pending | None

    def forward(self, index_query: Tensor, **others: Any) -> tuple[None, None]:
        """Nothing is returned: the attention finds the results in `msa_pending`."""
        if others:
            refuse("vLLM", f"the indexer takes {sorted(others)}, which only ROCm uses")
        steps = get_forward_context().attn_metadata
        if not isinstance(steps, dict):
            return None, None  # vLLM measures its memory; there are no caches yet
        name = self.index_cache.prefix
        step, sequences = steps[name], steps[name.removesuffix(".index_cache")].msa_sequences
        pages = serving.IndexPages(self.index_cache.kv_cache)
        first, stop = step.num_decode_tokens, step.num_actual_tokens
        q_idx = index_query[:stop].view(-1, self.num_index_heads, self.index_head_dim)
        self.msa_pending = Pending()
        if step.num_decodes:
            part, lead = decode_part(step)
            self.msa_pending.scores = serving.score(
                q_idx[:first].view(*lead, *q_idx.shape[1:]), pages, part, self.msa_config,
                self.msa_heads,
            )  # fmt: skip
        if step.num_prefills:
            part = serving.PrefillPart(step.prefill.block_table, sequences)
            ids = self.topk_indices_buffer[first:stop]
            self.msa_pending.selection = serving.select(
                q_idx[first:], pages, part, self.msa_config, ids
            )
        return None, None


class MsaSparse(attention.MiniMaxM3SparseTritonImpl):
    """Attends to the selected blocks."""

    msa_config: MSAConfig
    msa_warm = False
    msa_batches: list[int]
    msa_queries: set[int]

    def forward(
        self, layer: Any, query: Tensor, kv_cache: Tensor, output: Tensor,
        *, query_fp8: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Writes output and, for decodes, the ids of the selected blocks."""
        steps = get_forward_context().attn_metadata
        if not isinstance(steps, dict):
            return output
        step = steps[layer.layer_name]
        first, stop = step.num_decode_tokens, step.num_actual_tokens
        q, out = (x[:stop].view(-1, self.num_heads, self.head_size) for x in (query, output))
        pages = self.msa_pages(layer, kv_cache)
        if not self.msa_warm:
            self.msa_warm = warm_up(layer, pages, step, query.dtype)
        indexer = layer.indexer.impl
        # taken away, so that a graph can use the memory of the scores for the next layer
        given, indexer.msa_pending = indexer.msa_pending, None
        if step.num_decodes:
            part, lead = decode_part(step)
            ids = layer.topk_indices_buffer[:first]
            serving.attend_scored(
                q[:first].view(*lead, *q.shape[1:]), pages, part, self.msa_config, given.scores,
                out[:first].view(*lead, *q.shape[1:]), ids.view(*lead, *ids.shape[1:]),
            )  # fmt: skip
        if step.num_prefills:
            part = serving.PrefillPart(step.prefill.block_table, step.msa_sequences)
            serving.attend_selected(
                q[first:], pages, part, given.selection, self.scale, out[first:]
            )
        return output

    def msa_pages(self, layer: Any, kv_cache: Tensor) -> serving.KVPages:
        """Views of keys and values, in any of the orders that vLLM may choose."""
        if self.use_fp8_kv:
            kv_cache = kv_cache.view(self.kv_cache_fp8_dtype)
        both = kv_cache.transpose(1, 2)
        scales = (layer._k_scale, layer._v_scale) if self.use_fp8_kv else (None, None)
        return serving.KVPages(both[..., : self.head_size], both[..., self.head_size :], *scales)


def warm_up(layer: Any, pages: serving.KVPages, step: Any, dtype: torch.dtype) -> bool:
    """Compile all kernels of these pages, before vLLM's first graph and its first request."""
    impl, indexer = layer.impl, layer.indexer.impl
    keys = indexer.index_cache.kv_cache
    table = (step.decode or step.prefill).block_table
    key = (pages.k.device, pages.k.stride(), pages.k.dtype, keys.stride(), table.stride())
    return warm_up_once(
        key,
        lambda: serving.warm_up_layer(
            pages, serving.IndexPages(keys), table, impl.num_heads, impl.msa_config,
            (dtype, keys.dtype), batches=impl.msa_batches, queries=impl.msa_queries,
        ),
        logger.info,
    )  # fmt: skip


def decode_part(step: Any) -> tuple[serving.DecodePart, tuple[int, int]]:
    """The decodes of vLLM's metadata, of the indexer or of the attention; batch and queries."""
    given = step.decode
    part = serving.DecodePart(given.block_table, given.seq_lens, given.decode_query_len)
    return part, (step.num_decodes, given.decode_query_len)


# -- the exchange ---------------------------------------------------------------------------------
def enable(model: nn.Module, vllm_config: Any) -> int:
    """Exchange the parts of every sparse layer of a model that vLLM built; how many there are.

    Raises:
        RuntimeError: something that these kernels cannot serve.
    """
    parts: list[Any] = list(model.modules())
    layers = [x for x in parts if isinstance(getattr(x, "indexer", None), theirs.MiniMaxM3Indexer)]
    for layer in layers:
        check_layer(layer, vllm_config)
    for layer in layers:
        impl, indexer = layer.impl, layer.indexer.impl
        config = MSAConfig(
            impl.block_size, impl.topk_blocks, sink_blocks=indexer.init_blocks,
            local_blocks=indexer.local_blocks, softmax_scale=impl.scale, index_scale=1.0,
        )  # fmt: skip
        impl.__class__, indexer.__class__, layer.attn_backend = MsaSparse, MsaIndexer, MsaBackend
        impl.msa_config = indexer.msa_config = config
        drafts = vllm_config.speculative_config
        impl.msa_queries = {1, 1 + (drafts.num_speculative_tokens if drafts else 0)}
        impl.msa_batches = powers(vllm_config.scheduler_config.max_num_seqs)
        indexer.msa_heads, indexer.msa_pending = impl.num_heads, None
    if layers:
        impl, indexer = layers[0].impl, layers[0].indexer.impl
        logger.info(
            "msa-stack %s serves the %d sparse layers of %s: KV cache %s, index keys %s, %d query "
            "heads and %d groups on this rank, %d blocks of %d tokens. Other layers are vLLM's.",
            msa.__version__, len(layers), type(model).__name__, impl.kv_cache_dtype,
            indexer.indexer_kv_dtype, impl.num_heads, impl.num_kv_heads, impl.topk_blocks,
            impl.block_size,
        )  # fmt: skip
    return len(layers)


def check_layer(layer: Any, vllm_config: Any) -> None:
    """These kernels can serve a layer.

    Raises:
        RuntimeError: they cannot; the message says why.
    """
    impl, indexer = layer.impl, layer.indexer.impl
    check_gpu("vLLM")
    if vllm_config.attention_config.minimax_m3_indexer_cp:
        refuse("vLLM", "attention_config.minimax_m3_indexer_cp must be off, got on")
    if vllm_config.parallel_config.decode_context_parallel_size != 1:
        refuse("vLLM", "decode_context_parallel_size must be 1")
    for name, part, wanted in (
        ("attention", impl, attention.MiniMaxM3SparseTritonImpl),
        ("indexer", indexer, theirs.MiniMaxM3IndexerTritonImpl),
    ):
        if type(part) is not wanted:
            refuse("vLLM", f"the {name} must be {wanted.__name__}, got {type(part).__name__}")
    if indexer.score_type != "max":
        refuse("vLLM", f"sparse_score_type must be 'max', got {indexer.score_type!r}")
    if indexer.local_blocks < 1:
        refuse("vLLM", f"sparse_local_block must be at least 1, got {indexer.local_blocks}")
    if indexer.num_index_heads != impl.num_kv_heads:
        refuse(
            "vLLM", f"index heads must be as many as KV heads, {impl.num_kv_heads} on this rank, "
            f"got {indexer.num_index_heads}",
        )  # fmt: skip
    if layer.topk_indices_buffer is None:
        refuse("vLLM", "topk_indices_buffer must be a tensor, got None")
