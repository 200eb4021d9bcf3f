"""vLLM's indexer, attention and metadata of MiniMax-M3, unchanged, behind stubs; one layer of them.

with vllm_files.loaded(folder) as engine:
    layer = engine.layer(heads=64, groups=4)             # as vLLM's model builds it
    step = engine.step(layer, batch)                      # as its runner builds the metadata
    theirs = layer.run(step)
    engine.plug_in(layer)                                 # what the plug-in does
    ours = layer.run(step)
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Generic, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.engine_files import function_of, load, modules_of, stub

T = TypeVar("T")
NAME = "model.layers.3.self_attn.attn"
PAGE = 128
ORDERS = ("LBHNC", "LBNHC", "BLHNC")
"""How vLLM may lay out pages of K and V: L layers, B pages, H heads, N tokens, C numbers."""


class Builder(Generic[T]):
    """vLLM's base of metadata builders, as far as its subclasses use it."""

    reorder_batch_threshold: int | None = None

    def __init__(self, spec: Any, names: list[str], config: Any, device: torch.device) -> None:
        self.kv_cache_spec, self.layer_names = spec, names
        self.vllm_config, self.device = config, device

    def _init_reorder_batch_threshold(self, threshold: int = 1, **_: Any) -> None:
        self.reorder_batch_threshold = max(threshold, 1 + self.vllm_config.drafts)


class Impl(Generic[T]):
    """vLLM's base of attention implementations."""


class Backend:
    """vLLM's base of attention backends."""

    @classmethod
    def supported_kv_cache_layouts(cls) -> None:
        """Any layout."""


def always(value: Any) -> Callable[..., Any]:
    """A function that returns this value."""

    def answer(*_: Any) -> Any:
        return value

    return answer


def is_hopper(capability: int | tuple[int, int]) -> bool:
    """What a platform of compute capability 9.0 answers."""
    return capability in (90, (9, 0))


