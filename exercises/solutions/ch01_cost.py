"""Chapter 1: count the operations of one layer."""

HEADS, GROUPS, DIM = 64, 4, 128


def dense(n):
    """Operations of causal dense attention over n tokens: two products for half of all pairs."""
    return 2 * HEADS * DIM * n**2


def sparse(n, block=128, k=16):
    """Operations of the index branch and of the main branch over n tokens."""
    kept = min(n, k * block)
    index = GROUPS * DIM * n**2
    main = 4 * HEADS * DIM * kept * (n - kept / 2)
    return index + main
