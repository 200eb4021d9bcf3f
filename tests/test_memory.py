"""The torch backend's memory grows with N, not with N squared."""

from __future__ import annotations

import subprocess
import sys

import pytest

GIB = 2**30
MEASURE = """
import re, torch, msa

def status(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])

torch.manual_seed(0)
tokens, heads, dim = {tokens}, 4, 32
q, k, v = (torch.randn(tokens, heads, dim, requires_grad={grad}) for _ in range(3))
q_idx, k_idx = torch.randn(tokens, heads, dim), torch.randn(tokens, dim)
open("/proc/self/clear_refs", "w").write("5")  # forget the peak of the imports
before = status("VmRSS")
output = msa.attention(q, k, v, q_idx, k_idx, config=msa.MSAConfig(block_size=128, top_k=16))
if {grad}:
    output.out.sum().backward()
print(status("VmHWM"), status("VmHWM") - before)
"""
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads peaks from /proc")


def peak(tokens: int, grad: bool) -> tuple[int, int]:
    """The most resident bytes in a new process, and how many of them the call allocated."""
    code = MEASURE.format(tokens=tokens, grad=grad)
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    total, call = map(int, done.stdout.split())
    return total, call


def test_32k_tokens_stay_under_3_gib():
    total, call = peak(32768, grad=False)
    print(f"{total / GIB:.2f} GiB in all, {call / GIB:.2f} GiB for the call")
    assert total < 3 * GIB


@pytest.mark.parametrize("grad", [False, True])
def test_twice_the_tokens_take_about_twice_the_memory(grad):
    small, large = (peak(tokens, grad)[1] for tokens in (8192, 16384))
    print(f"{small / GIB:.2f} GiB at 8K tokens, {large / GIB:.2f} GiB at 16K")
    assert large < 2.6 * small
