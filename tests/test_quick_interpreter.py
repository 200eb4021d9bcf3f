"""The faster interpreter gives the same bits as Triton's own."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import msa

ROOT = Path(__file__).parent.parent
PLAIN = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, sys.argv[1])
from test_quick_interpreter import digest
print(digest())
"""


@triton.jit
def awkward_kernel(p_x, p_i, p_out, n, scale, N: tl.constexpr):
    """Operands of every kind; from the second round on, each operator has met their types."""
    o_n = tl.arange(0, N)
    for i in range(n):
        b_x = tl.load(p_x + i * N * N + o_n[:, None] * N + o_n[None, :])
        b_turned = tl.trans(b_x)
        b_i = tl.load(p_i + i * N + o_n, mask=o_n < N - i, other=-7)
        p_o = p_out + i * 8 * N + o_n
        tl.store(p_o, tl.sum(b_turned * scale, 1))  # a transposed block and one number
        tl.store(p_o + N, tl.sum(b_turned + b_x, 1) / tl.sum(scale * b_turned, 1))
        b_zero = tl.where(b_x > 0, b_x * 0.0, b_x * -0.0)
        tl.store(p_o + 2 * N, tl.sum(1.0 / tl.where(b_zero == 0.0, b_zero, 1.0), 1))
        tl.store(p_o + 3 * N, (b_i + b_i.to(tl.int64) * 3 - 1).to(tl.float32) + b_i)
        tl.store(p_o + 4 * N, tl.where((b_i & 5) != 0, b_i, scale))
        tl.store(p_o + 5 * N, tl.sum(tl.dot(b_turned, b_x, tl.dot(b_x, b_x)), 0))
        m_n = (b_i[:, None] >= b_i[None, :]) & (o_n[:, None] != o_n[None, :])
        tl.store(p_o + 6 * N, tl.sum(tl.where(m_n, b_turned, float("-inf")).to(tl.float16), 1))
        tl.store(p_o + 8 * N - N, tl.max(tl.where(m_n, b_x, 0), 1), mask=b_i > -3)


def awkward() -> torch.Tensor:
    """What `awkward_kernel` writes for normal, infinite and missing numbers."""
    rng = np.random.default_rng(3)
    x = torch.tensor(rng.standard_normal((3, 16, 16)), dtype=torch.float32)
    x[1, 2, 3], x[2, 5] = torch.inf, torch.nan
    i = torch.tensor(rng.integers(-9, 9, (3, 16)), dtype=torch.int32)
    out = torch.zeros(3, 8, 16)
    awkward_kernel[(1,)](x, i, out, 3, 0.3, N=16)
    return out


def digest() -> str:
    """The bits of a call with loss and gradients, in both dtypes and all loop orders; and more."""
    rng, made = np.random.default_rng(7), [awkward()]
    shapes = (35, 4, 16), (35, 2, 16), (35, 2, 16), (35, 2, 16), (35, 16)
    config = msa.MSAConfig(block_size=16, top_k=2)
    for dtype, order in ((torch.float32, "kv_outer"), (torch.float16, "union")):
        tensors = [torch.tensor(rng.standard_normal(shape)).to(dtype) for shape in shapes]
        for tensor in tensors:
            tensor.requires_grad_()
        options = {"loop_order": order, "align": True, "backend": "triton"}
        output = msa.attention(*tensors, config=config, **options)
        (output.out.square().sum() + output.kl.sum()).backward()
        made += output.out, output.lse, output.kl, *(tensor.grad for tensor in tensors)
    bits = b"".join(x.detach().numpy().tobytes() for x in made)
    return hashlib.sha256(bits).hexdigest()


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled where there is a GPU")
def test_the_bits_are_those_of_the_interpreter_as_it_is():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PLAIN, str(ROOT / "tests")],
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout.strip() == digest()


def test_the_release_that_make_installs_is_known():
    import quick_interpreter

    pinned = re.search(r"^triton==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned[1] in quick_interpreter.READ_IN, "read triton/runtime/interpreter.py again"
