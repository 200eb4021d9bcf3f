"""Chapter 9: one step of the online softmax, with a planted bug. Mend it.

The rows of a tile belong to several queries, and each query selected its own blocks of the union.
Random numbers do not show the bug. It shows when a block that a query did not select has much
larger scores than its own blocks.
"""

import triton
import triton.language as tl


@triton.jit
def softmax_step(b_s, top, total, chosen):
    """Scores [ROWS, BLOCK] of the next block; chosen [ROWS] says whose queries selected it."""
    new_top = tl.maximum(top, tl.max(b_s, 1))  # TODO: the maximum of which rows may rise?
    b_p = tl.where(chosen[:, None], tl.exp(b_s - new_top[:, None]), 0.0)
    decay = tl.exp(top - new_top)
    return new_top, total * decay + tl.sum(b_p, 1), b_p, decay
