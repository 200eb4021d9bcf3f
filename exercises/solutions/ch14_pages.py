"""Chapter 14: read a sequence that lies in pages."""

import numpy as np


def flat(pages, table, length):
    """[length, D] of one sequence: pages [n, block, D], table [most] with page numbers."""
    block = pages.shape[1]
    used = table[: -(-length // block)]  # rounded up; later entries are never read
    return (
        pages[used].reshape(-1, pages.shape[2])[:length]
        if length
        else np.zeros((0, pages.shape[2]))
    )