def round_up(x: int, y: int) -> int:
    """The next multiple of y."""
    return -(-x // y) * y


def quant_mode(dtype: str) -> SimpleNamespace:
    """vLLM's kind of quantisation of a KV cache."""
    return SimpleNamespace(is_nvfp4=dtype == "nvfp4")


def is_quantized(dtype: str) -> bool:
    """Whether a KV cache has 8 bits."""
    return dtype.startswith("fp8")


def install_stubs(folder: Path, forward: Any, config: Any) -> None:
    """Every name that the files import, of vLLM and not of these files."""
    on_gpu = torch.cuda.is_available()
    platform = SimpleNamespace(
        is_rocm=lambda: False, is_cuda=lambda: True, supports_fp8=lambda: True,
        is_fp8_fnuz=lambda: False, fp8_dtype=lambda: torch.float8_e4m3fn,
        is_device_capability_family=always(False), is_arch_support_pdl=lambda: on_gpu,
        is_device_capability=is_hopper,
    )  # fmt: skip
    kinds = SimpleNamespace(UNIFORM_BATCH=1, LBHNC=1, LHBNC=2, INDEXER=3)
    log = SimpleNamespace(info_once=always(None), info=config.log.append_line)
    stub("vllm", __version__="0.33.0")
    stub("vllm.config", CacheConfig=object, VllmConfig=object,
         get_current_vllm_config=lambda: config)  # fmt: skip
    stub("vllm.config.attention", IndexerKVDType=str)
    stub("vllm.config.cache", CacheDType=str)
    stub("vllm.distributed", get_tensor_model_parallel_world_size=lambda: 1)
    stub("vllm.forward_context", get_forward_context=lambda: forward)
    stub("vllm.logger", init_logger=always(log))
    stub("vllm.model_executor.layers.attention_layer_base", AttentionLayerBase=type("L", (), {}))
    stub("vllm.platforms", current_platform=platform)
    stub("vllm._aiter_ops", rocm_aiter_ops=SimpleNamespace(
        is_enabled=lambda: False, is_shuffle_kv_cache_enabled=lambda: False))  # fmt: skip
    stub("vllm.triton_utils", tl=tl, triton=triton)
    stub("vllm.utils.math_utils", round_up=round_up)
    stub("vllm.v1.attention.backend", AttentionBackend=Backend, AttentionCGSupport=kinds,
         AttentionMetadata=type("Md", (), {}), AttentionMetadataBuilder=Builder,
         CommonAttentionMetadata=object, MultipleOf=int, AttentionImplBase=Impl,
         AttentionLayer=object)  # fmt: skip
    split = function_of(folder / "vllm/v1/attention/backends/utils.py",
                        "split_decodes_and_prefills", torch=torch)  # fmt: skip
    stub("vllm.v1.attention.backends.utils", split_decodes_and_prefills=split)
    stub("vllm.v1.kv_cache_interface", AttentionSpec=object, KVCacheSpec=object,
         MLAAttentionSpec=dict, SparseCacheRole=kinds, KVCacheLayout=kinds,
         get_kv_quant_mode=quant_mode,
         is_quantized_kv_cache=is_quantized)  # fmt: skip


class Log(list[str]):
    """What was logged."""

    def append_line(self, text: str, *args: object) -> None:
        """Add a formatted line."""
        self.append(text % args)


@dataclass(frozen=True)
class Batch:
    """New tokens and lengths of a batch; a length of 0 pads a graph. drafts: speculated tokens."""

    new: tuple[int, ...]
    lengths: tuple[int, ...]
    drafts: int = 0
    bounds: tuple[int, ...] | None = None
    """Lengths that the host knows; None means the lengths."""


class Layer:
    """One sparse layer, as vLLM's model builds it, with its pages."""

    def __init__(
        self, engine: Engine, heads: int, groups: int, dim: int, top_k: int, tokens: int,
        kv: str, index: str, sinks: int, device: str,
    ) -> None:  # fmt: skip
        engine.config.compilation_config.static_forward_context.clear()
        self.engine, self.layer_name, self.device = engine, NAME, device
        self.topk_indices_buffer = torch.full((tokens, groups, top_k), -7, dtype=torch.int32,
                                              device=device)  # fmt: skip
        self.attn_backend, impl = engine.attention.select_main_backend_and_impl_cls(
            topk_blocks=top_k, kv_cache_dtype=kv, num_kv_heads=groups
        )
        self.impl = impl(heads, dim, dim**-0.5, groups, kv_cache_dtype=kv, topk_blocks=top_k,
                         sparse_block_size=PAGE)  # fmt: skip
        self.indexer = engine.indexer.MiniMaxM3Indexer(
            num_kv_heads=groups, scale=dim**-0.5, topk_blocks=top_k, sparse_block_size=PAGE,
            num_index_heads=groups, index_head_dim=dim, prefix=NAME, init_blocks=sinks,
            local_blocks=1, indexer_kv_dtype=index, topk_indices_buffer=self.topk_indices_buffer,
        )  # fmt: skip
        self._k_scale = self._v_scale = torch.ones((), device=device)
        self.kv_cache = torch.empty(0)

    def modules(self) -> list[Any]:
        """This layer, as a model that has no other."""
        return [self]

    def run(self, q: Tensor, q_idx: Tensor, output: Tensor | None = None) -> Tensor:
        """What `_run_attention` of vLLM's layer does."""
        if output is None:
            output = torch.full_like(q, torch.nan)
        self.indexer(q_idx)
        return self.impl.forward(self, q, self.kv_cache, output)


class Engine:
    """vLLM's files, its configuration, and the metadata of the step that runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.forward = SimpleNamespace(attn_metadata=None)
        self.log = Log()
        self.config = SimpleNamespace(
            compilation_config=SimpleNamespace(static_forward_context={}), drafts=0, log=self.log,
            attention_config=SimpleNamespace(minimax_m3_indexer_cp=False),
            parallel_config=SimpleNamespace(decode_context_parallel_size=1),
            scheduler_config=SimpleNamespace(max_num_batched_tokens=2**17, max_num_seqs=64),
            speculative_config=None,
            model_config=SimpleNamespace(hf_config=SimpleNamespace(
                sparse_attention_config={"sparse_num_index_heads": 4})),
        )  # fmt: skip
        install_stubs(folder, self.forward, self.config)
        common = "vllm.models.minimax_m3.common"
        self.topk = load(folder, f"{common}.ops.index_topk")
        load(folder, f"{common}.ops.sparse_attn")
        self.indexer = load(folder, f"{common}.indexer")
        self.attention = load(folder, f"{common}.sparse_attention")
        self.layers = importlib.import_module("msa.integrations.vllm_layers")

    def layer(
        self, heads: int = 64, groups: int = 4, dim: int = 128, top_k: int = 16,
        tokens: int = 2**17, kv: str = "auto", index: str = "bf16", sinks: int = 0,
        device: str = "cuda",
    ) -> Layer:  # fmt: skip
        """A sparse layer."""
        return Layer(self, heads, groups, dim, top_k, tokens, kv, index, sinks, device)

    def plug_in(self, layer: Layer) -> None:
        """What the plug-in does to each sparse layer after vLLM built it."""
        self.exchange(layer, self.own_parts)
        self.layers.enable(layer, self.config)

    @property
    def own_parts(self) -> tuple[type, type, type]:
        """The classes of vLLM's attention, indexer and backend."""
        return (
            self.attention.MiniMaxM3SparseTritonImpl, self.indexer.MiniMaxM3IndexerTritonImpl,
            self.attention.MiniMaxM3SparseBackend,
        )  # fmt: skip

    def parts_of(self, layer: Layer) -> tuple[type, type, type]:
        """The classes that a layer has now."""
        return type(layer.impl), type(layer.indexer.impl), layer.attn_backend

    def exchange(self, layer: Layer, parts: tuple[type, type, type]) -> None:
        """Give a layer these classes."""
        layer.impl.__class__, layer.indexer.impl.__class__, layer.attn_backend = parts

    def common(self, batch: Batch, table: Tensor) -> Any:
        """vLLM's metadata of a step before its builders."""
        device, total = table.device, sum(batch.new)
        starts = torch.tensor([0, *batch.new], dtype=torch.int32).cumsum(0).to(torch.int32)
        lengths = torch.tensor(batch.lengths, dtype=torch.int32)
        bounds = torch.tensor(batch.bounds or batch.lengths, dtype=torch.int32)
        on_device, new = lengths.to(device), torch.tensor(batch.new, dtype=torch.int32).to(device)
        return SimpleNamespace(
            num_reqs=len(batch.new), num_actual_tokens=total, query_start_loc=starts.to(device),
            query_start_loc_cpu=starts, seq_lens=on_device, seq_lens_cpu_upper_bound=bounds,
            block_table_tensor=table, max_query_len=max(batch.new), max_seq_len=int(bounds.max()),
            slot_mapping=torch.zeros(total, dtype=torch.int64, device=device),
            compute_num_computed_tokens=lambda: on_device - new,
        )  # fmt: skip

    def build(self, layer: Layer, batch: Batch, table: Tensor) -> dict[str, Any]:
        """The metadata of a step, which then is the current one."""
        self.config.drafts = batch.drafts
        common = self.common(batch, table)
        made: dict[str, Any] = {}
        for name, builder in (
            (NAME, layer.attn_backend.get_builder_cls()),
            (f"{NAME}.index_cache", self.indexer.MiniMaxM3IndexerTritonMetadataBuilder),
        ):
            spec = SimpleNamespace(block_size=PAGE)
            made[name] = builder(spec, [name], self.config, table.device).build(0, common)
        self.forward.attn_metadata = made
        return made


@contextmanager
def loaded(folder: Path) -> Iterator[Engine]:
    """vLLM's files of an unpacked wheel; afterwards no module of them is left."""
    plug_in = [f"msa.integrations.{name}" for name in ("vllm_layers", "vllm_model")]
    with modules_of("vllm", *plug_in):
        yield Engine(folder)
