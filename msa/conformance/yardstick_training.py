"""Gradients of attention and the KL loss, by their dense definitions, with error bounds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from msa.conformance.tolerances import EXACT, Precision
from msa.conformance.yardstick import Attention, by_group
from msa.ir import Array


@dataclass(frozen=True)
class Gradients:
    """Gradients of <out, d_out> + <lse, d_lse> in q, k, v, and their error bounds (R18).

    With P the probabilities, g = d_out, and delta = <g, out> - d_lse for each query and head,

        dV = P^T g        dS = P (g V^T - delta)        dQ = scale dS K        dK = scale dS^T Q.

    The budget is that of the backward pass of flash attention: lse was kept, `out` was stored, P
    and dS are rounded to the stored dtype for the matrix products, and all sums (over tokens, heads
    and work items) are kept in the working precision.

        P        recomputed_error (point 8), and 2 u' of the result with its error, for rounding
        g V^T    (Dv + 8) u of its sum of magnitudes; <g, out> has the same, and in addition g
                 times the bound of `out` and u', because `out` was stored
        dS       the error of each factor times the size of the other factor with its error; then
                 u' of the result with its error, for rounding
        sums     the number of terms times u of the sum of magnitudes
        results  u' of the result with its error, for rounding
    """

    attention: Attention
    d_out: Array
    d_lse: Array

    @cached_property
    def d_logits(self) -> Array:
        """dS: [Tq, Hq, Tk]."""
        a = self.attention
        d_weights = np.einsum("ihe,jhe->ihj", self.d_out, a.per_head(a.v))
        delta = (self.d_out * a.out).sum(-1) - self.d_lse
        return a.probabilities * (d_weights - delta[..., None])

    def values(self) -> dict[str, Array]:
        """dq [Tq, Hq, D], dk [Tk, Hkv, D] and dv [Tk, Hkv, Dv], by the names of the inputs."""
        a = self.attention
        return self._products(self.d_logits, a.q, a.per_head(a.k), a.probabilities, self.d_out)

    def _products(
        self, d_logits: Array, q: Array, keys: Array, weights: Array, d_out: Array
    ) -> dict[str, Array]:
        scale = self.attention.scale
        return {
            "q": scale * np.einsum("ihj,jhd->ihd", d_logits, keys),
            "k": self._sum_groups(scale * np.einsum("ihj,ihd->jhd", d_logits, q)),
            "v": self._sum_groups(np.einsum("ihj,ihe->jhe", weights, d_out)),
        }

    def _sum_groups(self, x: Array) -> Array:
        """[Tk, Hq, any] to [Tk, Hkv, any]."""
        return by_group(x, self.attention.k.shape[1]).sum(2)

    def bounds(self, precision: Precision) -> dict[str, Array]:
        """The error bound of each entry of each gradient."""
        own, exact = self._bounds(precision), self._bounds(EXACT)
        return {name: own[name] + exact[name] for name in own}

    def _bounds(self, precision: Precision) -> dict[str, Array]:
        a, u, stored = self.attention, precision.work, precision.stored
        p, g = a.probabilities, np.abs(self.d_out)
        p_error = p * (a.recomputed_error(precision) + 2 * stored) + precision.tiny * a.support
        sizes = np.einsum("ihe,jhe->ihj", g, np.abs(a.per_head(a.v)))
        sums = (g * np.abs(a.out)).sum(-1) + np.abs(self.d_lse)
        row_error = (g * a.out_bound(precision)).sum(-1) + (stored + u) * sums
        inner = (a.v.shape[-1] + 8) * u * (sizes + sums[..., None]) + row_error[..., None]
        magnitude = p * (sizes + sums[..., None])
        error = p_error * (sizes + sums[..., None] + inner) + p * inner
        error = (1 + stored) * error + stored * np.abs(self.d_logits) + precision.tiny * a.support
        terms = a.support.sum() + 8  # no sum has more terms than the support has entries
        error = error + terms * u * magnitude
        weights = p_error + terms * u * p
        made = self._products(error, np.abs(a.q), np.abs(a.per_head(a.k)), weights, g)
        return {
            name: (1 + stored) * made[name] + stored * np.abs(value) + precision.tiny
            for name, value in self.values().items()
        }


@dataclass(frozen=True)
class Alignment:
    """The KL loss: mean probabilities of a group against softmax of its scores (eq. 9-10, R17)."""

    attention: Attention
    """The main branch; only its probabilities are used."""
    index: Attention
    """The index branch: one head for each group, all values finite."""
    scores: Array | None = None
    """Scores [Tq, Hkv, Tk] with NaN and infinities, used in place of those of `index`."""
    lse_kept: float = 0.0
    """The roundoff of the given lse of the main branch, if it is coarser than the work."""

    @cached_property
    def teacher(self) -> Array:
        """The mean probabilities of each group: [Tq, Hkv, Tk]."""
        p = self.attention.probabilities
        groups = self.index.q.shape[1]
        return by_group(p, groups).mean(2)

    @cached_property
    def terms(self) -> Array:
        """log P - log P_idx where P > 0, else 0: [Tq, Hkv, Tk]."""
        some = self.teacher > 0
        gap = np.log(np.where(some, self.teacher, 1.0)) - np.where(some, self.log_student, 0.0)
        return np.where(some, gap, 0.0)

    @cached_property
    def log_student(self) -> Array:
        """The log of the softmax of the scores: [Tq, Hkv, Tk]; -inf outside the support.

        NaN counts as -inf. If the highest score of a row is +inf or -inf, all tokens with this
        score share the whole mass.
        """
        scores = self.index.logits if self.scores is None else self.scores
        mask = self.attention.mask
        scores = np.where(mask & ~np.isnan(scores), scores, -np.inf)
        top = scores.max(-1, initial=-np.inf, keepdims=True)
        tied = np.where(mask & (scores == top), 0.0, -np.inf)
        finite = np.isfinite(top)
        shifted = np.where(finite, scores - np.where(finite, top, 0.0), tied)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

    @property
    def count(self) -> int:
        """The number of distributions: Tq * Hkv."""
        return max(1, self.teacher.shape[0] * self.teacher.shape[1])

    def loss(self) -> float:
        """The KL loss, a mean over queries and groups."""
        return float((self.teacher * self.terms).sum() / self.count)

    def bound(self, precision: Precision) -> float:
        """The error bound of the loss (points 4-6)."""
        both = self._bound(precision, self.lse_kept) + self._bound(EXACT)
        return both + precision.work * abs(self.loss())

    def _bound(self, precision: Precision, kept: float = 0.0) -> float:
        p, u = self.teacher, precision.work
        n = self.attention.mask.sum(-1, keepdims=True)
        groups = p.shape[1]
        main = 2 * self.attention.delta(precision) + self.attention.lse_error(precision, kept)
        exponents = by_group(main, groups).max(2) + 2 * self.index.delta(precision)
        some = p > 0
        logs = np.abs(np.log(np.where(some, p, 1.0))) + np.abs(np.where(some, self.log_student, 0))
        both = exponents + 2 * (n + 8) * u + u * logs
        gap = np.abs(self.terms)
        lost = some * (1 + logs) * (2.0**-126 if u > EXACT.work else 2.0**-1022)
        error = p * ((np.expm1(exponents) + (n + 8) * u) * gap + both) + lost
        return float((error + p.size * u * p * gap).sum() / self.count)

    def gradients(self) -> dict[str, Array]:
        """The gradients in q_idx and k_idx; d KL / d scores = (student - teacher) / count."""
        slope = (np.exp(self.log_student) - self.teacher) / self.count * self.index.scale
        keys = self.index.k[:, 0]
        return {
            "q_idx": np.einsum("irj,jc->irc", slope, keys),
            "k_idx": np.einsum("irj,irc->jc", slope, self.index.q),
        }

    def gradient_bounds(self, precision: Precision) -> dict[str, Array]:
        """The error bounds of these gradients.

        Both probabilities have the error of point 8, and sums the error of their number of terms.
        The difference may be rounded to the stored dtype before the product, and the result is
        rounded: each time u' of the value with its error.
        """
        a, index, student = self.attention, self.index, np.exp(self.log_student)
        made = []
        for p, kept in ((precision, self.lse_kept), (EXACT, 0.0)):
            teacher = by_group(a.recomputed_error(p, kept), self.teacher.shape[1])
            terms = self.teacher.size + 8
            error = self.teacher * (teacher.max(2) + (terms + 8) * p.work)
            error = error + student * (index.recomputed_error(p) + terms * p.work)
            error = (1 + p.stored) * error + p.stored * np.abs(student - self.teacher)
            error = (error + 2 * p.tiny * a.mask) / self.count * index.scale
            made.append(error)
        error, keys = made[0] + made[1], np.abs(index.k[:, 0])
        bounds = {
            "q_idx": np.einsum("irj,jc->irc", error, keys),
            "k_idx": np.einsum("irj,irc->jc", error, np.abs(index.q)),
        }
        stored, tiny, values = precision.stored, precision.tiny, self.gradients()
        return {n: (1 + stored) * b + stored * abs(values[n]) + tiny for n, b in bounds.items()}
