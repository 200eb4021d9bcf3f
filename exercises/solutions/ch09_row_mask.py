"""Chapter 9: one step of the online softmax, mended."""

import triton
import triton.language as tl


@triton.jit
def softmax_step(b_s, top, total, chosen):
    """Scores [ROWS, BLOCK] of the next block; chosen [ROWS] says whose queries selected it."""
    new_top = tl.where(chosen, tl.maximum(top, tl.max(b_s, 1)), top)
    b_p = tl.exp(b_s - tl.where(chosen, new_top, float("inf"))[:, None])  # one mask for the row
    decay = tl.exp(top - new_top)
    return new_top, total * decay + tl.sum(b_p, 1), b_p, decay
