"""A plug-in of SGLang: its MiniMax-M3 with the kernels of this project, on Hopper GPUs.

    pip install msa-stack[sglang]
    MSA_SGLANG=1 python -m sglang.launch_server --model MiniMaxAI/MiniMax-M3 --page-size 128 ...

SGLang finds `register` by the entry point `sglang.srt.plugins` and calls it in each of its
processes. Without MSA_SGLANG=1 it does nothing. With it, SGLang's two functions of sparse attention
are wrapped by those of `sglang_layers.py`. All else stays SGLang's.

What these kernels cannot serve is an error that says why. Nothing falls back to SGLang's kernels.
SGLang only logs an exception of a plug-in and goes on without it. So `register` ends the process.

This file imports neither torch nor SGLang, since SGLang also loads it where it serves other models.
"""

from __future__ import annotations

import inspect
import pkgutil
from importlib.metadata import version
from typing import Any

from msa.integrations.vllm import check_version, is_on

TESTED = ("0.5.23",)
"""Versions of SGLang whose files the tests run."""
FUNCTIONS = "sglang.srt.layers.attention.minimax_sparse_ops.minimax_sparse"
WRAPPED = {"minimax_sparse_prefill": "prefill", "minimax_sparse_decode": "decode"}
"""SGLang's functions, and those of `sglang_layers.py` that wrap them."""


def register() -> None:
    """Wrap SGLang's functions, if MSA_SGLANG=1.

    Raises:
        SystemExit: MSA_SGLANG is neither 0 nor 1, another version of SGLang, or functions with
            other parameters than those that were tested.
    """
    try:
        if is_on("MSA_SGLANG"):
            wrap()
    except Exception as error:
        raise SystemExit(f"MSA_SGLANG=1, but {error}") from error


def wrap() -> None:
    """Register the hooks."""
    check_version("SGLang", "MSA_SGLANG", version("sglang"), TESTED)
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from msa.integrations import sglang_layers

    for theirs, ours in WRAPPED.items():
        target, hook = f"{FUNCTIONS}.{theirs}", getattr(sglang_layers, ours)
        check_parameters(pkgutil.resolve_name(target), hook)
        HookRegistry.register(target, hook, HookType.AROUND)


def check_parameters(theirs: Any, hook: Any) -> None:
    """A hook takes the parameters of the function that it wraps, in the same order.

    Raises:
        TypeError: it does not.

    >>> check_parameters(lambda q, k: 0, lambda original, q, v: 0)
    Traceback (most recent call last):
    TypeError: <lambda> must have the parameters ('q', 'v'), got ('q', 'k')
    """
    found = tuple(inspect.signature(theirs).parameters)
    wanted = tuple(inspect.signature(hook).parameters)[1:]
    if found != wanted:
        raise TypeError(f"{theirs.__name__} must have the parameters {wanted}, got {found}")
