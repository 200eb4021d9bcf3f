"""The index branch of one converted layer: its projections, as a module of the attention."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import apply_rotary_pos_emb

from msa.config import MSAConfig
from msa.recall import Recall

Phase = Literal["sparse", "train", "warm_up", "measure"]


class IndexProjections(nn.Module):
    """The projections of the index branch of one layer, its phase, and its last loss and recall.

    The projections are plain parameters with their own names. So adapters (LoRA) and quantisation,
    which look for `nn.Linear` or for names that end in q_proj, do not change them.
    """

    OLD_NAMES: ClassVar = {
        "q_proj.weight": "query", "k_proj.weight": "key",
        "q_norm.weight": "query_norm.weight", "k_norm.weight": "key_norm.weight",
    }  # fmt: skip
    """Old names of the parameters. Files with these names can still be read."""

    def __init__(
        self, groups: int, dim: int, width: int, config: MSAConfig, **options: Any
    ) -> None:
        super().__init__()
        self.config, self.groups = config, groups
        self.query = nn.Parameter(torch.empty(groups * dim, width, **options))
        self.key = nn.Parameter(torch.empty(dim, width, **options))
        for weight in (self.query, self.key):
            nn.init.kaiming_uniform_(weight, a=5**0.5)  # the initialisation of nn.Linear
        self.query_norm, self.key_norm = (nn.RMSNorm(dim, eps=1e-6, **options) for _ in range(2))
        self.phase: Phase = "sparse"
        self.kl: Tensor | None = None
        self.recall: Recall | None = None

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden [B, T, width] to q_idx [B, T, Hkv, Di] and k_idx [B, T, 1, Di]."""
        hidden = hidden.detach().to(self.query.dtype)
        q_idx = self.query_norm(linear(hidden, self.query).unflatten(-1, (self.groups, -1)))
        k_idx = self.key_norm(linear(hidden, self.key)[:, :, None])
        cos, sin = (narrow(x, q_idx.shape[-1]) for x in (cos, sin))
        q_idx, k_idx = apply_rotary_pos_emb(q_idx, k_idx, cos, sin, unsqueeze_dim=2)
        return q_idx, k_idx

    @property
    def active(self) -> IndexProjections:
        """This module. If an adapter wraps it (peft's modules_to_save), this is the copy in use."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies and pickles. It has no loss, since a loss belongs to a graph."""
        return super().__getstate__() | {"kl": None}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **options: Any
    ) -> None:
        for old, new in self.OLD_NAMES.items():
            if prefix + old in state_dict:
                state_dict[prefix + new] = state_dict.pop(prefix + old)
        super()._load_from_state_dict(state_dict, prefix, *args, **options)


def narrow(x: Tensor, dim: int) -> Tensor:
    """Cosines or sines [B, T, R] for heads of size dim.

    dim / 2 evenly spaced frequencies are kept. Each is used for two columns of a head.

    >>> narrow(torch.tensor([[[1, 2, 3, 4, 1, 2, 3, 4]]]), 4)
    tensor([[[1, 3, 1, 3]]])
    """
    if x.shape[-1] <= dim:
        return x
    half = x[..., : x.shape[-1] // 2]
    places = torch.arange(dim // 2, device=x.device) * half.shape[-1] // (dim // 2)
    return torch.cat([half[..., places]] * 2, -1)
