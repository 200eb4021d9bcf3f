"""Convert Hugging Face decoders with grouped-query attention to MSA.

    convert(model)          adds index projections to some layers; the model's weights stay
    warm_up(model, ids)     trains only the projections, by the KL loss of dense attention (R17)
    set_phase(model, ...)   sets what these layers do: "sparse", or one of the phases of training
    index_loss(model)       the KL loss of the last forward pass, to add to the model's own loss
    measure_recall(...)     the share of the best blocks that each layer finds
    remove_index(model)     removes the projections again

Llama, Mistral, Qwen2 and Qwen3 are supported; they are recognised by their class of attention. If k
is at least the number of blocks, the logits equal those of the dense model (R11). The projections
are those of MiniMax-M3: linear, RMS norm, rotary embedding. They read a detached hidden state
(eq. 11). `model.set_attn_implementation("sdpa")` switches back to dense attention.

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

from collections.abc import Sequence
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from msa.config import MSAConfig
from msa.integrations import calls, messages
from msa.integrations.converted_layers import CONVERTED, KINDS, hand_over, index_of, indexes
from msa.integrations.index_projections import IndexProjections
from msa.integrations.index_training import (
    index_loss,
    index_losses,
    measure_recall,
    set_phase,
    warm_up,
)
from msa.integrations.transformers import BACKENDS, register

__all__ = [
    "IndexProjections",
    "convert",
    "index_loss",
    "index_losses",
    "indexes",
    "measure_recall",
    "remove_index",
    "set_phase",
    "warm_up",
]
M = TypeVar("M", bound=nn.Module)


def convert(
    model: M, config: MSAConfig = MSAConfig(), layers: Sequence[int] | None = None,
    index_dim: int | None = None, implementation: str = "msa",
) -> M:  # fmt: skip
    """Add an index branch to some layers of a model; returns the model.

    The attention of all layers runs in this project afterwards.

    Args:
        config: block size and number of blocks. Its softmax_scale is not used, but the model's.
        layers: the numbers of the layers; None means all but the first.
        index_dim: Di, an even number; None means the model's head size.
        implementation: "msa", "msa_torch" or "msa_reference", as in `transformers.register`.

    The projections are new parameters, `...self_attn.indexer.*`, drawn from the generator of torch.
    Until they are trained, their choice is little better than chance. They are on the device of the
    layer's weights, in the dtype in which the model computes, even if its weights are quantised.

    Raises:
        TypeError: the model has no attention of a supported class.
        ValueError: the model is already converted, is tensor-parallel, has its weights on the meta
            device, holds several decoders or has sliding windows; a layer does not exist; index_dim
            is odd.
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
        if (
            hand_over not in attention._forward_pre_hooks.values()
        ):  # it may be there from a removed index
            attention.register_forward_pre_hook(hand_over, with_kwargs=True)
    for attention in found.values():
        attention.config._attn_implementation = implementation
    return model


def make_index(
    attention: Any, config: MSAConfig, index_dim: int | None, model: nn.Module
) -> IndexProjections:
    """Random projections for one layer, on its device, in the dtype in which the model computes."""
    dim = attention.head_dim if index_dim is None else index_dim
    messages.check_index_dim(dim)
    # a quantised layer may have no parameters
    own = next(chain(attention.parameters(), attention.buffers()))
    messages.check_loaded(own.device.type, attention.layer_idx)
    text = attention.config
    options = {"dtype": compute_dtype(own, model), "device": own.device}
    return IndexProjections(text.num_key_value_heads, dim, text.hidden_size, config, **options)


def compute_dtype(own: Tensor, model: nn.Module) -> torch.dtype:
    """The dtype of the layer's weights; if they are quantised, that of the first other weight.

    >>> own = torch.zeros(1, dtype=torch.int8)
    >>> compute_dtype(own, nn.ModuleList([nn.LayerNorm(2, dtype=torch.bfloat16)]))
    torch.bfloat16
    """
    wide = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    found = [x.dtype for x in (own, *model.parameters())]
    messages.check_compute_dtype(found, wide)
    return next(dtype for dtype in found if dtype in wide)


def remove_index(model: M) -> M:
    """Remove every index branch, so that `convert` can be called again; returns the model.

    Attention is dense afterwards. It still runs here, until `model.set_attn_implementation` chooses
    another one.

    Raises:
        TypeError: the model is not converted.
    """
    found = {m: index_of(m) for m in model.modules() if isinstance(m, KINDS)}
    converted = [m for m, index in found.items() if index is not None]
    messages.check_has_layers(len(converted), CONVERTED, model)
    for attention in converted:
        del attention.indexer
    return model
