"""Programs that torchrun starts: the example, and one whose second process fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
FAILS = """
import sys, torch, torch.distributed as dist, msa
from msa.parallel import context_parallel_attention, shard
dist.init_process_group("gloo")
x = shard(torch.ones(16, 1, 8), dist.group.WORLD, block_size=4)
call = lambda: context_parallel_attention(
    x, x, x, x, x[:, 0], group=dist.group.WORLD, config=msa.MSAConfig(block_size=4, top_k=2))
call()
print("called", flush=True)
if dist.get_rank() == 1:
    raise MemoryError("as if the device were full")
call()
"""


def torchrun(*command):
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *command],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_the_example_agrees_with_one_process():
    done = torchrun("examples/context_parallel.py")
    assert done.returncode == 0, done.stderr
    gaps = [float(gap) for gap in re.findall(r"= (\S+e[+-]\d+)", done.stdout)]
    assert len(gaps) == 2
    assert max(gaps) < 1e-5


def test_a_process_that_fails_ends_the_others(tmp_path):
    """The first process waits for the second one in a collective, and gloo waits for 30 minutes."""
    script = tmp_path / "fails.py"
    script.write_text(FAILS)
    started = time.monotonic()
    done = torchrun(str(script))
    assert done.returncode != 0
    assert done.stdout.count("called") == 2
    assert "as if the device were full" in done.stderr
    assert time.monotonic() - started < 60  # two starts of Python and torch on a slow machine
