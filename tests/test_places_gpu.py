"""Where a call runs, on GPUs: any stream, several threads, capture, any device.

Each test runs in a new Python process, because a failure would leave the device unusable for later
tests. The wanted bits are always those of one stream on the first device.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import msa
import msa.ops
from msa import triton_impl
from msa.ir import Sequences
from msa.triton_impl import places, selection, tables

pytestmark = pytest.mark.gpu
CONFIG = msa.MSAConfig(block_size=16, top_k=4)
HEADS, GROUPS, DIM = 8, 2, 32
TOKENS = 400


# -- the calls ------------------------------------------------------------------------------------
def tensors(n, device="cuda:0", seed=0):
    """q, k, v, q_idx, k_idx of n tokens, the same numbers on any device."""
    random = torch.Generator().manual_seed(seed)
    shapes = (HEADS, DIM), (GROUPS, DIM), (GROUPS, DIM), (GROUPS, DIM), (DIM,)
    drawn = [torch.randn(n, *shape, generator=random).bfloat16() for shape in shapes]
    return [x.to(device).requires_grad_() for x in drawn]


def forward_and_backward(inputs, **options):
    """All results of attention, with all gradients."""
    options = {"config": CONFIG, "align": True} | options
    output = msa.attention(*inputs, **options)
    loss = output.out.float().square().sum() + output.lse.sum() + output.kl
    gradients = torch.autograd.grad(loss, inputs)
    return [output.out, output.lse, output.kl, output.selection.indices, *gradients]


def forget_tables():
    """Drop all tables, so that the next call of a shape is a first call; kernels stay compiled."""
    for table in (tables.query_table, tables.block_table, tables.tile_table, selection.plan_scan):
        table.cache_clear()


def busy():
    """Long work on the current stream."""
    torch.cuda._sleep(300_000_000)


def make_other_tables(n):
    """Make so many tables that the cache drops those of n tokens; they reuse free memory."""
    device = torch.device("cuda:0")
    for i in range(1, places.TABLES + 2):
        other = Sequences.one(n - i, n - i)
        for size in (1, 4, 8, 16):
            tables.tile_table(other, size, device)
        tables.query_table(other, 16, device)
        tables.block_table(other, 16, device)
        selection.plan_scan(other, CONFIG, 64, device)


def assert_same_bits(got, want):
    assert len(got) == len(want) and len(got) > 0
    for i, (a, b) in enumerate(zip(got, want)):
        assert torch.equal(a.detach().cpu(), b.detach().cpu()), i


def paged(device, seed=0):
    """Queries, new tokens, and a cache of two sequences with an empty slot between them."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=random).bfloat16().to(device)

    pages = normal(12, 16, GROUPS, DIM), normal(12, 16, GROUPS, DIM), normal(12, 16, DIM)
    pool = msa.PagePool(*pages, batch=3, pages_per_sequence=6)
    pool.append([0, 2], *(normal(2, 70, *x.shape[2:]) for x in pages))
    pool.reserve([0, 2], 2)
    new = tuple(normal(3, 1, *x.shape[2:]) for x in pages)
    return normal(3, 1, HEADS, DIM), normal(3, 1, GROUPS, DIM), new, pool


def step(q, q_idx, new, pool):
    """Append and decode."""
    msa.append_tokens(pool.cache, *new)
    output = msa.decode(q, q_idx, pool.cache, config=CONFIG)
    return [output.out, output.lse, pool.cache.lengths, pool.cache.k_pages]


# -- tests, each in a process ---------------------------------------------------------------------
def a_table_is_ready_on_every_stream():
    """The first call of a shape waits for long work; the second, on another stream, does not."""
    ragged = {"cu_seqlens_q": [0, 250, 250, TOKENS], "cu_seqlens_k": [0, 250, 250, TOKENS]}
    for borders in ({}, ragged):
        inputs = tensors(TOKENS)
        want = forward_and_backward(inputs, **borders)
        torch.cuda.synchronize()
        forget_tables()
        streams, results = [torch.cuda.Stream(), torch.cuda.Stream()], []
        for stream in streams:
            with torch.cuda.stream(stream):
                if stream is streams[0]:
                    busy()
                results.append(forward_and_backward(inputs, **borders))
        torch.cuda.synchronize()
        for got in results:
            assert_same_bits(got, want)


