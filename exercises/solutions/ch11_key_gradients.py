"""Chapter 11: the gradients of one block, from the queries that read it."""

import numpy as np


def block_gradients(q, k, v, d_out, lse, delta, readers, first, scale):
    """dK and dV of the block k, v [block, D], whose first token is `first`."""
    d_k, d_v = np.zeros_like(k), np.zeros_like(v)
    for i in readers:
        seen = first + np.arange(len(k)) <= i
        p = np.where(seen, np.exp(scale * k @ q[i] - lse[i]), 0.0)
        d_v += np.outer(p, d_out[i])
        d_s = p * (v @ d_out[i] - delta[i])
        d_k += scale * np.outer(d_s, q[i])
    return d_k, d_v
