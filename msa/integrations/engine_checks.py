"""What the plug-ins of serving engines refuse, and how they say it."""

from __future__ import annotations

from typing import NoReturn

import torch

from msa import checks

VARIABLES = {"vLLM": "MSA_VLLM", "SGLang": "MSA_SGLANG"}


def refuse(engine: str, why: str) -> NoReturn:
    """Stop the engine: it would run other kernels than its user asked for.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        f"msa-stack cannot serve this: {why}. Change it, or unset {VARIABLES[engine]} to serve "
        f"with the kernels of {engine}."
    )


def check_gpu(engine: str) -> None:
    """The current GPU is one that the plug-ins were made for, or kernels are interpreted.

    Raises:
        RuntimeError: it is another one, or there is none.
    """
    if checks.is_interpreted():
        return
    if not torch.cuda.is_available():
        refuse(engine, "a GPU of compute capability 9.0 is needed, got none")
    found = torch.cuda.get_device_capability()
    if found != (9, 0):
        refuse(engine, "the GPU must have compute capability 9.0, got {}.{}".format(*found))
