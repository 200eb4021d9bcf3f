"""What the Hopper kernels cannot take is refused: the argument, what was wanted, what came."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from msa import MSAConfig
from msa.triton_impl.hopper.selection import require_hopper

CUDA = torch.cuda.is_available()


def tensors(groups=4, dim=128, dtype=torch.float16, key_dtype=None):
    device = "cuda" if CUDA else "cpu"
    queries = torch.zeros(2, groups, dim, dtype=dtype, device=device)
    return queries, torch.zeros(256, dim, dtype=key_dtype or dtype, device=device)


@pytest.mark.parametrize(
    ("sizes", "config", "error", "message"),
    [
        ({"dtype": torch.float32}, {}, TypeError,
         "q_idx must have dtype bfloat16 or float16 for kernels='hopper', got torch.float32"),
        ({"dim": 32}, {}, ValueError, "index dim must be 64 or 128 for kernels='hopper', got 32"),
        ({}, {"block_size": 32}, ValueError,
         "block_size must be 64 or 128 for kernels='hopper', got 32"),
        ({"groups": 257}, {}, ValueError,
         "the number of groups must be at most 256 for kernels='hopper', got 257"),
        ({}, {"top_k": 66}, ValueError,
         "top_k less the forced blocks must be at most 64 for kernels='hopper', got 65"),
    ],
)  # fmt: skip
def test_sizes_and_dtypes(sizes, config, error, message):
    with pytest.raises(error) as caught:
        require_hopper(*tensors(**sizes), MSAConfig(**config))
    assert message in str(caught.value)
    assert "use kernels='portable'" in str(caught.value)


@pytest.mark.skipif(CUDA, reason="where there is a GPU, it may be a Hopper one")
def test_devices():
    with pytest.raises(ValueError, match=r"must be given tensors on a GPU .* 9\.0, got cpu"):
        require_hopper(*tensors(), MSAConfig())
