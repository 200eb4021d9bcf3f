"""Weights of transformers' `minimax_m3_vl`, copied into this model by their names.

`ModelConfig.from_transformers` reads the configuration; `transformers_sizes.py` names the releases
of transformers that were tested. The classes of transformers are not imported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from msa.model.checkpoint import check_weights
from msa.model.model import Model

NAMES = [  # their name, our name; all that match are applied, in this order
    (r"^model\.language_model\.", "model."),
    (r"^lm_head\.", "head."),
    (r"^model\.embed_tokens\.", "embed."),
    (r"^model\.norm\.", "norm."),
    (r"^model\.layers\.(\d+)\.", r"layers.\1."),
    (r"\.input_layernorm\.", ".attention_norm."),
    (r"\.post_attention_layernorm\.", ".mlp_norm."),
    (r"\.self_attn\.indexer\.", ".attention.index."),
    (r"^(layers\.\d+)\.self_attn\.", r"\1.attention."),
    (r"\.mlp\.gate\.e_score_correction_bias$", ".mlp.router.bias"),
    (r"\.mlp\.gate\.", ".mlp.router."),
    (r"\.mlp\.shared_experts\.", ".mlp.shared."),
    (r"\.mlp\.experts\.", ".mlp."),
    (r"\.gate_up_proj", ".gate_up"),
    (r"\.down_proj", ".down"),
    (r"^model\.vision_tower\.embeddings\.proj\.", "vision.patches."),
    (r"^model\.vision_tower\.pre_layrnorm\.", "vision.norm."),
    (r"^model\.vision_tower\.", "vision."),
    (r"^(vision\.layers\.\d+)\.self_attn\.", r"\1."),
    (r"\.layer_norm1\.", ".norm."),
    (r"\.layer_norm2\.", ".mlp_norm."),
    (r"\.mlp\.fc1\.", ".up."),
    (r"\.mlp\.fc2\.", ".down."),
    (r"^model\.multi_modal_projector\.linear_1\.", "vision.project.0."),
    (r"^model\.multi_modal_projector\.linear_2\.", "vision.project.2."),
    (r"^model\.multi_modal_projector\.merge_linear_1\.", "vision.merge.0."),
    (r"^model\.multi_modal_projector\.merge_linear_2\.", "vision.merge.2."),
    (r"\.(q|k|v|out)_proj\.", r".\1."),
    (r"\.o_proj\.", ".out."),
]


def load_weights(model: Model, weights: Mapping[str, Tensor]) -> None:
    """Copy the state dict of a transformers model into a model of the same configuration.

    Raises:
        ValueError: naming the weights that are missing, unknown, or of another shape.
    """
    renamed = {}
    for name, weight in weights.items():
        ours = our_name(name)
        renamed[ours] = weight.flatten(1) if ours == "vision.patches.weight" else weight
    if model.config.tied_head:
        renamed.pop("head.weight", None)
    own = model.state_dict()
    check_weights("the state dict", own, renamed)
    model.load_state_dict({name: renamed[name].to(own[name].dtype) for name in own})


def our_name(name: str) -> str:
    """The name in this model of a weight of transformers.

    >>> our_name("model.language_model.layers.3.self_attn.indexer.q_proj.weight")
    'layers.3.attention.index.q.weight'
    """
    for theirs, ours in NAMES:
        name = re.sub(theirs, ours, name)
    return name
