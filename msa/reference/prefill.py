"""Prefill over a paged cache: many queries of each sequence, keys and values in pages (R2)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from msa.config import MSAConfig
from msa.ir import Array, Output, PagedKV, Sequences
from msa.reference.attention import attend


def prefill_chunk(
    q: Float[Array, "Tq Hq D"], q_idx: Float[Array, "Tq Hkv Di"],
    cache: PagedKV, sequences: Sequences, config: MSAConfig,
) -> Output:  # fmt: skip
    """Copy all pages into packed arrays, in the order of the blocks, then attend."""
    none = tuple(pages[:0, 0] for pages in (cache.k_pages, cache.v_pages, cache.k_idx_pages))
    parts = [none, *(cache.flat(s) for s in range(sequences.batch))]
    k, v, k_idx = (np.concatenate(arrays) for arrays in zip(*parts))
    return attend(q, k, v, q_idx, k_idx, sequences, config)
