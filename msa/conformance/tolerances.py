"""The error budget of all comparisons, and its derivation. No test may use a looser bound.

Results are compared with `yardstick.py`, which computes in float64 from exactly the numbers that
the backend was given. Let u be the roundoff of the working precision (2^-24 for float32 sums and
products) and u' that of the stored dtype. For one query and head with support J, |J| = n:

1. A logit s_j = scale * <q, k_j> is a sum of D rounded products. In any order of summation it is
   off by at most D u * scale * S_j with S_j = sum_d |q_d k_jd|. The scale, the subtraction of the
   maximum and the factor log2(e) of exp2 add a few u of |s|. So every exponent is off by at most
   delta = max_J scale * (D u + 8 u) S_j. A matrix unit adds in another way: see point 7.
2. So each weight is off by a factor within exp(+-delta), a probability within exp(+-2 delta), and

       |out error| <= (expm1(2 delta) + (n + k + 8) u + 2 u') V + u' |out|,     V = max_J |v_j|:

   n + k + 8 stands for the two sums over n tokens in up to k parts, exp and the division; 2 u'
   because a kernel may round weights and partial results to the stored dtype; u' for storing the
   result. However large delta is, an average of values stays between the values, so the first term
   is at most max_J v - min_J v. (The code has sum_J p_j |v_j| in place of V in this term.)
3. |lse error| <= delta + (n + k + 8) u + u |lse|, since |d lse| <= max |d s|.
4. KL = sum P (log P - log P_idx). Each logarithm is off by at most 2 delta + (n + 8) u + u |log|:

       |error| <= sum P ((expm1(2 delta) + (n + 8) u) |log P - log P_idx| + both errors).

5. A number that underflows in the working or stored dtype loses at most the smallest step `tiny`;
   this counts once for each of the n terms.
6. The yardstick rounds too, so every bound is that of the backend plus the same bound with
   u = 2^-53.
7. A matrix unit does not round sums. It adds `group` exact products and the accumulator c at once,
   as fixed-point numbers with `bits` bits below the leading bit of the largest of them. Lower bits
   are cut off, and the sum is cut to float32 (Fasi, Higham, Mikaitis, Pranesh, "Numerical
   behavior of NVIDIA tensor cores", PeerJ CS 2021; for Hopper: Khattak, Mikaitis, "Accurate models
   of NVIDIA tensor cores", arXiv 2512.07004). The exponent of a product is the sum of those of its
   factors, and a subnormal factor has that of the least normal number: such a product is aligned
   as if it were larger than it is. With |x|+ = max(|x|, least normal number), 0 for 0, and
   P_j = max_d |q_d|+ |k_jd|+, one step cuts at most

       (min(D, group) + 1) 2^-bits max(P_j, |c|) + 2^-23 |new c|

   and |c| <= S_j, because nothing is ever rounded up. With ceil(D / group) steps, D u S_j becomes

       ceil(D / group) ((min(D, group) + 1) 2^-bits max(P_j, S_j) + 2^-23 S_j).

   Sums of weights times values stay within point 2: t products at once cost (t + 5) u / 2 of V, all
   groups are full but one in each of k parts, so together they cost (0.66 n + 2.5 k) u; and all
   parts but one have 16 tokens or more. For subnormal factors there is point 5. float32 is
   multiplied outside of matrix units.
8. A backward pass computes p again as exp(s - lse) from the lse that the forward pass kept. Two
   terms are added to the errors of s and lse (2 delta + (n + k + 8) u as in 2): w |lse| for keeping
   lse with roundoff w (u, or 2^-24 if float32 is used by float64), and 3 u |lse| for log2(e), for
   the product with it and for the difference.

Gradients: `yardstick_training.Gradients` carries the same terms through the chain rule.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from msa.ir import Array


@dataclass(frozen=True)
class MatrixUnit:
    """How a matrix unit adds the products of one dtype (point 7)."""

    group: int
    """The number of products that are added at once."""
    bits: int
    """The number of bits kept below the leading bit of the largest product."""
    normal: float
    """The least normal number. A smaller factor is aligned as if it had this size."""

    def aligned(self, factors: Array) -> Array:
        """|x|+, the size by which a factor is aligned."""
        sizes = np.abs(factors)
        return np.where(sizes > 0, np.maximum(sizes, self.normal), 0.0)


HOPPER = {
    "float16": MatrixUnit(group=16, bits=25, normal=2.0**-14),
    "bfloat16": MatrixUnit(group=16, bits=25, normal=2.0**-126),
    "float8_e4m3fn": MatrixUnit(group=32, bits=13, normal=2.0**-6),
}


@dataclass(frozen=True)
class Precision:
    """Roundoffs of one dtype on one backend."""

    stored: float
    """u', the roundoff of inputs and outputs."""
    work: float
    """u, the roundoff of products and sums."""
    tiny: float
    """The smallest step near zero, for weights and results."""
    unit: MatrixUnit | None = None
    """The matrix unit that adds the products; None if each sum is rounded."""

    def sum_error(self, terms: int, sizes: Array, largest: Array) -> Array:
        """The error bound of sums of `terms` products (points 1 and 7).

        Args:
            sizes: S, the sums of the magnitudes of the products.
            largest: P, the largest product of each sum, by the size at which it is aligned.

        >>> u = 2.0**-24
        >>> float(PRECISIONS["float16"].sum_error(32, np.ones(()), np.ones(())) / u)
        32.0
        >>> hopper = Precision(2.0**-11, u, u, HOPPER["float16"])
        >>> float(hopper.sum_error(32, np.ones(()), np.ones(())) / u)  # 2 * (17 / 2 + 2)
        21.0
        """
        if self.unit is None:
            return terms * self.work * sizes
        steps, some = -(-terms // self.unit.group), min(terms, self.unit.group)
        cut = (some + 1) * 2.0**-self.unit.bits * np.maximum(sizes, largest)
        return steps * (cut + 2.0**-23 * sizes)


PRECISIONS = {
    "float64": Precision(2.0**-53, 2.0**-53, 2.0**-1022),
    "float32": Precision(2.0**-24, 2.0**-24, 2.0**-126),
    "float16": Precision(2.0**-11, 2.0**-24, 2.0**-24),
    "bfloat16": Precision(2.0**-8, 2.0**-24, 2.0**-126),
    "float8_e4m3fn": Precision(2.0**-4, 2.0**-24, 2.0**-9),
}
EXACT = PRECISIONS["float64"]
LSE_STORED = 2.0**-24
"""The roundoff of a stored lse, which is float32 for every dtype of the inputs (R10)."""


class Disagreement(AssertionError):
    """A result is farther from the yardstick than its bound, or differs where it must be equal."""


@dataclass(frozen=True)
class Measure:
    """The error of a result and its bound, at the entry that came closest to its bound."""

    error: float = 0.0
    bound: float = 0.0
    relative: float = 0.0
    """||result - yardstick|| / ||yardstick|| over the whole tensor."""

    @property
    def ratio(self) -> float:
        """Error / bound; 0 for exact results."""
        return self.error / self.bound if self.error else 0.0


AGREES = Measure()
"""The measure of a property that allows no difference."""


def worst(*measures: Measure) -> Measure:
    """The measure that came closest to its bound."""
    return max(measures, key=lambda m: (m.ratio, m.error), default=AGREES)


def compare(name: str, got: Array, want: Array, bound: Array) -> Measure:
    """Check that every entry is within its bound. Infinities must be equal.

    Raises:
        Disagreement: an entry is not; the message names the one that exceeds its bound the most.

    >>> compare("x", np.array([1.0, 2.5]), np.array([1.0, 2.0]), np.array([0.1, 1.0])).ratio
    0.5
    """
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape:
        raise Disagreement(f"{name} must have shape {list(want.shape)}, got {list(got.shape)}")
    if got.size == 0:
        return AGREES
    bound = np.broadcast_to(bound, want.shape)
    finite = np.isfinite(want)
    with np.errstate(invalid="ignore"):
        error = np.where(finite, np.abs(got - want), np.where(got == want, 0.0, np.inf))
    error = np.where(np.isnan(error), np.inf, error)
    # an error of 0 against a bound of 0 is fine, any other error against it is not
    ratio = np.divide(error, bound, out=np.where(error > 0, np.inf, 0.0), where=bound > 0)
    at = np.unravel_index(int(ratio.argmax()), ratio.shape)
    if ratio[at] > 1:
        raise Disagreement(
            f"{name}{[int(x) for x in at]} must be {want[at]:.9g} within {bound[at]:.3g}, "
            f"got {got[at]:.9g}, off by {error[at]:.3g}"
        )
    length = np.linalg.norm(want[finite])
    relative = np.linalg.norm(error[finite]) / length if length else 0.0
    return Measure(float(error[at]), float(bound[at]), float(relative))


def same(name: str, got: Array, want: Array) -> Measure:
    """Check that shapes and all entries are equal. NaN equals NaN.

    >>> same("ids", np.array([1, 2]), np.array([1, 2])).ratio
    0.0
    """
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape:
        raise Disagreement(f"{name} must have shape {list(want.shape)}, got {list(got.shape)}")
    differs = (got != want) & ~((got != got) & (want != want))
    if differs.any():
        at = tuple(np.argwhere(differs)[0].tolist())
        raise Disagreement(f"{name}{list(at)} must be {want[at]}, got {got[at]}")
    return AGREES


def require(holds: bool, message: str) -> None:
    """Raise Disagreement with this message unless a statement holds."""
    if not holds:
        raise Disagreement(message)
