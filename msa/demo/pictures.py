"""A picture of a digit from a file, in the form that the model reads: 8 x 8 pixels in 17 shades.

The pictures in training are scikit-learn's `load_digits`. A picture from a scanner or a painting
program is changed to their form: it is cropped to its ink and placed in the middle, and its longer
side becomes 8 pixels. The value of a pixel is the share of its square that has ink.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Float

SIDE, STEPS = 8, 16
FAINT = 0.1
"""Pixels with less than this share of the most ink do not count when the picture is cropped."""
LEAST_INK = 0.1
"""The least contrast of a picture, as a share of the contrast of black and white."""


def read_picture(path: Path | str) -> Float[np.ndarray, "8 8"]:
    """The picture as a model reads it, from -1 (paper) to 1 (ink).

    Raises:
        ValueError: no such file, a file that is not a picture, or a picture without ink.

    >>> import tempfile
    >>> from PIL import Image
    >>> pixels = np.full((50, 40), 255, np.uint8)
    >>> pixels[10:42, 20:24] = 0  # a stroke from top to bottom
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Image.fromarray(pixels).save(f"{folder}/one.png")
    ...     picture = read_picture(f"{folder}/one.png")
    >>> picture[0].tolist(), bool((picture == picture[0]).all())
    ([-1.0, -1.0, -1.0, 1.0, 1.0, -1.0, -1.0, -1.0], True)
    """
    ink = shrink(ink_of(read_grey(path), str(path)))
    return (np.rint(ink * STEPS) / STEPS * 2 - 1).astype(np.float32)


def read_grey(path: Path | str) -> Float[np.ndarray, "height width"]:
    """The brightness, from 0 to 1. Transparent parts become paper: light if the rest is dark."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)  # as the camera was held
            if image.mode.startswith("I"):  # 16 bits: Pillow would cut values off at 255
                return np.asarray(image, np.float32) / 65535
            layers = np.asarray(image.convert("LA"), np.float32) / 255
    except FileNotFoundError:
        raise no_picture(path, "no such file") from None
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
        raise no_picture(path, str(error)) from error
    grey, cover = layers[..., 0], layers[..., 1]
    paper = float((grey * cover).sum() < 0.5 * cover.sum())
    return cover * grey + (1 - cover) * paper


def ink_of(grey: Float[np.ndarray, "height width"], name: str) -> Float[np.ndarray, "height width"]:
    """The ink of each pixel, from 0 to 1. The median of the edge is taken as paper.

    >>> ink_of(np.array([[0.9, 0.9, 0.9], [0.9, 0.1, 0.9], [0.9, 0.9, 0.9]]), "x.png").tolist()
    [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    """
    edge = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    ink = np.abs(grey - np.median(edge))
    contrast = float(ink.max())
    if contrast < LEAST_INK:
        raise ValueError(
            f"{name} must show a digit, in ink that differs from the paper by at least "
            f"{LEAST_INK:.0%} of the way from black to white, got {contrast:.0%}"
        )
    return ink / contrast


def shrink(ink: Float[np.ndarray, "height width"]) -> Float[np.ndarray, "8 8"]:
    """The part with ink, from 0 to 1. Its longer side fills the picture, and its shape is kept.

    The pixel with the most ink becomes 1, for strokes may be thin.

    >>> shrink(np.diag(np.ones(4, np.float32)))[:4, :4].tolist()  # 4x4 pixels become 8x8
    [[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]
    """
    from PIL import Image

    rows, columns = (np.flatnonzero((ink >= FAINT).any(axis)) for axis in (1, 0))
    (top, bottom), (left, right) = ((found[0], found[-1] + 1) for found in (rows, columns))
    side = int(max(bottom - top, right - left))
    x, y = (side + (a + b - side) / 2 for a, b in ((left, right), (top, bottom)))
    wide = Image.fromarray(np.pad(ink, side))
    box = (x, y, x + side, y + side)
    small = np.asarray(wide.resize((SIDE, SIDE), Image.Resampling.BOX, box))
    return small / small.max()


def no_picture(path: Path | str, reason: str) -> ValueError:
    """The error for a file that Pillow cannot read."""
    return ValueError(f"{path} must be a picture, got one that cannot be read: {reason}")
