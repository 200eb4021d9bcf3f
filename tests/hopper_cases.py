"""Sequences, tensors and selections for the tests of hopper attention on a GPU."""

from __future__ import annotations

from itertools import accumulate

import torch

import msa
from benchmarks.cases import make_selection
from msa.ir import Sequences

SCALE = 128**-0.5


def packed(*lengths):
    """Sequences from pairs of queries and keys."""
    return Sequences(*((0, *accumulate(n)) for n in zip(*lengths, strict=True)))


RAGGED = packed((54, 1042), (0, 300), (233, 3120), (1, 1), (700, 700), (12, 129), (3, 2999))


def arguments(sequences, groups, group, dtype, keep, seed=0):
    """q, k, v and a selection; keep: the chance to keep the block of the query before."""
    random = torch.Generator("cuda").manual_seed(seed)
    q, k, v = (
        torch.randn(n, heads, 128, generator=random, device="cuda").to(dtype)
        for n, heads in (
            (sequences.total_q, groups * group), (sequences.total_k, groups),
            (sequences.total_k, groups),
        )
    )  # fmt: skip
    config = msa.MSAConfig()
    return q, k, v, make_selection(sequences, keep, config=config, groups=groups, seed=seed)
