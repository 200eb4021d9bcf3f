"""The report on rounded caches: compared with counts by hand and with the spec, on several data."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import msa
from msa import reference
from msa.ir import Sequences

CONFIG = msa.MSAConfig(block_size=32, top_k=8)
SHAPES = {"q": (3, 8, 32), "k": (2048, 2, 32), "v": (2048, 2, 32), "q_idx": (3, 2, 32),
          "k_idx": (2048, 32)}  # fmt: skip


def normal(dtype=torch.float32):
    torch.manual_seed(0)
    return {name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items()}


def column(*numbers):
    return torch.tensor(numbers)[:, None, None]


def test_by_hand():
    """e4m3 rounds 16.875 and 17 to 16, so the first of two blocks is selected, not the second."""
    k_idx = torch.tensor([16.875, -1.0, -1.0, 17.0, 1.0])[:, None]
    k, v = torch.zeros(5, 1, 1), column(1.0, 1.0, 2.0, 2.0, 17.0)
    config = msa.MSAConfig(block_size=2, top_k=2)
    found = msa.cache_quality(column(0.0), k, v, column(1.0), k_idx, config=config)
    assert vars(found["index"]) == pytest.approx(
        {"block_recall": 1 / 2, "score_recall": 16.875 / 17, "output_error": (21 - 19) / 21}
    )
    assert vars(found["kv"]) == pytest.approx(
        {"block_recall": 1.0, "score_recall": 1.0, "output_error": 1 / 21}
    )
    assert vars(found["both"]) == pytest.approx(vars(found["index"]) | {"output_error": 3 / 21})


def test_few_tokens_leave_nothing_to_lose():
    few = {name: x[:3] for name, x in normal().items()}
    index = msa.cache_quality(**few, config=CONFIG)["index"]
    assert (index.block_recall, index.score_recall, index.output_error) == (1.0, 1.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_random_tensors(dtype):
    """Scores lie very close together, and still little is lost."""
    tensors = normal(dtype)
    found = msa.cache_quality(**tensors, config=CONFIG)
    assert 0.85 < found["index"].block_recall < 1.0
    assert 0.995 < found["index"].score_recall < 1.0
    assert 0.01 < found["kv"].output_error < 0.08
    assert (found["kv"].block_recall, found["kv"].score_recall) == (1.0, 1.0)
    assert found["both"].block_recall == found["index"].block_recall


def test_the_recalls_are_those_of_the_spec_on_rounded_keys():
    """The result equals scores and selections of the spec, with one scale for each page."""
    tensors = {name: x.double().numpy() for name, x in normal().items()}
    k_idx, q_idx, sequences = tensors["k_idx"], tensors["q_idx"], Sequences.one(3, 2048)
    pages = k_idx.reshape(-1, 32 * 32)
    scale = 2.0 ** np.ceil(np.log2(np.abs(pages).max(1) / 448))[:, None]
    step = 2.0 ** (np.maximum(np.floor(np.log2(np.abs(pages / scale))), -6) - 3)
    rounded = (np.rint(pages / scale / step) * step * scale).reshape(k_idx.shape)
    scores = reference.score_blocks(q_idx, k_idx, sequences, CONFIG).values
    fine, coarse = (
        reference.select_fused(q_idx, x, sequences, CONFIG).indices for x in (k_idx, rounded)
    )
    same = sum(len(np.intersect1d(a, b)) for a, b in zip(fine.reshape(6, 8), coarse.reshape(6, 8)))
    assert (fine[..., -1] == 63).all()
    had, kept = (np.take_along_axis(scores, ids[..., :-1], -1).sum() for ids in (fine, coarse))
    found = msa.cache_quality(**normal(), config=CONFIG)["index"]
    assert found.block_recall == pytest.approx(same / 48) and same < 48
    assert found.score_recall == pytest.approx(kept / had)


@pytest.mark.parametrize("power", [6, 14, 18])
def test_outliers(power):
    """One number of each page is 2^power, at a place where queries are 0. Up to 2^14 times the
    others, these lose nothing: floats keep their four bits. At 2^18 they all become 0.
    """
    tensors = normal()
    for name in ("k", "v", "k_idx"):
        tensors[name][::32, ..., 0] = 2.0**power
    tensors["q"][..., 0] = tensors["q_idx"][..., 0] = 0.0
    tensors["v"][..., 0] = 0.0
    found = msa.cache_quality(**tensors, config=CONFIG)
    if power < 18:
        assert found["index"].block_recall > 0.85 and found["index"].score_recall > 0.995
        assert found["kv"].output_error < 0.08
    else:
        assert found["index"].block_recall < 0.7 and found["index"].score_recall < 0.95
        assert found["kv"].output_error > 0.3
