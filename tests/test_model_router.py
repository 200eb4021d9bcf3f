"""The router keeps exact counts and an exact bias, for every dtype of the model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from msa.model import Model, checkpoint
from msa.model.experts import Router
from msa.training.presets import PRESETS

SIZES = replace(PRESETS["tiny"].model, experts=4, experts_per_token=2)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def make(dtype):
    torch.manual_seed(0)
    router = Router(SIZES)
    torch.nn.init.normal_(router.weight)
    return router.to(dtype).train()


@pytest.mark.parametrize("dtype", DTYPES)
def test_counts_are_exact(dtype):
    """9,000 tokens in parts, as in a step with several documents."""
    router, x = make(dtype), torch.randn(9000, SIZES.width, dtype=dtype)
    ids = torch.cat([router(part)[0] for part in x.split([4000, 4999, 1])])
    assert router.load.tolist() == torch.bincount(ids.flatten(), minlength=4).tolist()
    assert router.load.sum() == 18_000


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_thousand_small_steps_of_the_bias(dtype):
    """Each step changes a bias by the rate up or down, or not at all if the load is the mean."""
    router = make(dtype)
    for _ in range(1000):
        router.load.copy_(torch.tensor([2**40, 2**40 + 2, 2**40 + 1, 2**40 + 1]))
        router.balance(1e-3)
    assert router.bias.dtype == torch.float32
    assert (router.bias - torch.tensor([1.0, -1.0, 0.0, 0.0])).abs().max() < 1e-5
    assert not router.load.any()


def test_a_cast_on_the_way_keeps_the_bias():
    router = make(torch.float32)
    router.bias.copy_(torch.tensor([1.001, -1.001, 1e-3, 0.0]))
    wanted = router.bias.clone()
    for cast in (Router.bfloat16, Router.half, Router.double, Router.float):
        assert torch.equal(cast(router).bias, wanted)
    assert router.to("meta").bias.dtype == torch.float32


def test_a_half_file_keeps_the_bias(tmp_path):
    """Weights are rounded, as a model that computes in bfloat16 does anyway; the bias is not."""
    model = Model(SIZES)
    for router in model.routers():
        router.bias.fill_(1.001)
    checkpoint.save(model, tmp_path, half=True)
    weights = load_file(tmp_path / checkpoint.WEIGHTS)
    kinds = {name.endswith("router.bias"): w.dtype for name, w in weights.items()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    for mine, loaded in zip(model.routers(), checkpoint.load(tmp_path).routers()):
        assert torch.equal(mine.bias, loaded.bias)
