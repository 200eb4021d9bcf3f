"""The sizes of a model: MiniMax-M3 itself, a small copy of it, or anything between.

Every size is a field, so that the model's code contains no number. Fields that are not sizes
(activation, scales, frequencies) have the values of the released model as defaults.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Literal

from msa import checks
from msa.config import MSAConfig
from msa.model.transformers_sizes import read_sizes

AttentionKind = Literal["dense", "msa"]
MLPKind = Literal["dense", "moe"]
KINDS = {"attention": ("dense", "msa"), "mlp": ("dense", "moe")}


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower: it reads patches and makes one token of merge x merge patches.

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
    """The number of video frames in a patch. An image is repeated that often."""
    merge: int = 2
    """Patches along each side that become one token."""
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "mlp_width", "projector_width", "channels"):
            checks.check_count(f"vision.{name}", getattr(self, name), 1)
        for name in ("patch", "frames", "merge"):
            checks.check_count(f"vision.{name}", getattr(self, name), 1)
        if self.width % self.heads:
            raise ValueError(
                f"vision.width must be a multiple of vision.heads = {self.heads}, got {self.width}"
            )
        if self.head_dim < 6:
            raise ValueError(
                f"vision.width must be at least 6 per head, a pair for each of three axes, "
                f"got {self.head_dim}"
            )
        checks.check_positive("vision.rope_theta", self.rope_theta)
        checks.check_positive("vision.norm_eps", self.norm_eps)

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.width // self.heads

    @property
    def patch_values(self) -> int:
        """The number of values in a patch: channels x frames x patch x patch."""
        return self.channels * self.frames * self.patch**2

    def tokens(self, grid: tuple[int, int, int]) -> int:
        """The number of tokens of a picture with (frames, rows, columns) of patches."""
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
    """The number of key/value heads, and of index queries."""
    head_dim: int
    rotary_dim: int
    """RoPE turns the first `rotary_dim` numbers of a head. The others do not depend on position."""
    index_dim: int
    mlp_width: int
    """Hidden width of a dense MLP."""
    experts: int
    experts_per_token: int
    expert_width: int
    shared_width: int
    """Hidden width of the shared expert, which reads every token."""
    msa: MSAConfig = field(default_factory=MSAConfig)
    rope_theta: float = 5_000_000.0
    routed_scale: float = 2.0
    """Factor on the weighted sum of the chosen experts."""
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    norm_eps: float = 1e-6
    init_std: float = 0.02
    """Standard deviation of the random weights at the start of training."""
    tied_head: bool = False
    """Whether the head uses the weights of the embedding."""
    vision: VisionConfig | None = None
    image_token: int | None = None
    """The token that stands where the tokens of an image go."""
    video_token: int | None = None
    """The token that stands where the tokens of a video go."""
    mixed_tokens: int = 1
    """The number of neighbouring tokens that are mixed into the input of an attention layer. The
    released model mixes none: 1. See docs/chapters/16-model.md."""
    index_gradient: bool = False
    """Whether the loss of the index branch also trains the backbone. Eq. 11 of the paper says
    no."""

    def __post_init__(self) -> None:
        _check_kinds(self)
        _check_sizes(self)
        _check_picture_tokens(self)

    @property
    def layers(self) -> int:
        """The number of layers."""
        return len(self.attention)

    def to_dict(self) -> dict[str, Any]:
        """The fields as values that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`, also for values that JSON has written and read.

        Raises:
            TypeError, ValueError: a field that is missing, unknown or out of range.
        """
        parts = {"msa": MSAConfig, "vision": VisionConfig}
        values = dict(_read_fields("config", values, cls))
        for name, part in parts.items():
            if values.get(name) is not None:
                values[name] = part(**_read_fields(f"config.{name}", values[name], part))
        for name in KINDS:
            values[name] = _read_kinds(name, values[name])
        return cls(**values)

    @classmethod
    def from_transformers(cls, config: Any) -> ModelConfig:
        """The sizes of a `MiniMaxM3VLConfig`, or of a `MiniMaxM3VLTextConfig`.

        Raises:
            ValueError: naming the first feature that this model does not have.
        """
        return cls.from_dict(read_sizes(config))


# -- checks ---------------------------------------------------------------------------------------
def _check_kinds(config: ModelConfig) -> None:
    """One kind of attention and one kind of MLP per layer."""
    for name, known in KINDS.items():
        kinds = getattr(config, name)
        if not isinstance(kinds, tuple) or not kinds or any(kind not in known for kind in kinds):
            raise ValueError(f"{name} must be a tuple of {' or '.join(known)}, got {kinds!r}")
    if len(config.mlp) != len(config.attention):
        raise ValueError(
            f"mlp must have an entry for each of the {len(config.attention)} layers that "
            f"attention has, got {len(config.mlp)}"
        )


def _check_sizes(config: ModelConfig) -> None:
    """Sizes are at least 1 and fit together; the other numbers are positive."""
    for name in (
        "vocab_size", "width", "heads", "groups", "head_dim", "index_dim", "mlp_width", "experts",
        "experts_per_token", "expert_width", "shared_width", "mixed_tokens",
    ):  # fmt: skip
        checks.check_count(name, getattr(config, name), 1)
    if config.heads % config.groups:
        raise ValueError(
            f"heads must be a multiple of groups = {config.groups}, got {config.heads}"
        )
    checks.check_count("rotary_dim", config.rotary_dim, 2)
    most = min(config.head_dim, config.index_dim if "msa" in config.attention else config.head_dim)
    if config.rotary_dim % 2 or config.rotary_dim > most:
        raise ValueError(
            f"rotary_dim must be even and at most {most}, the smaller of head_dim and index_dim, "
            f"got {config.rotary_dim}"
        )
    if config.experts_per_token > config.experts:
        raise ValueError(
            f"experts_per_token must be at most experts = {config.experts}, "
            f"got {config.experts_per_token}"
        )
    for name in (
        "rope_theta", "routed_scale", "swiglu_alpha", "swiglu_limit", "norm_eps", "init_std",
    ):  # fmt: skip
        checks.check_positive(name, getattr(config, name))
    checks.check_type("msa", config.msa, MSAConfig)
    checks.check_flag("tied_head", config.tied_head)
    checks.check_flag("index_gradient", config.index_gradient)


def _check_picture_tokens(config: ModelConfig) -> None:
    """A model with a vision tower has tokens for pictures; a model without it has none."""
    for name in ("image_token", "video_token"):
        token = getattr(config, name)
        if token is not None:
            checks.check_count(name, token, 0)
            if config.vision is None:
                raise ValueError(f"{name} must be None in a model without vision, got {token}")
            if token >= config.vocab_size:
                raise ValueError(
                    f"{name} must be below vocab_size = {config.vocab_size}, got {token}"
                )
    if config.vision is not None and config.image_token is None:
        raise ValueError("image_token must be given in a model with vision, got None")
    if config.image_token is not None and config.image_token == config.video_token:
        raise ValueError(f"video_token must differ from image_token, got {config.video_token}")


def _read_fields(name: str, values: Any, cls: type) -> dict[str, Any]:
    """A mapping that has every required field of `cls` and no unknown field."""
    if not isinstance(values, dict):
        raise TypeError(f"{name} must be a dict, got {checks.kind(values)}")
    known = {f.name for f in fields(cls)}
    wanted = {f.name for f in fields(cls) if f.default is f.default_factory is MISSING}
    if values.keys() - known or wanted - values.keys():
        raise ValueError(
            f"{name} must have the fields of {cls.__name__}, "
            f"got{differences(wanted - values.keys(), values.keys() - known)}"
        )
    return values


def _read_kinds(name: str, kinds: Any) -> tuple[str, ...]:
    """A tuple; JSON turns tuples into lists."""
    if not isinstance(kinds, (list, tuple)):
        raise TypeError(f"{name} must be a list, got {checks.kind(kinds)}")
    return tuple(kinds)


def differences(missing: Iterable[str], unexpected: Iterable[str]) -> str:
    """The end of a message: which names are missing and which ones are unexpected.

    >>> differences(["b", "a"], ["c"])
    ' missing: a, b; unexpected: c'
    """
    parts = [
        f" {what}: {', '.join(names[:8])}{f' and {len(names) - 8} more' if names[8:] else ''}"
        for what, names in (("missing", sorted(missing)), ("unexpected", sorted(unexpected)))
        if names
    ]
    return ";".join(parts)
