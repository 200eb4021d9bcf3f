"""Chapter 14: read a sequence that lies in pages.

Pages hold old numbers of other sequences, here NaN. The table has -1 where a sequence has no page.
"""

import numpy as np


def flat(pages, table, length):
    """[length, D] of one sequence: pages [n, block, D], table [most] with page numbers."""
    return np.concatenate([pages[p] for p in table])  # TODO: how many pages, how many tokens?
