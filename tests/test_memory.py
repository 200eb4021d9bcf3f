"""The torch backend's memory grows with N, not with N squared."""

from __future__ import annotations

import subprocess
import sys

import pytest

GIB = 2**30
MEASURE = """
import os, re, torch, msa

def status(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])

def measure(tokens, grad, heads=4, dim=32):
    torch.manual_seed(0)
    q, k, v = (torch.randn(tokens, heads, dim, requires_grad=grad) for _ in range(3))
    q_idx, k_idx = torch.randn(tokens, heads, dim), torch.randn(tokens, dim)
    open("/proc/self/clear_refs", "w").write("5")  # forget the peak of the imports
    before = status("VmRSS")
    output = msa.attention(q, k, v, q_idx, k_idx, config=msa.MSAConfig(block_size=128, top_k=16))
    if grad:
        output.out.sum().backward()
    print(status("VmHWM"), status("VmHWM") - before, flush=True)

torch.set_num_threads(1)  # threads do not survive a fork
msa.attention  # imports torch's backend, so that no copy does it again
for tokens, grad in {calls}:
    if os.fork() == 0:  # with its own memory, as a new process has
        measure(tokens, grad)
        os._exit(0)
    assert os.wait()[1] == 0
"""
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads peaks from /proc")


def peaks(*calls: tuple[int, bool]) -> list[tuple[int, int]]:
    """For tokens and grad: the most resident bytes of a process, and what the call allocated."""
    code = MEASURE.replace("{calls}", repr(calls))
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    total, call = zip(*(map(int, line.split()) for line in done.stdout.splitlines()), strict=True)
    return list(zip(total, call, strict=True))


def test_memory_grows_with_the_tokens():
    """32K tokens stay under 3 GiB, and twice the tokens take about twice the memory."""
    lengths = 8192, 16384
    (total, call), *found = peaks((32768, False), *((n, g) for g in (False, True) for n in lengths))
    print(f"{total / GIB:.2f} GiB in all, {call / GIB:.2f} GiB for the call of 32K tokens")
    assert total < 3 * GIB
    for (_, small), (_, large) in (found[:2], found[2:]):
        print(f"{small / GIB:.2f} GiB at 8K tokens, {large / GIB:.2f} GiB at 16K")
        assert large < 2.6 * small
