"""Tests for a GPU: offsets beyond 2^31, memory that grows with N, the same bits at full size.

New buffers hold NaN (conftest), so a result that was written to a wrong address is missing at the
right one. Results are compared in float64 at the ends of tensors, where offsets are greatest.
"""

from __future__ import annotations

import gc
from dataclasses import replace

import numpy as np
import pytest
import torch

import msa
from msa import reference, triton_impl
from msa.conformance.tolerances import HOPPER, PRECISIONS, compare
from msa.conformance.yardstick import Attention
from msa.ir import BlockScores, Selection, Sequences
from msa.triton_impl import selection as selecting
from msa.triton_impl import tuning

pytestmark = [pytest.mark.gpu, pytest.mark.large]
ORDERS = ["auto", "kv_outer", "union"]
PRECISION = replace(PRECISIONS["bfloat16"], unit=HOPPER["bfloat16"])
MIB = 2**20


@pytest.fixture(autouse=True)
def empty_device():
    torch.manual_seed(0)
    yield
    gc.collect()
    torch.cuda.empty_cache()


def normal(*shape):
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def integers(*shape):
    """Numbers in bfloat16 that are small enough for exact scores."""
    return torch.randint(-4, 5, shape, device="cuda").to(torch.bfloat16)


def random_selection(sequences, groups, top_k, block_size):
    """Each query's own block and up to k - 1 random ones before it, the last blocks among them."""
    own = torch.tensor(sequences.positions(), device="cuda")[:, None, None] // block_size
    shape = (sequences.total_q, groups, top_k - 1)
    ids = (torch.rand(shape, device="cuda", dtype=torch.float64) * own).long().sort(-1)[0]
    again = torch.zeros_like(ids, dtype=torch.bool)
    again[..., 1:] = ids[..., 1:] == ids[..., :-1]
    ids = torch.where(again | (own == 0), own + 1, ids)  # own + 1: to be dropped
    ids = torch.cat([ids, own.expand(-1, groups, 1)], -1).sort(-1)[0]
    ids = torch.where(ids > own, -1, ids).to(torch.int32)
    return Selection(ids, sequences, block_size)


