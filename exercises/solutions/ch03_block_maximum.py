"""Chapter 3: score the blocks, and choose."""

import numpy as np


def block_scores(q_idx, k_idx, position, block):
    """[blocks] for one query: q_idx [D], k_idx [T, D]; -inf where no token is visible."""
    scores = np.where(np.arange(len(k_idx)) <= position, k_idx @ q_idx, -np.inf)
    return scores.reshape(-1, block).max(axis=1)


def choose(scores, own, k):
    """[k] ids of one query."""
    others = sorted(range(own), key=lambda b: (-scores[b], b))  # only the past
    ids = sorted([own, *others[: k - 1]])
    return np.array(ids + [-1] * (k - len(ids)))
