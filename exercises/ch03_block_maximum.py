"""Chapter 3: score the blocks, and choose.

`block_scores` gives the best visible token of each block (R5). `choose` keeps the own block and the
best others (R6), equal scores to the lower id (R7), in ascending order with -1 behind (R8).
"""

import numpy as np


def block_scores(q_idx, k_idx, position, block):
    """[blocks] for one query: q_idx [D], k_idx [T, D]; -inf where no token is visible."""
    scores = k_idx @ q_idx
    return scores.reshape(-1, block).mean(axis=1)  # TODO: which number stands for a block?


def choose(scores, own, k):
    """[k] ids of one query."""
    best = np.argsort(scores)[::-1][:k]  # TODO: the own block, ties, blocks of the future
    return best
