"""The sizes of transformers' `minimax_m3_vl`, as the fields of a `ModelConfig`.

The classes of transformers are not imported: a configuration is read by its attributes. A feature
that this model does not have is refused by its name. Tested with transformers 5.23 and 5.24.
Release 5.17 turns pictures by (frame, row) and forgets the column; up to 5.22.0, patches of
different images attend to one another.
"""

from __future__ import annotations

from typing import Any

ATTENTION = {"full_attention": "dense", "minimax_m3_sparse": "msa"}
MLPS = {"dense": "dense", "sparse": "moe"}


def read_sizes(config: Any) -> dict[str, Any]:
    """The fields of a `ModelConfig`, from a `MiniMaxM3VLConfig` or a `MiniMaxM3VLTextConfig`.

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
    return {
        "vocab_size": text.vocab_size,
        "width": text.hidden_size,
        "attention": tuple(ATTENTION[kind] for kind in text.layer_types),
        "mlp": tuple(MLPS[kind] for kind in text.mlp_layer_types),
        "heads": text.num_attention_heads,
        "groups": text.num_key_value_heads,
        "head_dim": text.head_dim,
        # theirs has a field rotary_dim too, which nothing reads
        "rotary_dim": int(text.head_dim * rope.get("partial_rotary_factor", 1.0)),
        "index_dim": text.index_head_dim,
        "mlp_width": text.dense_intermediate_size,
        "experts": text.num_local_experts,
        "experts_per_token": text.num_experts_per_tok,
        "expert_width": text.intermediate_size,
        "shared_width": text.shared_intermediate_size,
        "msa": {
            "block_size": text.index_block_size,
            "top_k": text.index_topk_blocks,
            "local_blocks": text.index_local_blocks,
        },
        "rope_theta": rope["rope_theta"],
        "routed_scale": text.routed_scaling_factor,
        "swiglu_alpha": text.swiglu_alpha,
        "swiglu_limit": text.swiglu_limit,
        "norm_eps": text.rms_norm_eps,
        "init_std": text.initializer_range,
        "tied_head": config.tie_word_embeddings,
        **pictures,
    }


def _read_vision(vision: Any, projector_width: int) -> dict[str, Any]:
    _refuse("vision_config.hidden_act", vision.hidden_act, "gelu")
    _refuse("vision_config.attention_dropout", vision.attention_dropout, 0.0)
    _refuse("vision_config.rope_parameters.rope_type", vision.rope_parameters["rope_type"], "axial")
    return {
        "width": vision.hidden_size,
        "layers": vision.num_hidden_layers,
        "heads": vision.num_attention_heads,
        "mlp_width": vision.intermediate_size,
        "projector_width": projector_width,
        "channels": vision.num_channels,
        "patch": vision.patch_size,
        "frames": vision.temporal_patch_size,
        "merge": vision.spatial_merge_size,
        "rope_theta": vision.rope_parameters["rope_theta"],
        "norm_eps": vision.layer_norm_eps,
    }


def _refuse_unknown(text: Any) -> None:
    """Refuse what the text model of transformers can do and this one cannot."""
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
