"""Chapter 5: the loss of the index, and its gradient."""

import numpy as np


def softmax(x):
    """Over the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def loss_and_gradient(logits, scores):
    """The KL of one query, and its derivative with respect to `scores`."""
    teacher = softmax(logits).mean(0)  # probabilities first, then the mean
    student = softmax(scores)
    return (teacher * np.log(teacher / student)).sum(), student - teacher
