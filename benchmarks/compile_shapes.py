"""The shapes that `benchmarks.compiled` compiles kernels for, by name. It needs no torch."""

from __future__ import annotations

MAIN = "bfloat16, D = 128"
SHAPES = {MAIN: ("bfloat16", 128), "bfloat16, D = 64": ("bfloat16", 64),
          "bfloat16, D = 32": ("bfloat16", 32)}  # fmt: skip
"""Data type and head size: the measured tiles of both head sizes, and a head size that takes the
defaults."""
