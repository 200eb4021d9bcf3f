"""A small MiniMax-M3 in plain PyTorch: text, pictures, experts, sparse attention.

It needs torch. Training is in `msa.training`.
"""

from msa.model.cache import Cache
from msa.model.config import ModelConfig, VisionConfig
from msa.model.model import IGNORE, Losses, Model, ModelOutput
from msa.model.vision import Pictures, cut

__all__ = [
    "IGNORE",
    "Cache",
    "Losses",
    "Model",
    "ModelConfig",
    "ModelOutput",
    "Pictures",
    "VisionConfig",
    "cut",
]
