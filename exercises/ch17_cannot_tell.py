"""Chapter 17: is one model better than the other, or can these questions not tell?

A share p of n questions has a standard error of sqrt(p (1 - p) / n). The difference of two shares
has the root of the sum of both squares. Say "cannot tell" if the difference is less than twice
that.
"""


def verdict(right_a, asked_a, right_b, asked_b):
    """ "a", "b" or "cannot tell"."""
    a, b = right_a / asked_a, right_b / asked_b
    return "a" if a > b else "b"  # TODO
