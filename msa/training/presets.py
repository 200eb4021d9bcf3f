"""The presets of `msa train --preset`: sizes of a model, and its training schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from msa.config import MSAConfig
from msa.dispatch import BackendName
from msa.model.config import ModelConfig, VisionConfig
from msa.training.documents import IMAGE_TOKEN, VOCABULARY

PresetName = Literal["tiny", "small"]


@dataclass(frozen=True)
class Schedule:
    """How long, how fast and on which documents a model is trained."""

    steps: int
    contexts: tuple[int, ...]
    """Lengths of documents in tokens. Each step draws one of them."""
    tokens: int
    """Tokens in a step. It has tokens // context documents, at least one."""
    record_every: int
    """A document has one record per this many tokens, at least one, and asks for each of them. With
    one record in short documents, a model learns to read pictures before it learns to search."""
    rate: float
    """The highest learning rate."""
    warm_up: float = 0.3
    """The share of steps, at the start, with dense attention. They train the index (R17)."""
    rising: int = 50
    """Steps until the learning rate is at its highest. After them it falls as a cosine."""
    last_rate: float = 0.05
    """The last learning rate, as a share of the highest one."""
    decay: float = 0.05
    """Weight decay of matrices."""
    clip: float = 1.0
    """The largest norm of a gradient. Longer gradients are scaled down to it."""
    kl: float = 1.0
    """The weight of the loss of the index branches."""
    balance: float = 0.01
    """The change of a router's bias in a step; see `Router.balance`."""
    answers: float = 1.0
    """The weight of all answers of a step together. The weight of the prose is 1."""
    test_every: int = 100
    save_every: int = 100

    def records(self, length: int) -> int:
        """The number of records in a document of `length` tokens."""
        return max(1, length // self.record_every)


@dataclass(frozen=True)
class Preset:
    """A model, its schedule, and where it runs."""

    model: ModelConfig
    schedule: Schedule
    backend: BackendName
    device: str
    half: bool
    """Whether products are computed in bfloat16. Weights are float32 in both cases."""


TINY = Preset(
    ModelConfig(
        vocab_size=VOCABULARY, width=128, attention=("msa",) * 3, mlp=("dense", "moe", "moe"),
        heads=4, groups=2, head_dim=32, rotary_dim=16, index_dim=32, mlp_width=256,
        experts=4, experts_per_token=2, expert_width=128, shared_width=128,
        msa=MSAConfig(block_size=16, top_k=5), rope_theta=10_000.0, init_std=0.05,
        mixed_tokens=4, image_token=IMAGE_TOKEN,
        vision=VisionConfig(
            width=48, layers=1, heads=4, mlp_width=96, projector_width=96, channels=1, patch=4,
            frames=1,
        ),
    ),
    Schedule(
        steps=450, contexts=(64, 128, 256, 512), tokens=2048, record_every=64, rate=3e-3,
        warm_up=0.4,
    ),
    backend="torch", device="cpu", half=False,
)  # fmt: skip

SMALL = Preset(
    ModelConfig(
        vocab_size=VOCABULARY, width=256, attention=("msa",) * 3, mlp=("dense", "moe", "moe"),
        heads=32, groups=2, head_dim=128, rotary_dim=64, index_dim=128, mlp_width=1024,
        experts=4, experts_per_token=2, expert_width=256, shared_width=256,
        msa=MSAConfig(block_size=128, top_k=16), init_std=0.03,
        mixed_tokens=4, image_token=IMAGE_TOKEN,
        vision=VisionConfig(
            width=64, layers=2, heads=4, mlp_width=128, projector_width=256, channels=1, patch=4,
            frames=1,
        ),
    ),
    Schedule(
        steps=4000, contexts=(128, 512, 2048, 8192, 16_384, 32_768), tokens=65_536,
        record_every=128, rate=1e-3, rising=200, test_every=250, save_every=250,
    ),
    backend="triton", device="cuda", half=True,
)  # fmt: skip

PRESETS: dict[PresetName, Preset] = {"tiny": TINY, "small": SMALL}
