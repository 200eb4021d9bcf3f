"""The shares of programs in the scores of pages, on NumPy: every scored block in one of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

pytest.importorskip("triton", minversion="3.6")

import numpy_gluon

from msa.triton_impl.hopper import page_shares


def shares(lengths, stride, programs, block, sink, local, chunk=4):
    """What `find_share` gives each program."""
    laid = np.full(len(lengths) * stride + 1, 2**30)
    laid[: len(lengths) * stride : stride] = lengths
    for program in range(programs):
        names = numpy_gluon.functions(page_shares, (program,), (programs,))
        pointer = numpy_gluon.Pointer(laid)
        yield tuple(
            int(x)
            for x in names["find_share"](
                pointer, len(lengths), stride, block, sink, local, None, chunk
            )
        )


@given(
    lengths=st.lists(st.one_of(st.just(0), st.integers(0, 400)), max_size=11),
    stride=st.integers(1, 3), programs=st.integers(1, 9), block=st.sampled_from([16, 64]),
    sink=st.integers(0, 2), local=st.integers(1, 3),
)  # fmt: skip
@example([0, 0, 16, 17, 0], 1, 3, 16, 0, 1)
@example([], 1, 2, 16, 0, 1)
def test_every_scored_block_has_one_program(lengths, stride, programs, block, sink, local):
    """Shares follow one another, differ by less than what the last one lacks, and know their
    first sequence."""
    blocks = [max(-(-n // block) - local - sink, 0) for n in lengths]
    order = [(s, b) for s, n in enumerate(blocks) for b in range(n)]
    found = list(shares(lengths, stride, programs, block, sink, local))
    taken = []
    for sequence, first, n, its_blocks in found:
        if n:
            assert its_blocks == blocks[sequence]
            start = order.index((sequence, first))
            taken += order[start : start + n]
    assert taken == order
    assert max(n for _, _, n, _ in found) == -(-len(order) // programs)
