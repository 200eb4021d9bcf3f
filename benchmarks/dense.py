"""The baselines: dense attention by torch (cuDNN, flash) and, if installed, FlashAttention-4."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.cases import Inputs
from benchmarks.checks import Wrong, check_dense
from benchmarks.timing import timed

Row = dict[str, float] | str
"""Times and the largest error, or a sentence that says why there are none."""


def checked(x: Inputs, call: Callable[[], Tensor], causal: bool) -> Row:
    """Time a baseline if its results are right; otherwise return what is wrong."""
    try:
        error = check_dense(x, call(), causal)
        return timed(call, graph=False) | {"error": error}
    except (RuntimeError, Wrong) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def sdpa(x: Inputs, backend: SDPBackend) -> Row:
    """Time torch's dense attention: causal for a whole prompt, over all keys for a chunk."""
    q, k, v = (t.transpose(0, 1)[None] for t in (x.q, x.k, x.v))
    causal = x.sequences.total_q == x.sequences.total_k

    def call() -> Tensor:
        with sdpa_kernel(backend):
            out = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        return out[0].transpose(0, 1)

    return checked(x, call, causal)


def flash_attention_4(x: Inputs) -> Row:
    """Time FlashAttention-4 (package flash-attn-4), causal: the last query sees every key."""
    try:
        attend: Any = importlib.import_module("flash_attn.cute").flash_attn_func
    except ImportError as error:
        return f"not installed: {error}"

    def call() -> Tensor:
        found = attend(x.q[None], x.k[None], x.v[None], causal=True)
        return (found[0] if isinstance(found, tuple) else found)[0]

    return checked(x, call, causal=True)


def baselines(x: Inputs, flash: bool) -> dict[str, Row]:
    """Time all baselines on one problem; torch's flash only on short ones, since it is slower than
    cuDNN, and where there is no cuDNN."""
    rows = {"cudnn": sdpa(x, SDPBackend.CUDNN_ATTENTION)}
    if flash or isinstance(rows["cudnn"], str):
        rows["flash"] = sdpa(x, SDPBackend.FLASH_ATTENTION)
    return rows | {"fa4": flash_attention_4(x)}
