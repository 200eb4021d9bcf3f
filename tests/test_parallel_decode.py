"""Decoding over pages that lie on several ranks gives what one process gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from parallel_cases import decode_alone, decode_together, decode_with_other_lengths
from rank_pool import RankPool

import msa

MOST = 4
BUDGET = {torch.float32: 2e-6, torch.float64: 1e-14}


@pytest.fixture(scope="module")
def ranks():
    pool = RankPool(MOST)
    yield pool
    pool.close()


@st.composite
def cases(draw):
    n, groups = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    lengths = draw(st.lists(st.integers(n, 60) | st.just(0), min_size=1, max_size=3).filter(any))
    local, sink = draw(st.integers(1, 2)), draw(st.integers(0, 2))
    top_k = local + sink + draw(st.integers(0, 3))
    return {
        "lengths": tuple(lengths), "n": n, "heads": (groups * draw(st.integers(1, 3)), groups),
        "dtype": draw(st.sampled_from(list(BUDGET))), "whole_numbers": draw(st.booleans()),
        "config": msa.MSAConfig(
            block_size=draw(st.sampled_from([1, 2, 4])), top_k=top_k,
            sink_blocks=sink, local_blocks=local,
        ),
    }  # fmt: skip


def case_of(*lengths, n=1, top_k=3):
    return {
        "lengths": lengths, "n": n, "heads": (4, 2), "dtype": torch.float64, "whole_numbers": True,
        "config": msa.MSAConfig(block_size=4, top_k=top_k),
    }  # fmt: skip


@settings(max_examples=25)
@given(cases(), st.integers(1, MOST))
@example(case_of(1), 4)  # one token: three ranks hold nothing
@example(case_of(0, 33, 7), 3)  # an empty slot
@example(case_of(57, n=3), 2)  # queries on both sides of a block's border
@example(case_of(40, top_k=16), 3)  # more places than blocks
def test_ranks_together_decode_what_one_process_does(ranks, case, count):
    out, lse, ids = decode_alone(case)
    live = torch.tensor(case["lengths"]) > 0
    for found_out, found_lse, found_ids in ranks.results(count, decode_together, case):
        if case["whole_numbers"]:
            assert torch.equal(found_ids[live].flatten(0, 1), ids)
        assert (found_ids[~live] == -1).all()
        assert (found_lse[~live] == -torch.inf).all() and not found_out[~live].any()
        torch.testing.assert_close(found_lse, lse, rtol=1e-6, atol=1e-6)
        gap = float((found_out - out).norm() / out.norm().clamp(min=1e-3))
        # lse is float32, and weighs the parts of the ranks
        assert gap <= max(BUDGET[case["dtype"]], 1e-6)


def test_ranks_with_other_lengths_are_told(ranks):
    own, other = ranks.run(2, decode_with_other_lengths)
    assert isinstance(own, RuntimeError) and "rank 1 refused its arguments" in str(own)
    assert isinstance(other, ValueError) and "lengths must have shape [B] = [2], got [3]" in str(
        other
    )
