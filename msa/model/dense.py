"""Causal attention to all earlier tokens, by PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

import msa


def attend_densely(
    q: Float[Tensor, "Tq Hq D"], k: Float[Tensor, "Tk Hkv D"], v: Float[Tensor, "Tk Hkv D"],
    sequences: msa.Sequences, scale: float,
) -> Float[Tensor, "Tq Hq D"]:  # fmt: skip
    """Causal attention within each sequence, by PyTorch's SDPA. The queries are its last tokens.

    >>> x = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    >>> attend_densely(torch.zeros(1, 1, 1), x, x, msa.Sequences.one(1, 3), 1.0).flatten()
    tensor([2.])
    """
    spans = list(sequences.spans())
    sizes = {(qs.stop - qs.start, ks.stop - ks.start) for qs, ks in spans}
    if len(sizes) > 1:
        parts = [
            attend_densely(q[qs], k[ks], v[ks], msa.Sequences.one(len(q[qs]), len(k[ks])), scale)
            for qs, ks in spans
            if qs.stop > qs.start
        ]
        return torch.cat(parts)
    ((n_q, n_k),) = sizes
    if n_q == 0:
        return torch.empty_like(q)
    q, k, v = (x.unflatten(0, (len(spans), -1)).transpose(1, 2) for x in (q, k, v))
    mask = None
    if 1 < n_q < n_k:
        mask = torch.ones(n_q, n_k, dtype=torch.bool, device=q.device).tril(n_k - n_q)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=n_q == n_k, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2).flatten(0, 1)
