"""The error budget of a matrix unit is right: it is tested on a model of the unit.

The model adds as the tensor cores of Hopper do (arXiv 2512.07004): products are exact, aligned to
the largest of them, and cut off. float64 has 28 bits more than the unit keeps.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from msa.conformance.cases import Fill, round_to
from msa.conformance.tolerances import HOPPER, PRECISIONS, Disagreement, compare
from msa.conformance.yardstick import product_sizes

DTYPES = sorted(HOPPER)
KINDS = ("integers", "normal", "tiny", "large")


def cut(x, unit):
    """Round towards zero, to a multiple of unit."""
    return np.trunc(x / unit) * unit


def exponent(x, least=-np.inf):
    return np.maximum(np.frexp(x)[1] - 1, least)


def by_matrix_unit(a, b, unit):
    """The sum of a[d] * b[d], a group at a time."""
    least, total = exponent(unit.normal), 0.0
    for start in range(0, len(a), unit.group):
        x, y = a[start : start + unit.group], b[start : start + unit.group]
        x, y = x[x * y != 0], y[x * y != 0]
        products, orders = x * y, exponent(x, least) + exponent(y, least)
        orders = np.maximum(orders, exponent(products))  # a carry, where 1.5 * 1.5 is more than 2
        terms, orders = np.append(products, total), np.append(orders, exponent(total))
        largest = orders[terms != 0].max(initial=-np.inf)
        if np.isfinite(largest):
            total = cut(terms, 2.0 ** (largest - unit.bits)).sum()
            total = cut(total, 2.0 ** (exponent(total) - 23)) if total else 0.0
    return total


def bound_of(a, b, precision):
    """The error and the bound of one sum."""
    _, errors = product_sizes(a[None, None], b[None, None], precision)
    return float(errors[0, 0, 0])


def on_hopper(dtype):
    return replace(PRECISIONS[dtype], unit=HOPPER[dtype])


def drawn(dtype, terms, seed):
    rng = np.random.default_rng(seed)
    stored = "float16" if dtype == "float8_e4m3fn" else dtype
    a, b = (
        Fill(KINDS[rng.integers(len(KINDS))], int(rng.integers(9999))).make((terms,), stored)
        for _ in range(2)
    )
    if dtype == "float8_e4m3fn":
        import torch

        a, b = (torch.tensor(x).to(torch.float8_e4m3fn).double().numpy() for x in (a, b))
    return a, b


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_sum_of_the_model_is_beyond_its_bound(dtype):
    precision, closest = on_hopper(dtype), 0.0
    for seed in range(3000):
        a, b = drawn(dtype, 1 + seed % 50, seed)
        error = abs(by_matrix_unit(a, b, HOPPER[dtype]) - a @ b)
        bound = bound_of(a, b, precision)
        assert error <= bound, (seed, error, bound)
        closest = max(closest, error / bound if error else 0.0)
    print(f"{dtype}: the worst of 3000 sums has {closest:.0%} of its bound")


def test_the_worst_case_of_the_derivation_is_nearly_reached():
    """One product is 1, fifteen products lose almost a step each, and the sum loses three more."""
    unit = HOPPER["float16"]
    step = 2.0**-unit.bits
    a = np.full(16, 2.0**-14)
    b = np.full(16, 15 / 16 * step / 2.0**-14)  # each product is just less than a step
    a[0] = b[0] = 1.0
    b[1:4] += step / 2.0**-14
    error = abs(by_matrix_unit(a, b, unit) - a @ b)
    assert error == (15 * 15 / 16 + 3) * step
    bound = bound_of(a, b, on_hopper("float16"))
    assert 0.8 * bound < error <= bound


def test_subnormal_factors_are_aligned_as_if_they_were_normal():
    """The error of such a sum is larger than rounding each sum explains; a GPU has shown this."""
    a = round_to(np.array([3, 1, 1]) * 2.0**-24, "float16")
    b = round_to(np.array([64.0, 2047 / 2048, 2047 / 2048]), "float16")
    error = abs(by_matrix_unit(a, b, HOPPER["float16"]) - a @ b)
    assert error > 2 * bound_of(a, b, PRECISIONS["float16"])
    assert error <= bound_of(a, b, on_hopper("float16"))


@pytest.mark.parametrize(
    ("dtype", "terms"),
    [(d, n) for d in DTYPES for n in (2, 3, 16, 64, 128) if n <= 16 or HOPPER[d].bits > 13],
)
def test_a_forgotten_product_is_beyond_the_bound(dtype, terms):
    """The bound is below the smallest product, which here is at least a tenth of the others."""
    rng = np.random.default_rng(terms)
    a, b = (rng.choice([-1, 1], terms) * rng.integers(4, 13, terms) for _ in range(2))
    a, b = a.astype(float), b.astype(float)
    smallest = np.abs(a * b).argmin()
    wrong = a @ b - a[smallest] * b[smallest]
    with pytest.raises(Disagreement, match="off by"):
        compare("score", wrong, a @ b, bound_of(a, b, on_hopper(dtype)))


def test_float32_rounded_to_ten_bits_is_beyond_the_bound():
    """float32 does not use matrix units; if its factors are rounded (TF32), this is an error."""
    assert "float32" not in HOPPER
    rng = np.random.default_rng(0)
    for terms in (1, 3, 16, 64):
        a, b = rng.standard_normal((2, 32, terms)).astype(np.float32).astype(float)
        tf32 = [np.ldexp(np.rint(np.ldexp(m, 11)), e - 11) for m, e in map(np.frexp, (a, b))]
        beyond = 0
        for i in range(32):
            wrong, right = tf32[0][i] @ tf32[1][i], a[i] @ b[i]
            beyond += abs(wrong - right) > bound_of(a[i], b[i], PRECISIONS["float32"])
        assert beyond >= 24, (terms, beyond)


def test_without_a_matrix_unit_the_budget_is_that_of_rounded_sums():
    a, b = np.random.default_rng(1).standard_normal((2, 7))
    for dtype, precision in PRECISIONS.items():
        assert bound_of(a, b, precision) == 7 * precision.work * (np.abs(a) @ np.abs(b)), dtype
