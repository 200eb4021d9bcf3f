"""Decoding: the case of few queries, keys and values in pages (R2)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from msa.config import MSAConfig
from msa.ir import Array, Output, PagedKV, Selection, Sequences
from msa.reference.attention import attend


def decode_step(
    q: Float[Array, "B n Hq D"], q_idx: Float[Array, "B n Hkv Di"],
    cache: PagedKV, config: MSAConfig,
) -> Output:  # fmt: skip
    """Copy each sequence's pages into one array, then attend; empty slots give 0 and LSE -inf."""
    batch, n, heads, _ = q.shape
    out = np.zeros((batch, n, heads, cache.v_pages.shape[-1]), q.dtype)
    lse = np.full((batch, n, heads), -np.inf, np.float32)
    chosen: list[Array] = []
    borders = [0]
    for s in range(batch):
        if cache.lengths[s] == 0:
            continue
        k, v, k_idx = cache.flat(s)
        one = attend(q[s], k, v, q_idx[s], k_idx, Sequences.one(n, len(k)), config)
        assert one.selection is not None
        out[s], lse[s] = one.out, one.lse
        chosen.append(one.selection.indices)
        borders.append(borders[-1] + len(k))
    live = Sequences(tuple(n * s for s in range(len(borders))), tuple(borders))
    empty = np.zeros((0, q_idx.shape[2], config.top_k), np.int32)
    return Output(out, lse, Selection(np.concatenate([empty, *chosen]), live, config.block_size))
