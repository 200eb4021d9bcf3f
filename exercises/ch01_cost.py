"""Chapter 1: count the operations of one layer.

`dense` is given. Write `sparse` for any block size and k, by the three formulas of the chapter.
Then `msa exercise 1` counts the pairs of short texts one by one and compares.
"""

HEADS, GROUPS, DIM = 64, 4, 128


def dense(n):
    """Operations of causal dense attention over n tokens: two products for half of all pairs."""
    return 2 * HEADS * DIM * n**2


def sparse(n, block=128, k=16):
    """Operations of the index branch and of the main branch over n tokens."""
    return dense(n)  # TODO: one product per pair and group, then 2 products with at most k blocks
