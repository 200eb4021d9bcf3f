"""Attention over a dense mask in float64, with the error bounds of its results.

This is a second definition, written from eq. 8-10 independently of the reference, so that the
reference is tested too. It takes masks, not blocks; `mask_of` turns each form into a mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from msa.conformance.tolerances import EXACT, LSE_STORED, Precision
from msa.ir import Array, Sequences


def causal_mask(sequences: Sequences, groups: int) -> Array:
    """The mask [Tq, Hkv, Tk] of the tokens of the same sequence up to the query (R1, R2, R3)."""
    mask = np.zeros((sequences.total_q, groups, sequences.total_k), bool)
    for qs, ks in sequences.spans():
        n_q, n_k = qs.stop - qs.start, ks.stop - ks.start
        for i in range(n_q):
            mask[qs.start + i, :, ks.start : ks.start + n_k - n_q + i + 1] = True
    return mask


def block_mask(indices: Array, sequences: Sequences, block_size: int) -> Array:
    """The mask [Tq, Hkv, Tk] of the visible tokens of the blocks in indices [Tq, Hkv, any] (R3)."""
    mask = np.zeros((*indices.shape[:2], sequences.total_k), bool)
    for qs, ks in sequences.spans():
        for i in range(qs.start, qs.stop):
            position = ks.stop - ks.start - (qs.stop - i)
            tokens = np.arange(position + 1)
            for r in range(indices.shape[1]):
                read = np.isin(tokens // block_size, indices[i, r])
                mask[i, r, ks.start : ks.start + position + 1] = read
    return mask


def by_group(x: Array, groups: int) -> Array:
    """[Tq, Hq, any] to [Tq, Hkv, G, any]."""
    return x.reshape(x.shape[0], groups, x.shape[1] // groups, x.shape[2])


def product_sizes(a: Array, b: Array, precision: Precision) -> tuple[Array, Array]:
    """Sizes and error bounds, both [i, h, j], of the sums of a[i, h, d] b[j, h, d] over d.

    The size is the sum of the magnitudes; for the bound see points 1 and 7 of the budget.
    """
    sizes = np.einsum("ihd,jhd->ihj", np.abs(a), np.abs(b))
    largest = np.zeros_like(sizes)
    if precision.unit is not None:
        rows, columns = precision.unit.aligned(a), precision.unit.aligned(b).transpose(1, 0, 2)
        for d in range(a.shape[-1]):
            largest = np.maximum(largest, rows[..., None, d] * columns[None, ..., d])
    return sizes, precision.sum_error(a.shape[-1], sizes, largest)


@dataclass(frozen=True)
class Attention:
    """Softmax attention of q [Tq, Hq, D] over the True entries of mask [Tq, Hkv, Tk] (eq. 8).

    A row without a True entry has lse -inf and out 0; no property compares such rows.
    """

    q: Array
    k: Array
    v: Array
    mask: Array
    scale: float
    parts: int = 1
    """The number of parts into which the sum may be split: k in the budget."""

    @cached_property
    def support(self) -> Array:
        """The mask for every query head: [Tq, Hq, Tk]."""
        return np.repeat(self.mask, self.q.shape[1] // self.k.shape[1], axis=1)

    def per_head(self, x: Array) -> Array:
        """[Tk, Hkv, any] to [Tk, Hq, any]."""
        return np.repeat(x, self.q.shape[1] // self.k.shape[1], axis=1)

    @cached_property
    def logits(self) -> Array:
        """The scaled products [Tq, Hq, Tk]; -inf outside the support."""
        products = self.scale * np.einsum("ihd,jhd->ihj", self.q, self.per_head(self.k))
        return np.where(self.support, products, -np.inf)

    @cached_property
    def lse(self) -> Array:
        """The log of the sum of exp of the logits: [Tq, Hq]."""
        top = np.max(self.logits, axis=-1, initial=-np.inf, keepdims=True)
        anchor = np.where(np.isfinite(top), top, 0.0)
        with np.errstate(divide="ignore"):
            return (anchor + np.log(np.exp(self.logits - anchor).sum(-1, keepdims=True)))[..., 0]

    @cached_property
    def probabilities(self) -> Array:
        """The softmax weights [Tq, Hq, Tk]; 0 outside the support."""
        lse = np.where(np.isfinite(self.lse), self.lse, 0.0)
        weights = np.exp(self.logits - lse[..., None])
        # a large lse has a large roundoff; dividing by the sum removes its effect
        total = weights.sum(-1, keepdims=True)
        return weights / np.where(total > 0, total, 1.0)

    @cached_property
    def out(self) -> Array:
        """The attention output: [Tq, Hq, Dv]."""
        return np.einsum("ihj,jhe->ihe", self.probabilities, self.per_head(self.v))

    @cached_property
    def size(self) -> Array:
        """A = sum of p |v|: [Tq, Hq, Dv]."""
        return np.einsum("ihj,jhe->ihe", self.probabilities, np.abs(self.per_head(self.v)))

    def delta(self, precision: Precision) -> Array:
        """The error bound of an exponent: [Tq, Hq, 1] (point 1 of the budget)."""
        sizes, errors = product_sizes(self.q, self.per_head(self.k), precision)
        errors = self.scale * (errors + 8 * precision.work * sizes)
        return np.max(errors * self.support, axis=-1, initial=0.0, keepdims=True)

    def weight_error(self, precision: Precision) -> Array:
        """The relative error of a probability before rounding to the stored dtype: [Tq, Hq, 1]."""
        n = self.support.sum(-1, keepdims=True)
        with np.errstate(over="ignore"):
            return np.expm1(2 * self.delta(precision)) + (n + self.parts + 8) * precision.work

    def lse_error(self, precision: Precision, kept: float = 0.0) -> Array:
        """The error of the exponent s - lse, if lse was kept: [Tq, Hq, 1] (point 8)."""
        u = precision.work
        finite = np.where(np.isfinite(self.lse), np.abs(self.lse), 0.0)
        return (max(kept, u) + 3 * u) * finite[..., None]

    def recomputed_error(self, precision: Precision, kept: float = 0.0) -> Array:
        """As weight_error, for probabilities computed again as exp(s - lse) (point 8)."""
        n = self.support.sum(-1, keepdims=True)
        with np.errstate(over="ignore"):
            exponents = np.expm1(2 * self.delta(precision) + self.lse_error(precision, kept))
        return exponents + (n + self.parts + 8) * precision.work

    def out_bound(self, precision: Precision) -> Array:
        """The error bound of out: [Tq, Hq, Dv] (points 2, 5, 6)."""
        return self._out_bound(precision) + self._out_bound(EXACT)

    def _out_bound(self, precision: Precision) -> Array:
        values, read = self.per_head(self.v)[None], self.support[..., None].transpose(0, 2, 1, 3)
        highest = np.where(read, values, -np.inf).max(axis=1, initial=-np.inf)
        lowest = np.where(read, values, np.inf).min(axis=1, initial=np.inf)
        n = self.support.sum(-1, keepdims=True)
        with np.errstate(over="ignore"):
            exponents = np.expm1(np.minimum(2 * self.delta(precision), 700.0)) * self.size
        highest, lowest = np.where(n > 0, highest, 0.0), np.where(n > 0, lowest, 0.0)
        spread, largest = highest - lowest, np.maximum(np.abs(highest), np.abs(lowest))
        sums = (n + self.parts + 8) * precision.work * largest
        stored = precision.stored * (2 * largest + np.abs(self.out))
        steps = precision.tiny * (n * largest + 1)
        return np.minimum(exponents, spread) + sums + stored + steps

    def lse_bound(self, precision: Precision) -> Array:
        """The error bound of lse, stored in float32: [Tq, Hq] (points 3, 6)."""
        finite = np.where(np.isfinite(self.lse), np.abs(self.lse), 0.0)
        n = self.support.sum(-1)
        return (
            sum(
                self.delta(p)[..., 0] + (n + self.parts + 8) * p.work + p.work * finite
                for p in (precision, EXACT)
            )
            + LSE_STORED * finite
        )
