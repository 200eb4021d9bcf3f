"""A plug-in of vLLM: its MiniMax-M3 with the kernels of this project, on Hopper GPUs.

    pip install msa-stack[vllm]
    MSA_VLLM=1 vllm serve MiniMaxAI/MiniMax-M3 ...

vLLM finds `register` by the entry point `vllm.general_plugins` and calls it in each of its
processes. Without MSA_VLLM=1 it does nothing. With it, vLLM builds its own model, and then the
classes of two parts of each sparse layer are exchanged (`vllm_layers.py`). All else stays vLLM's:
weights, projections, caches and their layout, the scheduler, sampling, the dense layers.

What these kernels cannot serve is an error that says why. Nothing falls back to vLLM's kernels.

This file imports neither torch nor vLLM, since vLLM also loads it where it serves other models.
"""

from __future__ import annotations

import os
from importlib.metadata import version

TESTED = ("0.33",)
"""Minor versions of vLLM whose files the tests run."""
MODELS = {
    "MiniMaxM3SparseForCausalLM": "msa.integrations.vllm_model:MsaMiniMaxM3",
    "MiniMaxM3MTP": "msa.integrations.vllm_model:MsaMiniMaxM3MTP",
}
"""Names of architectures and the classes that serve them. The released vision-language checkpoint
builds its text model by the first name."""


def register() -> None:
    """Register the models, if MSA_VLLM=1.

    Raises:
        RuntimeError: MSA_VLLM is neither 0 nor 1, or another minor version of vLLM.
    """
    if not is_on("MSA_VLLM"):
        return
    check_version("vLLM", "MSA_VLLM", version("vllm"), TESTED)
    from vllm import ModelRegistry

    for architecture, model in MODELS.items():
        ModelRegistry.register_model(architecture, model)


def is_on(variable: str) -> bool:
    """Whether the environment variable that switches a plug-in on is 1.

    Raises:
        RuntimeError: it is something else than 0 or 1.

    >>> is_on("MSA_NOT_SET")
    False
    """
    value = os.environ.get(variable, "0")
    if value not in ("0", "1"):
        raise RuntimeError(f"{variable} must be 0 or 1, got {value!r}")
    return value == "1"


def check_version(engine: str, variable: str, found: str, tested: tuple[str, ...]) -> None:
    """The engine has a minor version that was tested.

    Raises:
        RuntimeError: it has another one.

    >>> check_version("vLLM", "MSA_VLLM", "0.33.1", ("0.33",))
    """
    if not any(found == t or found.startswith(f"{t}.") for t in tested):
        wanted = " or ".join(t if t.count(".") > 1 else f"{t}.*" for t in tested)
        raise RuntimeError(
            f"{engine} must be {wanted} for {variable}=1, got {found}: install a tested version, "
            f"or unset {variable}"
        )
