"""What the plug-ins of serving engines refuse, and how they say it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, NoReturn

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


# -- compiled before the first request -------------------------------------------------------------
WARM: set[object] = set()
"""What was warmed up in this process."""


def warm_up_once(key: object, warm_up: Callable[[], int], log: Callable[..., Any]) -> bool:
    """Call `warm_up`, once for each key, and log the seconds that it took; whether this is over.

    It is not over while a CUDA graph is captured: then a later call does it. Nothing is called if
    MSA_WARM_UP is 0 or kernels are interpreted.
    """
    if key in WARM or os.environ.get("MSA_WARM_UP") == "0" or checks.is_interpreted():
        return True
    if torch.cuda.is_current_stream_capturing():
        return False
    WARM.add(key)
    start = time.perf_counter()
    warm_up()
    torch.cuda.synchronize()
    log("msa-stack compiled its kernels in %.0f s", time.perf_counter() - start)
    return True
