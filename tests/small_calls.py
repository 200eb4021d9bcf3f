"""Arguments of small calls: what tests of the public functions have in common."""

from __future__ import annotations

import numpy as np

import msa

CONFIG = msa.MSAConfig(block_size=4, top_k=3)
BACKENDS = ["reference", "torch"]


def arrays(rng, *lead_q, lead_k=None, heads=4, kv_heads=2, dim=6, dtype=np.float32):
    lead_k = lead_k or lead_q
    shapes = {
        "q": (*lead_q, heads, dim), "k": (*lead_k, kv_heads, dim), "v": (*lead_k, kv_heads, 5),
        "q_idx": (*lead_q, kv_heads, 3), "k_idx": (*lead_k, 3),
    }  # fmt: skip
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