def a_table_lives_as_long_as_it_is_read():
    """A table is dropped from the cache before a slow stream has read it."""
    inputs = tensors(TOKENS)
    want = forward_and_backward(inputs)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        busy()
        got = forward_and_backward(inputs)
    make_other_tables(TOKENS)
    torch.cuda.synchronize()
    assert_same_bits(got, want)


def in_threads(call, number):
    """What `call(i)` returns in a thread of its own for each i; the first error is raised."""
    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(call, range(number)))


def threads_make_first_calls_at_once():
    """Eight threads with a stream each, four times."""
    inputs = [tensors(TOKENS, seed=seed) for seed in range(8)]
    want = [forward_and_backward(x) for x in inputs]
    for _ in range(4):
        torch.cuda.synchronize()
        forget_tables()
        gate = threading.Barrier(8)

        def call(i, gate=gate):
            with torch.cuda.stream(torch.cuda.Stream()):
                gate.wait(60)
                result = forward_and_backward(inputs[i])
                torch.cuda.current_stream().synchronize()
            return result

        results = in_threads(call, 8)
        for i in range(8):
            assert_same_bits(results[i], want[i])


def a_first_call_during_capture_is_refused():
    """After a call outside the graph is captured; it stays right when tables leave the cache."""
    inputs = [x.detach() for x in tensors(TOKENS)]
    want = msa.attention(*inputs, config=CONFIG)
    torch.cuda.synchronize()
    forget_tables()
    graph = torch.cuda.CUDAGraph()
    with (
        torch.cuda.graph(graph),
        pytest.raises(ValueError, match="before a CUDA graph is captured"),
    ):
        msa.attention(*inputs, config=CONFIG)
    msa.attention(*inputs, config=CONFIG)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = msa.attention(*inputs, config=CONFIG)
    make_other_tables(TOKENS)
    for x in (got.out, got.lse):
        x.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits([got.out, got.lse], [want.out, want.lse])


