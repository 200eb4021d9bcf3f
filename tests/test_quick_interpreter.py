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

import msa

ROOT = Path(__file__).parent.parent
PLAIN = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, sys.argv[1])
from test_quick_interpreter import digest
print(digest())
"""


def digest() -> str:
    """The bits of a call with loss and gradients, in both dtypes and all loop orders."""
    rng, made = np.random.default_rng(7), []
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
