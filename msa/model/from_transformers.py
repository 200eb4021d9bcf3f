"""Configurations and weights of transformers' `minimax_m3_vl`, as this model's own.

The classes of transformers are not imported: a configuration is read by its attributes, weights by
their names. What a configuration asks for and this model does not have is refused by name.
Tested with transformers 5.23 and 5.24; release 5.17 turns pictures by (frame, row) and forgets the
column, and up to 5.22.0 patches of different images attend to one another.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from msa.config import MSAConfig
from msa.model import checks
from msa.model.config import AttentionKind, MLPKind, ModelConfig, VisionConfig
from msa.model.model import Model

ATTENTION: dict[str, AttentionKind] = {"full_attention": "dense", "minimax_m3_sparse": "msa"}
MLPS: dict[str, MLPKind] = {"dense": "dense", "sparse": "moe"}

NAMES = [  # theirs, ours; the first that matches is applied, then the rest
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


def read_config(config: Any) -> ModelConfig:
    """A `MiniMaxM3VLConfig`, or a `MiniMaxM3VLTextConfig` for a model that reads text alone.

    Raises:
        ValueError: naming the first feature that this model does not have.
    """
    text = getattr(config, "text_config", config)
    _refuse_unknown(text)
    rope = text.rope_parameters
    vision = getattr(config, "vision_config", None)
    pictures: dict[str, Any] = {}
    if vision is not None:
        pictures = {
            "vision": _read_vision(vision, config.projector_hidden_size),
            "image_token": config.image_token_id,
            "video_token": config.video_token_id,
        }
    return ModelConfig(
        vocab_size=text.vocab_size,
        width=text.hidden_size,
        attention=tuple(ATTENTION[kind] for kind in text.layer_types),
        mlp=tuple(MLPS[kind] for kind in text.mlp_layer_types),
        heads=text.num_attention_heads,
        groups=text.num_key_value_heads,
        head_dim=text.head_dim,
        # theirs has a field rotary_dim too, which nothing reads
        rotary_dim=int(text.head_dim * rope.get("partial_rotary_factor", 1.0)),
        index_dim=text.index_head_dim,
        mlp_width=text.dense_intermediate_size,
        experts=text.num_local_experts,
        experts_per_token=text.num_experts_per_tok,
        expert_width=text.intermediate_size,
        shared_width=text.shared_intermediate_size,
        msa=MSAConfig(
            text.index_block_size, text.index_topk_blocks, local_blocks=text.index_local_blocks
        ),
        rope_theta=rope["rope_theta"],
        routed_scale=text.routed_scaling_factor,
        swiglu_alpha=text.swiglu_alpha,
        swiglu_limit=text.swiglu_limit,
        norm_eps=text.rms_norm_eps,
        init_std=text.initializer_range,
        tied_head=config.tie_word_embeddings,
        **pictures,
    )


def load_weights(model: Model, weights: Mapping[str, Tensor]) -> None:
    """Copy the state dict of a transformers model into a model of the same configuration.

    Raises:
        ValueError: naming weights that are missing, not known, or of another shape.
    """
    renamed = {}
    for name, weight in weights.items():
        ours = our_name(name)
        renamed[ours] = weight.flatten(1) if ours == "vision.patches.weight" else weight
    if model.config.tied_head:
        renamed.pop("head.weight", None)
    own = model.state_dict()
    checks.check_weights("the state dict", own, renamed)
    model.load_state_dict({name: renamed[name].to(own[name].dtype) for name in own})


def our_name(name: str) -> str:
    """What a weight of transformers is called here.

    >>> our_name("model.language_model.layers.3.self_attn.indexer.q_proj.weight")
    'layers.3.attention.index.q.weight'
    """
    for theirs, ours in NAMES:
        name = re.sub(theirs, ours, name)
    return name


def _read_vision(vision: Any, projector_width: int) -> VisionConfig:
    _refuse("vision_config.hidden_act", vision.hidden_act, "gelu")
    _refuse("vision_config.attention_dropout", vision.attention_dropout, 0.0)
    _refuse("vision_config.rope_parameters.rope_type", vision.rope_parameters["rope_type"], "axial")
    return VisionConfig(
        width=vision.hidden_size,
        layers=vision.num_hidden_layers,
        heads=vision.num_attention_heads,
        mlp_width=vision.intermediate_size,
        projector_width=projector_width,
        channels=vision.num_channels,
        patch=vision.patch_size,
        frames=vision.temporal_patch_size,
        merge=vision.spatial_merge_size,
        rope_theta=vision.rope_parameters["rope_theta"],
        norm_eps=vision.layer_norm_eps,
    )


def _refuse_unknown(text: Any) -> None:
    """What their text model can do and this one cannot."""
    _refuse("attention_dropout", text.attention_dropout, 0.0)
    _refuse("output_router_logits", text.output_router_logits, False)
    _refuse("rope_parameters.rope_type", text.rope_parameters["rope_type"], "default")
    if "minimax_m3_sparse" in text.layer_types:
        _refuse("index_n_heads", text.index_n_heads, text.num_key_value_heads)
    for name, kinds, known in (
        ("layer_types", text.layer_types, ATTENTION),
        ("mlp_layer_types", text.mlp_layer_types, MLPS),
    ):
        for kind in kinds:
            if kind not in known:
                raise ValueError(f"{name} must hold {' or '.join(known)}, got {kind!r}")
        if len(kinds) != text.num_hidden_layers:
            raise ValueError(
                f"{name} must have num_hidden_layers = {text.num_hidden_layers} entries, "
                f"got {len(kinds)}"
            )


def _refuse(name: str, value: Any, supported: Any) -> None:
    if value != supported:
        raise ValueError(
            f"{name} must be {supported!r}: this model has nothing else, got {value!r}"
        )
