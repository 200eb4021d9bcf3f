"""A picture of a digit from a file, as small as the model reads them: 8x8 in 17 shades.

What a scanner or a painting program gives is brought to the form of the pictures that the model was
trained on (scikit-learn's `load_digits`): cropped to the ink, its longer side 8 pixels, in the
middle; a pixel is the share of its square that has ink.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Float

from msa.model import checks_ask

SIDE, STEPS = 8, 16
FAINT = 0.1
"""What has less than this share of the fullest ink does not count when the picture is cropped."""


def read_picture(path: Path | str) -> Float[np.ndarray, "8 8"]:
    """From -1 (paper) to 1 (ink), as a model reads it.

    Raises:
        ValueError: no such file, a file that is no picture, or a picture without ink.

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
    """Brightness from 0 to 1; what is transparent becomes paper, the opposite of what is not."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)  # a camera stores the way it was held
            if image.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
                return np.asarray(image, np.float32) / 65535
            layers = np.asarray(image.convert("LA"), np.float32) / 255
    except FileNotFoundError:
        raise checks_ask.no_picture(path, "no such file") from None
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
        raise checks_ask.no_picture(path, str(error)) from error
    grey, cover = layers[..., 0], layers[..., 1]
    paper = float((grey * cover).sum() < 0.5 * cover.sum())
    return cover * grey + (1 - cover) * paper


def ink_of(grey: Float[np.ndarray, "height width"], name: str) -> Float[np.ndarray, "height width"]:
    """How much ink each pixel has, from 0 to 1. Paper is what the edge mostly shows.

    >>> ink_of(np.array([[0.9, 0.9, 0.9], [0.9, 0.1, 0.9], [0.9, 0.9, 0.9]]), "x.png").tolist()
    [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    """
    edge = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    ink = np.abs(grey - np.median(edge))
    checks_ask.check_ink(name, float(ink.max()))
    return ink / ink.max()


def shrink(ink: Float[np.ndarray, "height width"]) -> Float[np.ndarray, "8 8"]:
    """The part that has ink, from 0 to 1: its longer side fills the picture, its shape is kept.

    The fullest pixel counts as full, for strokes may be thin.

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