def compiled_into_a_graph_without_a_call_before():
    """torch.compile warms up with the memory pool of its graphs; no table may stay there."""

    def run(q, k, v, q_idx, k_idx):
        return msa.ops.attention(q, k, v, q_idx, k_idx, config=CONFIG)[:2]

    compiled = torch.compile(run, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for seed in range(4):
            inputs = [x.detach() for x in tensors(TOKENS, seed=seed)]
            got = [x.clone() for x in compiled(*inputs)]
            assert_same_bits(got, run(*inputs))


def every_function_on_a_device_that_is_not_current():
    """No call changes the current device for later calls."""
    results = []
    for device in ("cuda:0", "cuda:1"):
        found, inputs = [], tensors(TOKENS, device)
        found += forward_and_backward(inputs)
        found += forward_and_backward(inputs, loop_order="kv_outer")
        q, k, v, q_idx, k_idx = plain = [x.detach() for x in inputs]
        chosen = msa.select(q_idx, k_idx, config=CONFIG)
        output = msa.sparse_attention(*inputs[:3], chosen)
        found += [chosen.indices, output.out]
        found += torch.autograd.grad(output.out.float().sum(), inputs[:3])
        kl = msa.align_index(*inputs[:2], *inputs[3:], config=CONFIG)  # the warm-up form
        found += [kl, *torch.autograd.grad(kl, inputs[3:])]
        trace = msa.lower(*plain, config=CONFIG, chunk_size=8)
        found += [trace.scores.values, trace.selection.indices, trace.reverse_index.query_ids]
        found += [trace.schedule.rows, trace.tile_union.block_ids, trace.output.out]
        found += step(*paged(device))
        # the functions of the backend by themselves
        sequences = Sequences.one(TOKENS, TOKENS)
        found.append(triton_impl.select_fused(q_idx, k_idx, sequences, CONFIG, "fp8_e4m3").indices)
        index = triton_impl.reverse_selection(chosen)
        schedule = triton_impl.schedule_chunks(index, 8)
        partials = triton_impl.attend_chunks(q, k, v, schedule, 0.1)
        found.append(triton_impl.combine_partials(partials).out)
        union = triton_impl.unite_tiles(chosen, 8)
        found.append(triton_impl.attend_union(q, k, v, union, 0.1).out)
        # operators, and the operator of the gradient alone
        out, lse, ids, kl = msa.ops.attention(*inputs, config=CONFIG, align=True)
        found += [out, lse, ids, kl, *torch.autograd.grad(out.float().sum() + kl, inputs)]
        found.append(msa.ops.select_blocks(q_idx, k_idx, config=CONFIG))
        found.append(msa.ops.sparse_attention(q, k, v, ids, block_size=16)[0])
        found += torch.ops.msa.sparse_attention_backward(
            torch.ones_like(out), torch.zeros_like(lse), q, k, v, out.detach(), lse.detach(), ids,
            [0, TOKENS], [0, TOKENS], 16, DIM**-0.5,
        )  # fmt: skip
        q, q_idx, _, pool = paged(device)
        found += msa.ops.decode(q, q_idx, pool.cache, CONFIG)
        assert torch.cuda.current_device() == 0
        assert {x.device for x in found} == {torch.device(device)}
        results.append(found)
    assert_same_bits(results[1], results[0])


def both_devices_by_two_threads_at_once():
    """Both threads call a new shape; their current device is not that of their tensors."""
    gate = threading.Barrier(2)
    inputs = [tensors(TOKENS, f"cuda:{i}") for i in range(2)]
    for i in range(2):
        forward_and_backward(inputs[i])  # compiles
        torch.cuda.synchronize(i)
    forget_tables()

    def call(i):
        torch.cuda.set_device(1 - i)
        gate.wait(60)
        result = forward_and_backward(inputs[i])
        torch.cuda.synchronize(i)
        return result

    results = in_threads(call, 2)
    assert_same_bits(results[1], results[0])


def a_graph_on_a_device_that_is_not_current():
    """Append and decode are captured on the second device while the first one is current."""
    want = step(*paged("cuda:0"))
    q, q_idx, new, pool = paged("cuda:1")
    before = pool.cache.lengths.clone(), pool.cache.k_pages.clone(), pool.cache.v_pages.clone()
    before += (pool.cache.k_idx_pages.clone(),)
    step(q, q_idx, new, pool)  # compiles
    cache = pool.cache
    for x, old in zip((cache.lengths, cache.k_pages, cache.v_pages, cache.k_idx_pages), before):
        x.copy_(old)
    torch.cuda.synchronize(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(1)), torch.cuda.device(0):
        got = step(q, q_idx, new, pool)
    with torch.cuda.device(1):
        graph.replay()
    torch.cuda.synchronize(1)
    assert_same_bits(got, want)


ONE = [
    a_table_is_ready_on_every_stream,
    a_table_lives_as_long_as_it_is_read,
    threads_make_first_calls_at_once,
    a_first_call_during_capture_is_refused,
    compiled_into_a_graph_without_a_call_before,
]
TWO = [
    every_function_on_a_device_that_is_not_current,
    both_devices_by_two_threads_at_once,
    a_graph_on_a_device_that_is_not_current,
]


def run_alone(function):
    """Run the function in a new Python process, which must succeed in time."""
    code = f"from tests import test_places_gpu as t; t.{function.__name__}()"
    command = [sys.executable, "-c", code]
    root, options = Path(__file__).parent.parent, {"capture_output": True, "text": True}
    done = subprocess.run(command, cwd=root, timeout=300, check=False, **options)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("function", ONE, ids=lambda f: f.__name__)
def test_on_one_device(function):
    run_alone(function)


@pytest.mark.parametrize("function", TWO, ids=lambda f: f.__name__)
def test_on_two_devices(function):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    run_alone(function)
