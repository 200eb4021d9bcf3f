"""Chapter 15: find the planted bugs with Hypothesis."""

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

    @given(
        st.lists(st.integers(-900, 900), min_size=1, max_size=8),
        st.lists(st.integers(0, 8), max_size=3),
    )
    def prop(scores, borders):
        s = np.array(scores, float)
        v = np.arange(len(s), dtype=float)
        at = [0, *sorted(min(b, len(s)) for b in borders), len(s)]
        pieces = [attend(s[a:b], v[a:b]) for a, b in zip(at, at[1:])]
        out, lse = combine(*zip(*pieces))
        right_out, right_lse = attend(s, v)
        assert abs(out - right_out) < 1e-9
        assert abs(lse - right_lse) < 1e-9

    return prop
