"""Tiny models of Hugging Face's MiniMax-M3, and the ways to change their attention."""

from __future__ import annotations

import copy
import inspect
import sys

import pytest
import torch
from hypothesis import strategies as st

if sys.version_info < (3, 11):
    pytest.skip("transformers 5.23 needs Python 3.11", allow_module_level=True)

from transformers import MiniMaxM3VLTextConfig as TextConfig
from transformers.models.minimax_m3_vl import (
    MiniMaxM3VLForCausalLM,
)

from msa.integrations import calls
from msa.integrations.transformers import enable, register

BOUND = 1e-4
SMALL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
    "dense_intermediate_size": 48, "shared_intermediate_size": 16, "index_n_heads": 2,
    "index_head_dim": 12, "index_block_size": 8, "index_topk_blocks": 3, "pad_token_id": 0,
    "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2,
    "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
}  # fmt: skip
WAYS = {
    "msa": lambda model: model.set_attn_implementation("msa"),
    "msa_torch": lambda model: model.set_attn_implementation("msa_torch"),
    "msa_reference": lambda model: model.set_attn_implementation("msa_reference"),
    "enabled": enable,
    "enabled, torch": lambda model: enable(model, "msa_torch"),
    "enabled, reference": lambda model: enable(model, "msa_reference"),
}
PADDED = [way for way in WAYS if way.startswith("enabled")]
GENERATED = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
CACHES = {
    "dynamic": {}, "static": {"cache_implementation": "static"}, "none": {"use_cache": False},
    "beams": {"num_beams": 2}, "static beams": {"num_beams": 3, "cache_implementation": "static"},
}  # fmt: skip
register()


def behind(model, cache):
    """The option by which this release of transformers takes a cache."""
    taken = inspect.signature(type(model).forward).parameters
    return {next(name for name in calls.CACHES if name in taken): cache, "use_cache": True}


def keep_activations_out(model, **options):
    """Checkpointing, under the name that this release of transformers has for it."""
    names = "activation_checkpointing_enable", "gradient_checkpointing_enable"
    next(getattr(model, name) for name in names if hasattr(model, name))(options or None)


def padded_rows(texts, left, width):
    """Texts as rows with so many zeros before each: ids and mask [B, width]."""
    ids = torch.zeros(len(texts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (text, start) in enumerate(zip(texts, left)):
        ids[row, start : start + len(text)] = text
        mask[row, start : start + len(text)] = 1
    return ids, mask


def text_config(layers="dmm", **options):
    """One letter per layer: dense or MSA."""
    kinds = {
        "num_hidden_layers": len(layers),
        "layer_types": [{"d": "full_attention", "m": "minimax_m3_sparse"}[a] for a in layers],
        "mlp_layer_types": ["dense", *["sparse"] * (len(layers) - 1)],
    }
    return TextConfig(**SMALL | kinds | options)


def make(config=None, seed=0):
    """Random weights everywhere, norms too."""
    torch.manual_seed(seed)
    model = MiniMaxM3VLForCausalLM(config or text_config())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(0.3 * torch.randn_like(weight))
    model.set_attn_implementation("eager")
    return model.eval()


def in_the_way(model, way):
    changed = copy.deepcopy(model)
    WAYS[way](changed)
    return changed


def words(*shape, seed=1):
    return torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(seed))


def close(found, wanted):
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max().item() <= BOUND


@st.composite
def configs(draw):
    groups = draw(st.sampled_from([1, 2, 4]))
    local = draw(st.sampled_from([1, 2]))
    return text_config(
        draw(st.sampled_from(["m", "dm", "mm", "mdm"])),
        num_key_value_heads=groups,
        index_n_heads=draw(st.sampled_from([h for h in (1, 2, 4) if groups % h == 0])),
        num_attention_heads=4 * draw(st.sampled_from([1, 2])),
        index_block_size=draw(st.sampled_from([1, 4, 8, 16])),
        index_topk_blocks=draw(st.integers(local, 4)),
        index_local_blocks=local,
    )
