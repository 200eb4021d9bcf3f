"""The sizes of a model: MiniMax-M3 itself, a toy of it, or anything between.

Every size is a field, so that the model's code holds no number. The defaults of what is not a size
(activation, scales, frequencies) are those of the released model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from msa.config import MSAConfig
from msa.model import checks

AttentionKind = Literal["dense", "msa"]
MLPKind = Literal["dense", "moe"]


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower: patches in, one token of the text's width out for merge x merge patches.

    Raises:
        TypeError, ValueError: naming the field, what was wanted and what came.

    >>> tower = VisionConfig(width=48, layers=1, heads=2, mlp_width=96, projector_width=64)
    >>> tower.head_dim, tower.patch_values, tower.tokens((1, 4, 6))
    (24, 1176, 6)
    """

    width: int
    layers: int
    heads: int
    mlp_width: int
    projector_width: int
    """Hidden width of both MLPs of the projector."""
    channels: int = 3
    patch: int = 14
    """Height and width of a patch in pixels."""
    frames: int = 2
    """How many frames of a video a patch spans; an image is repeated that often."""
    merge: int = 2
    """Patches along each side that become one token."""
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        checks.check_vision_config(self)

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.width // self.heads

    @property
    def patch_values(self) -> int:
        """Numbers in a flattened patch: channels x frames x patch x patch."""
        return self.channels * self.frames * self.patch**2

    def tokens(self, grid: tuple[int, int, int]) -> int:
        """The tokens that a picture of this many (frames, rows, columns) of patches becomes."""
        return grid[0] * grid[1] * grid[2] // self.merge**2


@dataclass(frozen=True)
class ModelConfig:
    """A MiniMax-M3 of any size.

    `attention` and `mlp` have one entry per layer: the released model has three ("dense", "dense")
    layers and 57 ("msa", "moe") ones.

    Raises:
        TypeError, ValueError: naming the field, what was wanted and what came.

    >>> config = ModelConfig(
    ...     vocab_size=256, width=32, attention=("dense", "msa"), mlp=("dense", "moe"),
    ...     heads=4, groups=2, head_dim=8, rotary_dim=4, index_dim=8, mlp_width=64,
    ...     experts=4, experts_per_token=2, expert_width=32, shared_width=32,
    ...     msa=MSAConfig(block_size=16, top_k=4))
    >>> config.layers, ModelConfig.from_dict(config.to_dict()) == config
    (2, True)
    """

    vocab_size: int
    width: int
    attention: tuple[AttentionKind, ...]
    mlp: tuple[MLPKind, ...]
    heads: int
    groups: int
    """Key/value heads, and index queries."""
    head_dim: int
    rotary_dim: int
    """How many of a head's numbers RoPE turns, the first ones; the others know no position."""
    index_dim: int
    mlp_width: int
    """Hidden width of a dense MLP."""
    experts: int
    experts_per_token: int
    expert_width: int
    shared_width: int
    """Hidden width of the expert that every token passes."""
    msa: MSAConfig = field(default_factory=MSAConfig)
    rope_theta: float = 5_000_000.0
    routed_scale: float = 2.0
    """Factor on the weighted sum of the chosen experts."""
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    norm_eps: float = 1e-6
    init_std: float = 0.02
    """Spread of the random weights that training starts from."""
    tied_head: bool = False
    """Whether the head's weights are those of the embedding."""
    vision: VisionConfig | None = None
    image_token: int | None = None
    """The token that stands where the tokens of a picture go; and of a video."""
    video_token: int | None = None
    mixed_tokens: int = 1
    """How many neighbouring tokens an attention layer's input is a mixture of: 1 is none, as in
    the released model; see docs/model.md."""
    index_gradient: bool = False
    """Whether the loss of the index branch reaches the backbone as well, against eq. 11."""

    def __post_init__(self) -> None:
        checks.check_model_config(self)

    @property
    def layers(self) -> int:
        """How many there are."""
        return len(self.attention)

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`, also after a journey through JSON.

        Raises:
            TypeError, ValueError: fields missing, unknown or out of range.
        """
        parts = {"msa": MSAConfig, "vision": VisionConfig}
        values = dict(checks.read_fields("config", values, cls))
        for name, part in parts.items():
            if values.get(name) is not None:
                values[name] = part(**checks.read_fields(f"config.{name}", values[name], part))
        for name in ("attention", "mlp"):
            values[name] = checks.read_kinds(name, values[name])
        return cls(**values)

    @classmethod
    def from_transformers(cls, config: Any) -> ModelConfig:
        """The sizes of a `MiniMaxM3VLConfig`, or of a `MiniMaxM3VLTextConfig`.

        Raises:
            ValueError: naming the first feature that this model does not have.
        """
        from msa.model import from_transformers

        return from_transformers.read_config(config)
