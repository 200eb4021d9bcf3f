"""Operators and the loss of the index under torch's own ways to spread a layer over ranks."""

from __future__ import annotations

import pytest
import torch
from parallel_layers import alone, fully_sharded, heads_alone, replicated, sharded_heads


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("spread", [replicated, fully_sharded])
def test_a_layer_has_the_gradients_of_one_process(ranks, spread, recompute):
    """The layer has two losses, a weight without a gradient, and is computed again if asked to."""
    wanted = alone()
    assert {"out.weight", "projections.4.weight"} < set(wanted)
    for found in ranks.results(4, spread, recompute):
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-13, msg=name)


def test_heads_may_lie_on_several_ranks(ranks):
    """`local_map` gives each rank its heads; the gradient of k_idx is the sum over ranks."""
    for found, whole in ranks.results(2, sharded_heads):
        for x, wanted in zip(found, heads_alone(whole), strict=True):
            torch.testing.assert_close(x, wanted, rtol=1e-6, atol=1e-7)
