"""Chapter 5: the loss of the index, and its gradient.

The teacher is the mean of the heads' probabilities. The loss is KL(teacher || student).
"""

import numpy as np


def softmax(x):
    """Over the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def loss_and_gradient(logits, scores):
    """The KL of one query, and its derivative with respect to `scores`.

    logits: [heads, tokens] of the main branch. scores: [tokens] of the index branch.
    """
    teacher = softmax(logits.mean(0))  # TODO: two heads that disagree cancel each other here
    student = softmax(scores)
    return (teacher * np.log(teacher / student)).sum(), teacher - student  # TODO: check the sign
