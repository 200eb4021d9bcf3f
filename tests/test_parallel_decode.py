"""Decoding over pages that lie on several ranks gives what one process gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from parallel_cases import (
    decode_alone,
    decode_together,
    decode_with_changes,
    far_pages,
    narrow_values,
    no_table,
)
from rank_pool import MOST

import msa

BUDGET = {torch.float32: 2e-6, torch.float64: 1e-14}


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


def case_of(*lengths, n=1, top_k=3, sink=0, block=4):
    return {
        "lengths": lengths, "n": n, "heads": (4, 2), "dtype": torch.float64, "whole_numbers": True,
        "config": msa.MSAConfig(block_size=block, top_k=top_k + sink, sink_blocks=sink),
    }  # fmt: skip


INTERPRETED = {"backend": "triton", "dtype": torch.float32}


@settings(max_examples=25)
@given(cases(), st.integers(1, MOST))
@example(case_of(1), 4)  # one token: three ranks hold nothing
@example(case_of(0, 33, 7), 3)  # an empty slot
@example(case_of(57, n=3), 2)  # queries on both sides of a block's border
@example(case_of(40, top_k=16), 3)  # more places than blocks
@example(case_of(200) | {"table": torch.int8}, 1)  # more tokens than the table's dtype can count
@example(case_of(233, n=2, sink=1, block=16) | INTERPRETED, 2)  # scored blocks lie behind sinks
@example(case_of(210, 0, 75, n=3, sink=2, block=16) | INTERPRETED, 3)
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


@pytest.mark.parametrize("changes, kind, words", [
    ({"lengths": [9, 5, 3]}, ValueError, "lengths must have shape [B] = [2], got [3]"),
    ({"lengths": [9, 500]}, ValueError, "cache.page_table must have 62 entries"),
    ({"page_table": far_pages}, ValueError, "page_table"),
    ({"page_table": no_table}, TypeError, "page_table must be a NumPy array or a torch tensor"),
])  # fmt: skip
def test_what_one_rank_cannot_read_all_ranks_are_told(ranks, changes, kind, words):
    other, own = ranks.run(2, decode_with_changes, changes)
    assert isinstance(own, kind) and words in str(own), own
    assert isinstance(other, RuntimeError) and "rank 1 refused its arguments" in str(other)


@pytest.mark.parametrize("changes, words", [
    ({"lengths": [9, 6]}, "lengths must be the same on every rank, got [9, 5] on rank 0 and"),
    ({"v_pages": narrow_values}, "cache.v_pages must be the same on every rank"),
])  # fmt: skip
def test_ranks_that_differ_are_told(ranks, changes, words):
    for answer in ranks.run(2, decode_with_changes, changes):
        assert isinstance(answer, ValueError) and words in str(answer), answer
