"""The models that the plug-in registers in vLLM: its own, with exchanged parts (see `vllm.py`)."""

from __future__ import annotations

from typing import Any

from vllm.models.minimax_m3 import MiniMaxM3MTP, MiniMaxM3SparseForCausalLM

from msa.integrations.vllm_layers import enable


class MsaMiniMaxM3(MiniMaxM3SparseForCausalLM):
    """The text model."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        enable(self, vllm_config)


class MsaMiniMaxM3MTP(MiniMaxM3MTP):
    """The model that drafts tokens."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        enable(self, vllm_config)
