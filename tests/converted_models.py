"""Tiny decoders of several families, and their conversion to MSA."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch

if sys.version_info < (3, 11):
    pytest.skip("transformers 5.23 needs Python 3.11", allow_module_level=True)

import transformers

import msa
from msa.integrations import convert as c

BOUND = 1e-4
ROOT = Path(__file__).parent.parent
SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "Llama": {}, "Qwen2": {}, "Qwen3": {}, "Mistral": {"sliding_window": None}
}  # fmt: skip
CONFIG = msa.MSAConfig(block_size=8, top_k=2)
ALL = msa.MSAConfig(block_size=8, top_k=8)  # more than any text here has
WAYS = "msa", "msa_torch", "msa_reference"


def make(family="Llama", **options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | FAMILIES[family] | options)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.set_attn_implementation("eager")
    return model.eval()


def converted(model, config=CONFIG, **options):
    torch.manual_seed(1)
    return c.convert(copy.deepcopy(model), config, **options).eval()


def words(*shape, seed=1):
    return torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(seed))


def close(found, wanted):
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max().item() <= BOUND
