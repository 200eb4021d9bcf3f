"""Decoding: the case of few queries, keys and values in pages (R2)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from msa.config import MSAConfig
from msa.ir import Array, Output, PagedKV, Selection, Sequences
from msa.reference.attention import attend_selection
from msa.reference.selection import select_fused


def decode_step(
    q: Float[Array, "B n Hq D"], q_idx: Float[Array, "B n Hkv Di"] | None,
    cache: PagedKV, config: MSAConfig, ids: Int[Array, "B n Hkv k"] | None = None,
) -> Output:  # fmt: skip
    """Copy each sequence's pages into one array, then attend; empty slots give 0 and LSE -inf.

    The blocks are those of `ids`, or they are selected by q_idx.
    """
    batch, n, heads, _ = q.shape
    out = np.zeros((batch, n, heads, cache.v_pages.shape[-1]), q.dtype)
    lse = np.full((batch, n, heads), -np.inf, np.float32)
    chosen: list[Array] = []
    borders = [0]
    for s in range(batch):
        if cache.lengths[s] == 0:
            continue
        k, v, k_idx = cache.flat(s)
        alone = Sequences.one(n, len(k))
        if ids is None:
            assert q_idx is not None
            selection = select_fused(q_idx[s], k_idx, alone, config)
        else:
            selection = Selection(ids[s], alone, config.block_size)
        one = attend_selection(q[s], k, v, selection, config.softmax_scale_for(q.shape[-1]))
        out[s], lse[s] = one.out, one.lse
        chosen.append(selection.indices)
        borders.append(borders[-1] + len(k))
    live = Sequences(tuple(n * s for s in range(len(borders))), tuple(borders))
    top_k = config.top_k if ids is None else ids.shape[-1]
    empty = np.zeros((0, cache.k_pages.shape[2], top_k), np.int32)
    return Output(out, lse, Selection(np.concatenate([empty, *chosen]), live, config.block_size))
