"""The digits as a stream of tokens: queries, keys, values and index features of the images.

Softmax attention from held-out images to known images, with one-hot labels as values, is kernel
regression: the output is a distribution over classes. Each group of heads applies its own linear
filter to the images before it compares them. The two heads of a group differ in sharpness only.

    known images                             held-out images
    q: none                                  q: sharpness x filtered image, length 1
    k: filtered image, length 1              k: 0
    v: one-hot label                         v: 0
    k_idx: PCA of the image, length 1        k_idx: 0        q_idx: one PCA projection per group

By R2 the queries are the last tokens, and each sees itself and the queries before it. A held-out
image must not help to classify another one, so its key, value and index key are zero. It still has
some softmax weight, on a zero value. Division of the output by its own sum removes it exactly.
By R6 each query reads its own block, which has held-out images alone. That block counts in k, so
MSA chooses k - 1 blocks of known images.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int

from msa.demo.digits.features import CLASSES, album_order, choose_sharpness, unit, views
from msa.ir import Array, Sequences

SOFT_AND_SHARP = 2.0**-0.5, 2.0**0.5
"""Factors on the chosen sharpness for the two heads of a group."""
INDEX_LEVELS = 127
"""The largest index feature. Features are whole numbers, as in int8, so every score is exact in
float32 and all backends select the same blocks."""


@dataclass(frozen=True)
class Stream:
    """The arguments of one call of msa.attention, and the images and labels behind them."""

    images: Float[Array, "Tk 64"]
    labels: Int[Array, " Tk"]
    known: int
    """The number of known images. They come first, in whole blocks; the others are held out."""
    block_size: int
    sharpness: float
    q: Float[Array, "Tq Hq 64"]
    k: Float[Array, "Tk Hkv 64"]
    v: Float[Array, "Tk Hkv 10"]
    q_idx: Float[Array, "Tq Hkv Di"]
    k_idx: Float[Array, "Tk Di"]

    @property
    def sequences(self) -> Sequences:
        """One sequence; the held-out images are its queries (R2)."""
        return Sequences.one(len(self.q), len(self.k))

    @property
    def known_blocks(self) -> int:
        """The number of blocks of known images. No block has both known and held-out images."""
        return self.known // self.block_size

    @property
    def truth(self) -> Int[Array, " Tq"]:
        """The right classes of the queries. Only the accuracy uses them."""
        return self.labels[self.known :]

    @cached_property
    def dense_mass(self) -> Float[Array, "Tq Hkv blocks"]:
        """The weight of each known block in dense attention among the known images, in float64.

        It is the mean over the heads of a group, as in the teacher of R17. The sum is 1.
        """
        mass = np.zeros((*self.q_idx.shape[:2], self.known_blocks))
        heads = self.q.shape[1] // self.k.shape[1]
        for h in range(self.q.shape[1]):
            keys = self.k[: self.known, h // heads].astype(np.float64)
            logits = self.q[:, h].astype(np.float64) @ keys.T
            weights = np.exp(logits - logits.max(axis=1, keepdims=True))
            weights /= heads * weights.sum(axis=1, keepdims=True)
            mass[:, h // heads] += weights.reshape(len(mass), -1, self.block_size).sum(axis=-1)
        return mass


def build_stream(
    images: Float[Array, "n 64"], labels: Int[Array, " n"], known_ids: Int[Array, " a"],
    held_out_ids: Int[Array, " b"], block_size: int, index_dims: int, album: bool = False,
) -> Stream:  # fmt: skip
    """Build the stream. Mean, PCA, album order and sharpness are fitted on the known images.

    Labels are used for v and for the sharpness, and not for index features.

    The index is a low-rank copy of the main branch. With filter W, group r scores <Wx, Wy>; kept to
    the first PCA directions P of y this is <P W'W x, P y>: one projection of x for each group, and
    one of y that all groups share, which is the shape of MSA's index branch.
    """
    if album:
        known_ids = known_ids[album_order(images[known_ids] - images[known_ids].mean(0))]
    ids, n = np.concatenate([known_ids, held_out_ids]), len(known_ids)
    x, labels = images[ids] - images[known_ids].mean(0), labels[ids]
    filters = list(views().values())
    directions = np.linalg.eigh(x[:n].T @ x[:n])[1][:, ::-1][:, :index_dims]  # PCA
    sharpness = choose_sharpness([unit(x[:n] @ w) for w in filters], labels[:n])

    heads = [s * sharpness * unit(x[n:] @ w) for w in filters for s in SOFT_AND_SHARP]
    k = np.stack([unit(x @ w) for w in filters], axis=1)
    v = np.repeat(np.eye(CLASSES)[labels][:, None], len(filters), axis=1)
    q_idx = np.stack([unit(x[n:] @ w @ w.T @ directions) for w in filters], axis=1)
    k_idx = unit(x @ directions)
    for offered in (k, v, k_idx):
        offered[n:] = 0  # a held-out image is a query only
    arrays = {
        "q": np.stack(heads, axis=1),
        "k": k,
        "v": v,
        "q_idx": np.rint(INDEX_LEVELS * q_idx),
        "k_idx": np.rint(INDEX_LEVELS * k_idx),
    }
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    return Stream(images[ids], labels, n, block_size, sharpness, **arrays)
