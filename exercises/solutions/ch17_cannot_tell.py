"""Chapter 17: is one model better than the other, or can these questions not tell?"""


def verdict(right_a, asked_a, right_b, asked_b):
    """ "a", "b" or "cannot tell"."""
    a, b = right_a / asked_a, right_b / asked_b
    error = (a * (1 - a) / asked_a + b * (1 - b) / asked_b) ** 0.5
    if abs(a - b) <= 2 * error:
        return "cannot tell"
    return "a" if a > b else "b"
