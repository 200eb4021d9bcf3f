"""Context parallel attention on 1 to 4 ranks gives what one process gives, or every rank raises."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from parallel_cases import (
    alone,
    call,
    fewer_rows,
    half_precision,
    on_a_mesh,
    tensors,
    together,
    uneven_prefixes,
    warm_up,
)
from rank_pool import MOST

import msa
from msa.parallel import Shards, shard

BUDGET = {torch.float32: 2e-6, torch.float64: 1e-14}
"""‖x - alone‖ / ‖alone‖: sums have another order, nothing else differs."""


@st.composite
def cases(draw):
    lengths = draw(st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(sum))
    kv_heads = draw(st.integers(1, 2))
    config = msa.MSAConfig(
        block_size=draw(st.sampled_from([1, 3, 4])), top_k=draw(st.integers(2, 4)),
        sink_blocks=draw(st.integers(0, 1)), local_blocks=draw(st.integers(1, 1)),
    )  # fmt: skip
    return {
        "total": sum(lengths), "cu_seqlens": tuple(accumulate(lengths, initial=0)),
        "heads": (kv_heads * draw(st.integers(1, 3)), kv_heads), "config": config,
        "dtype": draw(st.sampled_from(list(BUDGET))), "whole_numbers": draw(st.booleans()),
    }  # fmt: skip


def case_of(*lengths):
    return {
        "total": sum(lengths), "cu_seqlens": tuple(accumulate(lengths, initial=0)),
        "heads": (4, 2), "config": msa.MSAConfig(block_size=4, top_k=2), "dtype": torch.float64,
        "whole_numbers": True,
    }  # fmt: skip


@settings(max_examples=25)
@given(cases(), st.integers(1, MOST))
@example(case_of(3), 4)  # three ranks have no tokens, and take part in the backward all the same
@example(case_of(64), 3)
@example(case_of(0, 5, 0, 33), 2)
def test_ranks_together_give_what_one_process_gives(ranks, case, count):
    wanted, budget = alone(case), BUDGET[case["dtype"]]
    for found in ranks.results(count, together, case):
        if case["whole_numbers"]:
            assert torch.equal(found["ids"], wanted["ids"])
        assert found["kl"] == pytest.approx(wanted["kl"], rel=10 * budget, abs=budget)
        for name, x in wanted.items():
            if name in ("ids", "kl"):
                continue
            gap = float((found[name] - x).norm() / x.norm().clamp(min=1e-3))
            most = 1e-6 if name == "lse" else budget  # lse is float32
            assert gap <= most * (10 if name.startswith("d_") else 1), (name, gap)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=5), st.integers(1, 9), st.integers(1, 5))
def test_every_token_has_one_rank_and_no_block_is_cut(lengths, count, block):
    shards = Shards(tuple(accumulate(lengths, initial=0)), count, block)
    held = [shards.tokens(rank) for rank in range(count)]
    assert torch.cat(held).sort().values.tolist() == list(range(shards.total))
    rows = torch.cat([x for rank in held for x in [rank]])
    assert len(rows) == shards.total
    for rank, tokens in enumerate(held):
        assert len(tokens) == shards.rows(rank)
        for half in (0, 1):
            for length, (start, stop) in zip(lengths, shards.spans(rank, half)):
                assert start % block == 0 or start == length
                assert stop % block == 0 or stop == length


@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 5))
def test_work_is_equal(count, blocks, block):
    """The visible keys of a rank's queries differ from the mean by less than a chunk's rounding."""
    length = 2 * count * blocks * block
    shards = Shards((0, length), count, block)
    work = [int((shards.tokens(rank) + 1).sum()) for rank in range(count)]
    assert len(set(work)) == 1


def test_shard_has_a_gradient(ranks):
    (whole, _), cu = tensors(10, (2, 1), torch.float32, False), (0, 4, 10)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        rows = shard(whole[0], torch.distributed.group.WORLD, cu_seqlens=cu, block_size=2)
    finally:
        torch.distributed.destroy_process_group()
    (2 * rows).sum().backward()
    assert torch.equal(whole[0].grad, torch.full_like(whole[0], 2.0))


def test_with_tensor_parallelism_over_heads(ranks):
    """On a mesh of 2 x 2: each rank has half of the tokens and half of the heads."""
    whole, d_out = tensors(40, (4, 2), torch.float64, False)
    config = msa.MSAConfig(block_size=4, top_k=3)
    output = msa.attention(*whole, config=config, align=True)
    ((output.out * d_out).sum() + output.kl).backward()
    kl = {}
    for part, out, d_k, own_kl in ranks.results(4, on_a_mesh, (4, 2)):
        torch.testing.assert_close(out, output.out.detach().chunk(2, 1)[part], rtol=0, atol=1e-14)
        torch.testing.assert_close(d_k, whole[1].grad.chunk(2, 1)[part], rtol=0, atol=1e-14)
        kl[part] = own_kl
    assert sum(kl.values()) / 2 == pytest.approx(output.kl.item(), rel=1e-13)


@pytest.mark.parametrize("changes, only, kind, words", [
    ([("cu_seqlens", (0, 10, 24))], 1, ValueError,
     "cu_seqlens must be the same on every rank, got None on rank 0 and (0, 10, 24) on rank 1"),
    ([("config", msa.MSAConfig(block_size=8, top_k=2))], 2, ValueError,
     "block_size must be the same on every rank, got 4 on rank 0 and 8 on rank 2"),
    ([("config", msa.MSAConfig(block_size=4, top_k=3))], 0, ValueError, "config must be the same"),
    ([("align", True)], 1, ValueError, "align must be the same on every rank"),
    ([("backend", "torch")], 1, ValueError, "backend must be the same on every rank"),
    ([("cu_seqlens", (0, 10, 20))], None, ValueError, "cu_seqlens must end with T = 24"),
    ([("k", half_precision)], 1, TypeError, "k must have the dtype of q"),
    ([("q", fewer_rows)], 1, ValueError, "k must have shape [Tq, Hkv, D]"),
])  # fmt: skip
def test_every_rank_raises(ranks, changes, only, kind, words):
    answers = ranks.run(3, call, changes, only)
    refused = {"dtype of q", "shape"}
    for rank, answer in enumerate(answers):
        if only == rank or only is None or not any(word in words for word in refused):
            assert isinstance(answer, kind), answer
            assert words in str(answer)
        else:  # this rank's own arguments are right
            assert isinstance(answer, RuntimeError)
            assert f"rank {only} refused its arguments" in str(answer)
            assert words in str(answer)
    good = ranks.results(3, call, [])  # the ranks are not out of step
    assert all(isinstance(x, float) for x in good)


def test_the_loss_of_the_warm_up_checks_every_argument(ranks):
    own = tensors(24, (2, 1), torch.float32, False)[0]
    whole = msa.align_index(own[0], own[1], own[3], own[4], config=msa.MSAConfig(4, 2)).item()
    for found in ranks.results(2, warm_up, 99):
        assert found == pytest.approx(whole, rel=1e-5)
    told, refused = ranks.run(2, warm_up, 3)
    assert isinstance(refused, ValueError) and "k must have shape" in str(refused)
    assert isinstance(told, RuntimeError)
    for answer in ranks.run(2, warm_up, 99, 0.3):
        assert isinstance(answer, ValueError) and "config must be the same" in str(answer)


def test_tensors_of_other_lengths_are_refused(ranks):
    for answer in ranks.run(2, uneven_prefixes):
        assert isinstance(answer, ValueError)
        assert "tensors[1] must have as many rows as tensors[0] = 8, got 7" in str(answer)
