"""The images, their split, and what is fitted on the known images. Held-out images are not used.

Only `choose_sharpness` uses labels, those of the known images.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from msa.ir import Array

CLASSES = 10
SHARPNESSES = (12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0)
"""Candidates for the factor on the cosine of two images; see `choose_sharpness`."""


def load_images() -> tuple[Float[Array, "n 64"], Int[Array, " n"]]:
    """scikit-learn's digits: 1,797 handwritten digits, scanned to 8 x 8 pixels from 0 to 1."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    return digits.data / 16.0, digits.target


def split(n: int, held_out: int, block_size: int, seed: int | None) -> tuple[Array, Array]:
    """The numbers of known and of held-out images. Seed None keeps the order of the data set.

    The known images fill whole blocks, so a few more images than `held_out` may be held out.

    >>> known, held_out = split(10, held_out=3, block_size=4, seed=None)
    >>> known, held_out
    (array([0, 1, 2, 3]), array([4, 5, 6, 7, 8, 9]))
    """
    known = (n - held_out) // block_size * block_size
    if held_out < 1 or known < block_size:
        raise ValueError(
            f"held_out must leave a block of {block_size} known images, got {held_out} of {n}"
        )
    order = np.arange(n) if seed is None else np.random.default_rng(seed).permutation(n)
    return order[:known], order[known:]


def views() -> dict[str, Float[Array, "64 64"]]:
    """The linear filter of each group. It is applied to an image as a row vector of pixels."""
    eye = np.eye(64).reshape(64, 8, 8)
    padded = np.pad(eye, ((0, 0), (1, 1), (1, 1)))
    beside = padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]
    above = padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1]
    filters = {
        "pixels": eye,
        "blurred": (2 * eye + beside + above) / 6,
        "upright edges": np.diff(eye, axis=2, append=0),
        "level edges": np.diff(eye, axis=1, append=0),
    }
    return {name: f.reshape(64, 64) for name, f in filters.items()}


def unit(x: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Each row scaled to length 1; a zero row stays zero."""
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(length > 0, length, 1.0)


def album_order(known: Float[Array, "n d"]) -> Int[Array, " n"]:
    """An order in which each image is followed by the most similar image that is left.

    >>> album_order(np.array([[1.0, 0], [0, 1], [1, 0.1], [0.2, 1]]))
    array([0, 2, 3, 1])
    """
    likeness = unit(known) @ unit(known).T
    walk = [0]
    for _ in range(len(known) - 1):
        likeness[:, walk[-1]] = -np.inf
        walk.append(int(likeness[walk[-1]].argmax()))
    return np.array(walk)


def choose_sharpness(seen: list[Float[Array, "n 64"]], labels: Int[Array, " n"]) -> float:
    """The candidate with the highest leave-one-out likelihood among the known images."""
    cosines = [(x @ x.T).astype(np.float32) for x in seen]
    one_hot = np.eye(CLASSES, dtype=np.float32)[labels]

    def likelihood(sharpness: float) -> float:
        total = np.zeros_like(one_hot)
        for cosine in cosines:
            weights = np.exp(np.float32(sharpness) * (cosine - 1))
            np.fill_diagonal(weights, 0)  # an image does not classify itself
            total += weights @ one_hot / weights.sum(1, keepdims=True)
        right = total[np.arange(len(labels)), labels] / len(cosines)
        return float(np.log(right + 1e-6).mean())

    return max(SHARPNESSES, key=likelihood)
