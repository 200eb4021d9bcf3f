"""Bad configurations: every field of MSAConfig out of range or of another type."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

import msa
from msa.conformance.bad_input import BadInput


def config(name: str, error: type[Exception], says: tuple[str, ...], **values: Any) -> BadInput:
    """A case that makes an MSAConfig of these values."""
    return BadInput(name, error, says, lambda kit: msa.MSAConfig(**values))


CONFIG_CASES = [
    config("k < 1", ValueError, ("top_k", "at least 1", "got 0"), top_k=0),
    config("Bk < 1", ValueError, ("block_size", "at least 1", "got 0"), block_size=0),
    config("local < 1", ValueError, ("local_blocks", "at least 1", "got 0"), local_blocks=0),
    config("sink < 0", ValueError, ("sink_blocks", "at least 0", "got -1"), sink_blocks=-1),
    config(
        "sink + local > k", ValueError, ("sink_blocks + local_blocks", "top_k = 3", "2 + 2"),
        top_k=3, sink_blocks=2, local_blocks=2,
    ),
    config("fractional k", TypeError, ("top_k", "integer", "2.5"), top_k=2.5),
    config("boolean Bk", TypeError, ("block_size", "integer", "True"), block_size=True),
    config("infinite scale", ValueError, ("softmax_scale", "finite", "inf"),
           softmax_scale=float("inf")),
    config("NaN scale", ValueError, ("index_scale", "finite", "nan"), index_scale=float("nan")),
    config("negative scale", ValueError, ("softmax_scale", "positive", "-1"), softmax_scale=-1.0),
    config("zero scale", ValueError, ("index_scale", "positive", "0"), index_scale=0.0),
    config("scale in words", TypeError, ("softmax_scale", "number", "'1'"), softmax_scale="1"),
    config("boolean scale", TypeError, ("index_scale", "number", "True"), index_scale=True),
    config("boolean k of NumPy", TypeError, ("top_k", "integer", "bool"), top_k=np.bool_(True)),
    config("more than the largest k", ValueError, ("top_k", "LARGEST_TOP_K = 16384", "got 16385"),
           top_k=16385),
    config("k beyond int32", ValueError, ("top_k", "LARGEST_TOP_K", "got 2147483648"),
           top_k=np.int64(2**31)),
    config("more than the largest Bk", ValueError,
           ("block_size", "LARGEST_BLOCK_SIZE = 65536", "got 1099511627776"), block_size=2**40),
    config("a scale beyond float32", ValueError,
           ("softmax_scale", "LARGEST_SCALE = 2^127", "float32", "got 1e+39"), softmax_scale=1e39),
    config("a scale beyond float32 after log2(e)", ValueError,
           ("softmax_scale", "LARGEST_SCALE", "got 3e+38"), softmax_scale=3e38),
    config("a scale below float32", ValueError,
           ("index_scale", "LEAST_SCALE = 2^-126", "got 1e-46"), index_scale=1e-46),
    config("a scale that float32 holds in part", ValueError, ("softmax_scale", "got 1e-38"),
           softmax_scale=Fraction(1, 10**38)),
    config("an integer scale beyond float64", ValueError, ("index_scale", "finite", "got inf"),
           index_scale=10**400),
]  # fmt: skip
