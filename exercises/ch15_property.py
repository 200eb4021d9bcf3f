"""Chapter 15: find the planted bugs with Hypothesis.

`combine(outs, lses)` should merge softmaxes over parts of the keys into the softmax over all keys.
Write a property that holds for a right function, and that Hypothesis can break for a wrong one. The
check tries it on a right function and on four wrong ones. The property below finds one of them.
"""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st


def attend(scores, values):
    """Output and log-sum-exp over some keys; over no keys 0 and -inf."""
    if not len(scores):
        return 0.0, -np.inf
    weights = np.exp(scores - scores.max())
    return weights @ values / weights.sum(), np.log(weights.sum()) + scores.max()


def holds(combine):
    """The property, as a function that Hypothesis calls with cases."""

    @given(st.integers(1, 4))
    def prop(parts):  # TODO: draw scores, values and borders; some parts may be empty
        scores, values = np.zeros(2 * parts), np.arange(2.0 * parts)
        pieces = [
            attend(scores[2 * i : 2 * i + 2], values[2 * i : 2 * i + 2]) for i in range(parts)
        ]
        out, _ = combine(*zip(*pieces))
        assert abs(out - attend(scores, values)[0]) < 1e-9

    return prop
