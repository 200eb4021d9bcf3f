"""Chapter 4: attention that reads the future. Mend it.

The function gathers the selected blocks and attends to them. On random numbers its output looks
fine. But a token that comes later changes it. `msa exercise 4` shows which one.
"""

import numpy as np


def attend(q, k, v, ids, position, block):
    """One query [D] over the blocks `ids` of k and v [T, D]; -1 stands for no block."""
    tokens = np.concatenate([np.arange(b * block, (b + 1) * block) for b in ids])
    tokens = tokens[tokens < len(k)]
    scores = k[tokens] @ q * len(q) ** -0.5
    weights = np.exp(scores - scores.max())
    return weights @ v[tokens] / weights.sum()
