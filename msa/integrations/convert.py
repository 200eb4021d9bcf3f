"""Hugging Face decoders with grouped-query attention, turned into MSA.

    convert(model)          index projections beside the attention of some layers; weights untouched
    warm_up(model, ids)     trains the projections alone, by the KL of dense attention (R17)
    set_phase(model, ...)   what these layers do: "sparse", or one of the phases of training
    index_loss(model)       the loss of the last forward pass, to be added to the model's own
    measure_recall(...)     how many of the best blocks each layer finds
    remove_index(model)     takes the projections away again

Llama, Mistral, Qwen2 and Qwen3, by the class of their attention. With k >= all blocks the logits
are those of the model before (R11). The projections follow MiniMax-M3's: linear, RMS norm, rotary;
they read a detached hidden state (eq. 11). `model.set_attn_implementation("sdpa")` goes back.

>>> import transformers
>>> from msa.integrations.convert import convert, index_loss, measure_recall, warm_up
>>> config = transformers.LlamaConfig(
...     vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
...     num_attention_heads=4, num_key_value_heads=2)
>>> ids, model = torch.arange(40)[None], transformers.LlamaForCausalLM(config)
>>> dense = model(ids).logits
>>> model = convert(model, MSAConfig(block_size=4, top_k=10), layers=[1])  # all ten blocks
>>> bool(((model(ids).logits - dense).abs() < 1e-5).all())
True
>>> [sorted(loss) for loss in warm_up(model, [ids, ids])]  # two steps, one layer
[[1], [1]]
>>> measure_recall(model, ids)[1].blocks
1.0
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import (
    MiniMaxM3VLSparseCacheLayer,
    MiniMaxM3VLSparseStaticCacheLayer,
    apply_rotary_pos_emb,
)
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

import msa
from msa import ops
from msa.config import MSAConfig
from msa.dispatch import BackendName
from msa.integrations import calls, messages
from msa.integrations.plan import Plan
from msa.integrations.transformers import (
    BACKENDS,
    IndexBranch,
    attend_densely,
    register,
    uncompiled,
)
from msa.ir import Selection, Sequences
from msa.recall import Recall, measure

CONVERTED = "converted layers (msa.integrations.convert)"
KINDS = (LlamaAttention, MistralAttention, Qwen2Attention, Qwen3Attention)
Phase = Literal["sparse", "train", "warm_up", "measure"]
M = TypeVar("M", bound=nn.Module)


class IndexProjections(nn.Module):
    """The index branch of one layer, and what it last found out.

    Its projections are plain parameters with names of their own: what looks for `nn.Linear` or for
    names that end in q_proj, as adapters (LoRA) and quantisation do, leaves them alone.
    """

    OLD_NAMES: ClassVar = {
        "q_proj.weight": "query", "k_proj.weight": "key",
        "q_norm.weight": "query_norm.weight", "k_norm.weight": "key_norm.weight",
    }  # fmt: skip
    """Names that files before this release have; they are read as well."""

    def __init__(
        self, groups: int, dim: int, width: int, config: MSAConfig, **options: Any
    ) -> None:
        super().__init__()
        self.config, self.groups = config, groups
        self.query = nn.Parameter(torch.empty(groups * dim, width, **options))
        self.key = nn.Parameter(torch.empty(dim, width, **options))
        for weight in (self.query, self.key):
            nn.init.kaiming_uniform_(weight, a=5**0.5)  # as nn.Linear
        self.query_norm, self.key_norm = (nn.RMSNorm(dim, eps=1e-6, **options) for _ in range(2))
        self.phase: Phase = "sparse"
        self.kl: Tensor | None = None
        self.recall: Recall | None = None

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden [B, T, width] to q_idx [B, T, Hkv, Di] and k_idx [B, T, 1, Di]."""
        hidden = hidden.detach().to(self.query.dtype)
        q_idx = self.query_norm(linear(hidden, self.query).unflatten(-1, (self.groups, -1)))
        k_idx = self.key_norm(linear(hidden, self.key)[:, :, None])
        cos, sin = (narrow(x, q_idx.shape[-1]) for x in (cos, sin))
        q_idx, k_idx = apply_rotary_pos_emb(q_idx, k_idx, cos, sin, unsqueeze_dim=2)
        return q_idx, k_idx

    @property
    def active(self) -> IndexProjections:
        """Itself; an adapter that wraps it (peft's modules_to_save) hands on the copy in use."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without the last loss, which belongs to a graph."""
        return super().__getstate__() | {"kl": None}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **options: Any
    ) -> None:
        for old, new in self.OLD_NAMES.items():
            if prefix + old in state_dict:
                state_dict[prefix + new] = state_dict.pop(prefix + old)
        super()._load_from_state_dict(state_dict, prefix, *args, **options)


