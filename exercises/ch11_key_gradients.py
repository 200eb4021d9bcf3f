"""Chapter 11: the gradients of one block, from the queries that read it.

A program of the kernel for dK and dV has one block. It walks the queries that selected the block,
which the reverse index lists, and adds up their parts in this order. The starter has three gaps.
"""

import numpy as np


def block_gradients(q, k, v, d_out, lse, delta, readers, first, scale):
    """dK and dV of the block k, v [block, D], whose first token is `first`.

    q, d_out: [T, D], lse, delta: [T]; one head. readers: the queries that selected the block.
    """
    d_k, d_v = np.zeros_like(k), np.zeros_like(v)
    for i in readers:
        scores = scale * k @ q[i]
        p = np.exp(scores - lse[i])  # TODO: tokens behind query i have weight 0
        d_v += np.outer(p, d_out[i])
        d_s = p * (v @ d_out[i])  # TODO: delta
        d_k += np.outer(d_s, q[i])  # TODO: scale
    return d_k, d_v