def check_queries(output, q, k, v, selection, queries, scale):
    """out and lse of these queries of a single sequence, against the definition in float64."""
    first = selection.sequences.total_k - selection.sequences.total_q
    block = selection.block_size
    for i in queries:
        ids = selection.indices[i].cpu().numpy()
        blocks = np.unique(ids[ids >= 0])
        tokens = (blocks[:, None] * block + np.arange(block)).ravel()
        tokens = tokens[tokens <= first + i]
        mask = np.stack([np.isin(tokens // block, row) for row in ids])[None]
        rows = torch.tensor(tokens, device="cuda")
        q_i, k_i, v_i = (x.double().cpu().numpy() for x in (q[i : i + 1], k[rows], v[rows]))
        want = Attention(q_i, k_i, v_i, mask, scale, parts=ids.shape[1])
        out, lse = (x[i : i + 1].double().cpu().numpy() for x in (output.out, output.lse))
        compare(f"out of query {i}", out, want.out, want.out_bound(PRECISION))
        compare(f"lse of query {i}", lse, want.lse, want.lse_bound(PRECISION))


# -- offsets --------------------------------------------------------------------------------------
@pytest.mark.parametrize("order", ORDERS)
def test_queries_outputs_and_partials_beyond_2_31(order, monkeypatch):
    """300,000 x 64 x 128 numbers of q and out; twice that in partial results, all at once."""
    monkeypatch.setattr(tuning, "PARTIAL_BYTES", 2**40)
    tokens, heads, groups, dim, top_k = 300_000, 64, 4, 128, 2
    assert tokens * heads * dim > 2**31
    q, k, v = normal(tokens, heads, dim), normal(tokens, groups, dim), normal(tokens, groups, dim)
    chosen = random_selection(Sequences.one(tokens, tokens), groups, top_k, 128)
    output = triton_impl.attend_selection(q, k, v, chosen, 0.1, loop_order=order)
    border = 2**31 // (heads * dim)  # of q and out; partials pass it at half of that
    queries = [0, border // 2 - 1, border // 2, border - 1, border, tokens - 2, tokens - 1]
    check_queries(output, q, k, v, chosen, queries, 0.1)
    assert not output.out.isnan().any()


@pytest.mark.parametrize("order", ORDERS)
def test_keys_and_values_beyond_2_31(order):
    """1.1 million tokens x 16 heads x 128; a hundred queries read tokens anywhere."""
    tokens, n_q, heads, dim, top_k = 1_100_000, 100, 16, 128, 4
    assert (tokens - 2 * 128) * heads * dim > 2**31
    q, k, v = normal(n_q, heads, dim), normal(tokens, heads, dim), normal(tokens, heads, dim)
    chosen = random_selection(Sequences.one(n_q, tokens), heads, top_k, 128)
    output = triton_impl.attend_selection(q, k, v, chosen, 0.1, loop_order=order)
    check_queries(output, q, k, v, chosen, range(0, n_q, 9), 0.1)


def test_index_queries_beyond_2_31():
    """300,000 x 64 groups x 128 numbers of q_idx, in sequences of 2,048 tokens."""
    length, batch, groups, dim = 2048, 147, 64, 128
    tokens = length * batch
    assert tokens * groups * dim > 2**31
    q_idx, k_idx = integers(tokens, groups, dim), integers(tokens, dim)
    config = msa.MSAConfig(block_size=128, top_k=4)
    chosen = triton_impl.select_fused(
        q_idx, k_idx, Sequences.uniform(batch, length, length), config
    )
    border = 2**31 // (groups * dim)
    assert border % length == 0  # a sequence starts there
    for stop in (length, border, border + 2, tokens):
        start, first = stop - 2, (stop - 1) // length * length
        arrays = (x.double().cpu().numpy() for x in (q_idx[start:stop], k_idx[first:stop]))
        want = reference.select_fused(*arrays, Sequences.one(2, stop - first), config)
        np.testing.assert_array_equal(chosen.indices[start:stop].cpu(), want.indices)


def test_selected_ids_beyond_2_31():
    """A million tokens x 16 groups x 128 places; all blocks are forced, so none is scored."""
    length, batch, groups, top_k, block = 4096, 257, 16, 128, 16
    tokens = length * batch
    assert tokens * groups * top_k > 2**31
    config = msa.MSAConfig(block, top_k, local_blocks=top_k)
    q_idx, k_idx = integers(tokens, groups, 16), integers(tokens, 16)
    chosen = triton_impl.select_fused(
        q_idx, k_idx, Sequences.uniform(batch, length, length), config
    )
    border = 2**31 // (groups * top_k)
    for i in (0, border - 1, border, tokens - length, tokens - length + 100, tokens - 1):
        own = i % length // block
        want = list(range(max(0, own - top_k + 1), own + 1))
        want += [-1] * (top_k - len(want))
        assert chosen.indices[i].tolist() == [want] * groups, i


def test_block_scores_beyond_2_31():
    """32,768 queries x 4 groups x 16,500 blocks, scored and selected in two steps."""
    n_q, groups, blocks, block, dim = 32_768, 4, 16_500, 16, 16
    assert n_q * groups * blocks > 2**31
    tokens = blocks * block
    sequences, config = Sequences.one(n_q, tokens), msa.MSAConfig(block, 8)
    q_idx, k_idx = integers(n_q, groups, dim), integers(tokens, dim)
    scores = triton_impl.score_blocks(q_idx, k_idx, sequences, config)
    chosen = triton_impl.select_blocks(scores, config)
    for start in (0, n_q - 2):
        stop, n_k = start + 2, tokens - n_q + start + 2
        part = Sequences.one(2, n_k)
        arrays = (x.double().cpu().numpy() for x in (q_idx[start:stop], k_idx[:n_k]))
        want = reference.score_blocks(*arrays, part, config)
        got = scores.values[start:stop].cpu().numpy()
        seen = want.values.shape[-1]
        np.testing.assert_array_equal(got[..., :seen], want.values)
        assert np.isneginf(got[..., seen:]).all()
        want = reference.select_blocks(BlockScores(want.values, part, block), config)
        np.testing.assert_array_equal(chosen.indices[start:stop].cpu(), want.indices)


# -- memory ---------------------------------------------------------------------------------------
def extra_bytes(call):
    """The result, and the most bytes that the call allocated at any time."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("order", ORDERS)
def test_attention_over_128k_tokens_keeps_to_its_bound(order):
    """Memory for outputs and the index: 16 bytes for each edge of a union, or 64 bytes for each
    edge
    of a super-tile, whose partial results take up to PARTIAL_BYTES."""
    tokens, heads, groups, dim, top_k = 131_072, 64, 4, 128, 16
    q, k, v = normal(tokens, heads, dim), normal(tokens, groups, dim), normal(tokens, groups, dim)
    chosen = random_selection(Sequences.one(tokens, tokens), groups, top_k, 128)
    output, extra = extra_bytes(
        lambda: triton_impl.attend_selection(q, k, v, chosen, 0.1, loop_order=order)
    )
    outputs = output.out.nbytes + output.lse.nbytes
    per_query = heads * top_k * (dim * 2 + 4)
    if order == "union":
        working = 16 * tokens * groups * top_k
    else:
        working = tuning.PARTIAL_BYTES + 64 * tuning.PARTIAL_BYTES // per_query * groups * top_k
    bound = outputs + working + 64 * MIB
    print(f"{order}: {extra / MIB:.0f} MiB of {bound / MIB:.0f}, outputs {outputs / MIB:.0f}")
    assert outputs <= extra <= bound


@pytest.mark.parametrize("tokens", [16_384, 65_536, 262_144])
def test_selection_takes_memory_in_proportion_to_the_tokens(tokens):
    """For each query and group its k ids and one buffer of candidates; buffers of split rows.

    This is what the portable kernels take; tests/test_hopper_selection.py has the others.
    """
    groups, dim, config = 4, 128, msa.MSAConfig(128, 16)
    q_idx, k_idx = normal(tokens, groups, dim), normal(tokens, dim)
    _, extra = extra_bytes(
        lambda: triton_impl.select_fused(
            q_idx, k_idx, Sequences.one(tokens, tokens), config, kernels="portable"
        )
    )
    buffer = selecting.CAPACITY * 8 + 8  # candidates of one row: score and id; fill and threshold
    bound = tokens * groups * (4 * config.top_k + buffer)
    bound += selecting.PROGRAMS * 128 * buffer + 32 * MIB
    print(f"{tokens}: {extra / tokens:.0f} bytes a query, {bound / tokens:.0f} allowed")
    assert extra <= bound


def test_the_whole_path_takes_no_more_than_its_parts():
    tokens, heads, groups, dim, config = 131_072, 64, 4, 128, msa.MSAConfig(128, 16)
    q, k, v = normal(tokens, heads, dim), normal(tokens, groups, dim), normal(tokens, groups, dim)
    q_idx, k_idx = normal(tokens, groups, dim), normal(tokens, dim)
    output, extra = extra_bytes(
        lambda: msa.attention(q, k, v, q_idx, k_idx, config=config, backend="triton")
    )
    outputs = sum(x.nbytes for x in (output.out, output.lse, output.selection.indices))
    print(f"{extra / MIB:.0f} MiB, outputs {outputs / MIB:.0f}")
    assert extra <= outputs + tuning.PARTIAL_BYTES + 256 * MIB


# -- the same bits --------------------------------------------------------------------------------
@pytest.mark.parametrize("order", ORDERS)
def test_the_same_bits_at_full_size(order):
    tokens, heads, groups, dim = 65_536, 64, 4, 128
    q, k, v = normal(tokens, heads, dim), normal(tokens, groups, dim), normal(tokens, groups, dim)
    chosen = random_selection(Sequences.one(tokens, tokens), groups, 16, 128)
    one, two = (
        triton_impl.attend_selection(q, k, v, chosen, 0.1, loop_order=order) for _ in range(2)
    )
    assert torch.equal(one.out, two.out) and torch.equal(one.lse, two.lse)
    assert not one.out.isnan().any()


@pytest.mark.parametrize("index_dtype", [None, "fp8_e4m3"])
@pytest.mark.parametrize("kernels", ["auto", "portable"])
def test_the_same_blocks_at_full_size(kernels, index_dtype):
    tokens, groups, dim = 131_072, 4, 128
    q_idx, k_idx = normal(tokens, groups, dim), normal(tokens, dim)
    sequences, config = Sequences.one(tokens, tokens), msa.MSAConfig(128, 16)
    one, two = (
        triton_impl.select_fused(q_idx, k_idx, sequences, config, index_dtype, kernels)
        for _ in range(2)
    )
    assert torch.equal(one.indices, two.indices)
    one.validate()