class Beside(torch.autograd.Function):
    """Out as it is, with a loss beside it in its graph, to which no gradient flows from there.

    DistributedDataParallel(find_unused_parameters=True) looks for parameters behind a model's
    outputs, and takes the others for unused: it would not wait for the gradients of the index.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, loss: Tensor) -> Tensor:
        """A view of out."""
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Straight through."""
        return grads[0], None


def narrow(x: Tensor, dim: int) -> Tensor:
    """Cosines or sines [B, T, R] for heads of dim: evenly spaced frequencies, each for two places.

    >>> narrow(torch.tensor([[[1, 2, 3, 4, 1, 2, 3, 4]]]), 4)
    tensor([[[1, 3, 1, 3]]])
    """
    if x.shape[-1] <= dim:
        return x
    half = x[..., : x.shape[-1] // 2]
    places = torch.arange(dim // 2, device=x.device) * half.shape[-1] // (dim // 2)
    return torch.cat([half[..., places]] * 2, -1)


@dataclass(frozen=True)
class TrainedBranch(IndexBranch):
    """What a converted layer's attention is given; what it does depends on the phase."""

    index: IndexProjections

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, backend: BackendName
    ) -> Tensor:
        """Sparse or dense attention, and beside it what the phase asks for."""
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
        """Keep the loss for `index_loss`; returns out."""
        self.index.kl = kl
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        return out if kl is None or not several else Beside.apply(out, kl)

    def select(self, plan: Plan, backend: BackendName) -> Selection:
        """What "sparse" would attend to."""
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
        """The warm-up form of R17: over all visible tokens."""
        tensors = q, k, plan.pack_queries(self.q_idx), plan.pack_keys(self.k_idx)
        config = replace(self.config, softmax_scale=scale)
        cu_q, cu_k = plan.cu_seqlens_q, plan.cu_seqlens_k
        if backend == "auto":
            return ops.align_index(*tensors, None, cu_q, cu_k, config=config)
        return msa.align_index(
            *tensors, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, config=config, backend=backend
        )


# -- conversion -----------------------------------------------------------------------------------
def convert(
    model: M,
    config: MSAConfig = MSAConfig(),
    layers: Sequence[int] | None = None,
    index_dim: int | None = None,
    implementation: str = "msa",
) -> M:
    """Give some layers an index branch, and all the attention of this project; returns the model.

    Args:
        config: block size, blocks kept; a softmax_scale is the model's own business.
        layers: which ones; None: all but the first, which looks at bytes rather than meaning.
        index_dim: Di, even; None: the model's head size.
        implementation: "msa", "msa_torch" or "msa_reference", as in `transformers.register`.

    The projections are new parameters, `...self_attn.indexer.*`, random by torch's generator. They
    choose little better than chance until they are trained. They lie where the layer's weights do,
    in the dtype that the model computes in, also where the layer's weights are quantised.

    Raises:
        TypeError: no attention of a known class.
        ValueError: a model that is converted already, is tensor-parallel, has its weights on the
            meta device or holds several decoders; no such layer, sliding windows, an odd index_dim.
    """
    register()
    messages.check_implementation(implementation, tuple(BACKENDS))
    layers_here = [m for m in model.modules() if isinstance(m, KINDS)]
    found = {m.layer_idx: m for m in layers_here}
    messages.check_has_layers(len(found), f"{', '.join(k.__name__ for k in KINDS)} layers", model)
    messages.check_one_decoder([m.layer_idx for m in layers_here])
    messages.check_not_converted(sorted(indexes(model)))
    calls.check_whole(model)
    chosen = sorted(found)[1:] if layers is None else list(layers)
    messages.check_chosen_layers(chosen, sorted(found))
    for attention in found.values():
        messages.check_no_window(attention)
    made = {layer: make_index(found[layer], config, index_dim, model) for layer in chosen}
    for layer, index in made.items():
        attention = found[layer]
        attention.indexer = index
        if hand_over not in attention._forward_pre_hooks.values():  # from an index that was removed
            attention.register_forward_pre_hook(hand_over, with_kwargs=True)
    for attention in found.values():
        attention.config._attn_implementation = implementation
    return model


def make_index(
    attention: Any, config: MSAConfig, index_dim: int | None, model: nn.Module
) -> IndexProjections:
    """Random projections for one layer, on its device, in the dtype that the model computes in."""
    dim = attention.head_dim if index_dim is None else index_dim
    messages.check_index_dim(dim)
    own = next(
        chain(attention.parameters(), attention.buffers())
    )  # quantised: perhaps no parameter
    messages.check_loaded(own.device.type, attention.layer_idx)
    text = attention.config
    options = {"dtype": compute_dtype(own, model), "device": own.device}
    return IndexProjections(text.num_key_value_heads, dim, text.hidden_size, config, **options)


def compute_dtype(own: Tensor, model: nn.Module) -> torch.dtype:
    """That of the layer's weights; where they are quantised, of the model's first one that is not.

    >>> own = torch.zeros(1, dtype=torch.int8)
    >>> compute_dtype(own, nn.ModuleList([nn.LayerNorm(2, dtype=torch.bfloat16)]))
    torch.bfloat16
    """
    wide = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    found = [x.dtype for x in (own, *model.parameters())]
    messages.check_compute_dtype(found, wide)
    return next(dtype for dtype in found if dtype in wide)


def remove_index(model: M) -> M:
    """Take every index branch away, so that `convert` can begin anew; returns the model.

    Attention is dense afterwards. It is this project's until another one is chosen by
    `model.set_attn_implementation`.

    Raises:
        TypeError: a model that is not converted.
    """
    found = {m: index_of(m) for m in model.modules() if isinstance(m, KINDS)}
    converted = [m for m, index in found.items() if index is not None]
    messages.check_has_layers(len(converted), CONVERTED, model)
    for attention in converted:
        del attention.indexer
    return model


def hand_over(
    attention: Any, args: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before a converted layer's forward: run its index branch, for the attention function."""
    if attention.config._attn_implementation not in BACKENDS or index_of(attention) is None:
        return None
    return args, options | {"block_indices": run_index(attention, args, options)}


@uncompiled
def run_index(attention: Any, args: tuple[Any, ...], options: dict[str, Any]) -> TrainedBranch:
    """What the attention selects by, the index keys of the cache included."""
    call = calls.read_call(type(attention).forward, args, options)
    q_idx, k_idx = attention.indexer(call["hidden_states"], *call["position_embeddings"])
    index, k_idx, cache = attention.indexer.active, k_idx.transpose(1, 2), calls.cache_of(call)
    if cache is not None:
        k_idx = cache_layer(cache, attention.layer_idx).update_index(k_idx)
    return TrainedBranch(q_idx, k_idx[:, 0], index.config, index)


def cache_layer(cache: Any, layer: int) -> Any:
    """The cache of one layer, made one that keeps index keys as well: MiniMax-M3's."""
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


# -- training -------------------------------------------------------------------------------------
def index_of(attention: Any) -> IndexProjections | None:
    """The index branch of a layer, if it has one; under an adapter the copy in use."""
    index = getattr(getattr(attention, "indexer", None), "active", None)
    return index if isinstance(index, IndexProjections) else None


def indexes(model: nn.Module) -> dict[int, IndexProjections]:
    """The index branch of each converted layer, by the layer's number."""
    layers = (m for m in model.modules() if isinstance(m, KINDS))
    found = ((layer.layer_idx, index_of(layer)) for layer in layers)
    return {number: index for number, index in found if index is not None}


def set_phase(model: nn.Module, phase: Phase) -> None:
    """What converted layers do from now on.

    "sparse" selects and attends; "train" the same and finds the loss of what it selected;
    "warm_up" attends densely and finds the loss over all tokens; "measure" attends densely and
    compares what it would select with the best there is.

    Raises:
        TypeError, ValueError: a model that is not converted, an unknown phase.
    """
    messages.check_phase(phase)
    found = indexes(model)
    messages.check_has_layers(len(found), CONVERTED, model)
    for index in found.values():
        index.phase, index.kl, index.recall = phase, None, None


def index_losses(model: nn.Module) -> dict[int, Tensor]:
    """The loss of each converted layer in the last forward pass of "train" or "warm_up"."""
    return {layer: index.kl for layer, index in indexes(model).items() if index.kl is not None}


def index_loss(model: nn.Module) -> Tensor:
    """Their mean, to be added to the model's own loss; gradients reach the projections alone.

    Raises:
        TypeError: no forward pass in "train" or "warm_up" before.
        ValueError: gradients are wanted, and that pass ran under no_grad, as under gradient
            checkpointing with use_reentrant=True.
    """
    losses = index_losses(model)
    messages.check_has_layers(len(losses), "had a forward pass in phase train or warm_up", model)
    if torch.is_grad_enabled():
        learning = {layer for layer, index in indexes(model).items() if index.query.requires_grad}
        still = [n for n, loss in losses.items() if n in learning and not loss.requires_grad]
        messages.check_loss_has_gradient(still)
    return torch.stack(list(losses.values())).mean()


def warm_up(
    model: nn.Module, batches: Iterable[Tensor], learning_rate: float = 1e-3
) -> Iterator[dict[int, float]]:
    """Train the index projections alone, a step for each batch of ids [B, T]: yields the losses.

    Attention is dense meanwhile, so the model computes what it did before the conversion; nothing
    else of it moves. Afterwards it is in phase "sparse".
    """
    kept = {p: p.requires_grad for p in model.parameters()}
    own = [p for index in indexes(model).values() for p in index.parameters()]
    set_phase(model, "warm_up")
    optimizer = torch.optim.AdamW(own, learning_rate, weight_decay=0.0)
    try:
        for p in kept:
            p.requires_grad_(False)
        for p in own:
            p.requires_grad_(True)
        for ids in batches:
            optimizer.zero_grad()
            model(ids, use_cache=False)
            index_loss(model).backward()
            optimizer.step()
            yield {layer: loss.item() for layer, loss in index_losses(model).items()}
    finally:
        for p, wanted in kept.items():
            p.requires_grad_(wanted)
        set_phase(model, "sparse")


@torch.no_grad()
def measure_recall(model: nn.Module, ids: Tensor) -> dict[int, Recall]:
    """For each converted layer how many of the best blocks it finds in ids [B, T].

    Attention is dense meanwhile; afterwards the model is in the phase "sparse".
    """
    set_phase(model, "measure")
    model(ids, use_cache=False)
    found = {layer: index.recall for layer, index in indexes(model).items()}
    set_phase(model, "sparse")
    return {layer: recall for layer, recall in found.items() if recall is not None}
