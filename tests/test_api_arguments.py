"""Which arguments the public functions take: all integers, read-only arrays, parameters."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from itertools import product
from unittest import mock

import numpy as np
import pytest
import torch
from small_calls import BACKENDS, CONFIG, arrays

import msa
from msa import cache_checks, checks, recall
from msa.config import LARGEST_TOP_K
from msa.torch_impl import decode


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# -- what the door lets in -------------------------------------------------------------------------
INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]


def on_backend(backend, array):
    """Tensors for triton, where its interpreter or a GPU runs it; NumPy for the others."""
    if backend != "triton":
        return array
    return torch.tensor(array).to("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [*product(INTEGERS, BACKENDS), *product(["uint8", "int16", "uint64"], ["triton"])],
)
def test_integers_of_every_dtype_count(dtype, backend, rng):
    """Borders of sequences; tables and lengths of a cache."""
    config = msa.MSAConfig(block_size=16, top_k=2)
    given = {n: on_backend(backend, x) for n, x in arrays(rng, 20, dim=16).items()}
    counts = {n: on_backend(backend, np.array([0, 3, 20], dtype)) for n in ("q", "k")}
    call = {"config": config, "backend": backend}
    found, wanted = (
        msa.select(given["q_idx"], given["k_idx"], cu_seqlens_q=q, cu_seqlens_k=k, **call)
        for q, k in (counts.values(), ([0, 3, 20], [0, 3, 20]))
    )
    assert found.sequences == wanted.sequences and (found.indices == wanted.indices).all()

    pages = [on_backend(backend, rng.standard_normal((3, 16, *d)).astype(np.float32))
             for d in ((2, 16), (2, 5), (3,))]  # fmt: skip
    q = on_backend(backend, rng.standard_normal((2, 1, 4, 16)).astype(np.float32))
    q_idx = on_backend(backend, rng.standard_normal((2, 1, 2, 3)).astype(np.float32))
    found, wanted = (
        msa.decode(q, q_idx, msa.PagedKV(*pages, *(
            on_backend(backend, np.array(x, kind)) for x in ([[2, 0], [1, 1]], [20, 7])
        )), **call)
        for kind in (dtype, "int32")
    )  # fmt: skip
    assert (found.out == wanted.out).all() and (found.lse == wanted.lse).all()


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_flat_reads_tables_of_every_dtype(kind, dtype, as_users_run_it):
    pages = kind(np.arange(8, dtype=np.float32).reshape(4, 2, 1, 1))
    table, lengths = (kind(np.array(x, dtype)) for x in ([[3, 1]], [3]))
    cache = msa.PagedKV(pages, pages, pages[..., 0], table, lengths)
    assert cache.flat(np.int64(0))[0].ravel().tolist() == [6, 7, 2]


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
def test_numbers_may_be_those_of_numpy(backend, rng, as_users_run_it):
    """They are kept as Python's own, so no backend sees another kind."""
    given = {n: on_backend(backend, x) for n, x in arrays(rng, 20, dim=16).items()}
    plain = msa.MSAConfig(16, 2, 0, 1, 0.25, 0.5)
    config = msa.MSAConfig(
        np.uint8(16), np.int64(2), np.int8(0), np.uint64(1), np.float16(0.25), np.float32(0.5)
    )
    fraction = msa.MSAConfig(16, 2, softmax_scale=Fraction(1, 4), index_scale=np.longdouble(0.5))
    assert plain == config == fraction
    for numbers in (vars(config).values(), vars(fraction).values()):
        assert [type(x) for x in numbers] == [int] * 4 + [float] * 2
    wanted, found = (
        msa.lower(**given, config=c, chunk_size=size(3), tile_size=size(8), backend=backend)
        for c, size in ((plain, int), (config, np.int64))
    )
    assert (found.output.out == wanted.output.out).all()
    assert found.schedule.chunk_size == 3 and type(found.schedule.chunk_size) is int
    borders = np.array([0, 20])
    chosen = msa.Selection(wanted.selection.indices, msa.Sequences(tuple(borders), (0, 20)),
                           np.int64(16))  # fmt: skip
    assert type(chosen.block_size) is int and type(chosen.sequences.total_q) is int
    sparse = msa.sparse_attention(*(given[n] for n in "qkv"), chosen, backend=backend,
                                  softmax_scale=np.float32(0.25))  # fmt: skip
    assert abs(sparse.out - wanted.output.out).max() < 1e-6


def test_borders_may_be_a_range_or_hold_tensors(rng):
    given = {n: torch.tensor(x) for n, x in arrays(rng, 12).items()}
    wanted = msa.attention(**given, cu_seqlens_q=[0, 4, 8, 12], cu_seqlens_k=[0, 4, 8, 12],
                           config=CONFIG)  # fmt: skip
    mixed = [0, torch.tensor(4), np.int32(8), np.array(12)]
    found = msa.attention(**given, cu_seqlens_q=range(0, 13, 4), cu_seqlens_k=mixed, config=CONFIG)
    assert found.selection.sequences == wanted.selection.sequences
    assert torch.equal(found.out, wanted.out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_arrays_on_disk_and_read_only_ones(backend, rng, tmp_path):
    given = arrays(rng, 9)
    wanted = msa.attention(**given, config=CONFIG, backend=backend)
    given["q"].tofile(tmp_path / "q")
    for name in ("k", "v", "q_idx", "k_idx"):
        given[name].flags.writeable = False
    given["q"] = np.memmap(tmp_path / "q", np.float32, "r", shape=given["q"].shape)
    assert (msa.attention(**given, config=CONFIG, backend=backend).out == wanted.out).all()


def test_parameters_are_tensors(rng):
    given = {n: torch.nn.Parameter(torch.tensor(x)) for n, x in arrays(rng, 9).items()}
    assert msa.attention(**given, config=CONFIG).out.requires_grad


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
def test_an_lse_of_64_bits_is_taken_everywhere(backend, rng):
    given = {n: on_backend(backend, x) for n, x in arrays(rng, 20, dim=16).items()}
    config = msa.MSAConfig(16, 2)
    output = msa.attention(**given, config=config, align=True, backend=backend)
    branches = [given[n] for n in ("q", "k", "q_idx", "k_idx")]
    wide = output.lse.double() if backend == "triton" else output.lse.astype(np.float64)
    loss = msa.align_index(*branches, output.selection, lse=wide, config=config, backend=backend)
    np.testing.assert_allclose(float(loss), float(output.kl), rtol=1e-5)


def test_a_scale_that_no_sequence_reads_may_be_anything():
    """Unused pages, and entries of the table beyond the last block of a sequence."""
    bits = torch.ones(4, 16, 1, 8).to(torch.float8_e4m3fn)
    table, lengths = torch.tensor([[0, 3], [2, 3]]), torch.tensor([16, 0])
    q, k_idx = torch.ones(2, 1, 1, 8), torch.ones(4, 16, 8)
    scales = torch.tensor([2.0, 0.0, -1.0, torch.nan])[:, None]
    cache = msa.PagedKV(bits, bits, k_idx, table, lengths, scales, scales)
    out = msa.decode(q, q, cache, config=msa.MSAConfig(16, 2), backend="torch").out
    assert out.flatten().tolist() == [2.0] * 8 + [0.0] * 8


def test_contents_are_looked_at_after_one_wait(monkeypatch):
    """Table, lengths and the scales of three kinds of page come back in one piece."""
    bits = torch.ones(3, 16, 1, 8).to(torch.float8_e4m3fn)
    scales = torch.ones(3, 1)
    cache = msa.PagedKV(bits, bits, bits[:, :, 0], torch.tensor([[0, 2]]), torch.tensor([20]),
                        scales, scales, scales[:, 0])  # fmt: skip
    selection = msa.Selection(torch.zeros(9, 1, 1, dtype=torch.int32), msa.Sequences.one(9, 9), 16)
    waits = []
    for name in ("cpu", "item", "tolist", "__bool__", "__int__", "__float__", "__index__"):
        was = getattr(torch.Tensor, name)

        def counted(self, *args, was=was):
            waits.append(was)
            return was(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    cache_checks.check_contents(cache, {"Bk": 16, "pages": 3, "n": 1})
    assert len(waits) == 1
    selection.validate()
    assert len(waits) == 2


def test_another_device_is_refused():
    """What a machine without a GPU has of another device holds no numbers: so not by the door."""
    here, there = torch.ones(2), torch.ones(2, device="meta")
    with pytest.raises(ValueError, match="v must be on the device of q = cpu, got meta"):
        checks.check_same_place(q=here, v=there)


def test_a_shard_is_refused_by_its_name():
    distributed = torch.distributed
    if not distributed.is_available():
        pytest.skip("torch without distributed")
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        q = DTensor.from_local(torch.ones(6, 4, 4), mesh, [Replicate()])
        with pytest.raises(TypeError, match=r"q must be a torch.Tensor itself.*DTensor.*local_map"):
            msa.attention(q, *(torch.ones(6, 2, 4),) * 3, torch.ones(6, 4), config=CONFIG)
    finally:
        distributed.destroy_process_group()


def test_recall_has_the_same_door(as_users_run_it):
    x = np.ma.masked_array(np.ones((4, 1, 1)))
    ids = torch.tensor([[[0]], [[0]], [[0]], [[1]]], dtype=torch.int32)
    selection = msa.Selection(ids, msa.Sequences.one(4, 4), 2)
    one = torch.ones(4, 1, 1)
    with pytest.raises(TypeError, match="q must be a torch"):
        recall.measure(x, one, selection, 1.0)
    with pytest.raises(ValueError, match="own block"):
        recall.measure(one, one, selection, 1.0)
    with pytest.raises(ValueError, match="k must hold numbers"):
        recall.measure(one, one.to("meta"), selection, 1.0)
    with pytest.raises(TypeError, match="selection must be a msa"):
        recall.measure(one, one, ids, 1.0)


def test_a_configuration_is_made_inside_a_graph():
    """In a process of its own, where shapes are not checked: that cannot be traced."""
    code = """
import torch, msa, msa.ops
def call(q_idx, k_idx):
    config = msa.MSAConfig(block_size=4, top_k=2, index_scale=0.5)
    return msa.ops.select_blocks(q_idx, k_idx, config=config)
tensors = torch.randn(12, 1, 2), torch.randn(12, 2)
compiled = torch.compile(call, fullgraph=True, backend="eager")
assert torch.equal(compiled(*tensors), call(*tensors))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_many_places_take_no_memory_beyond_the_blocks_there_are(rng):
    """The largest k over nine tokens: room for 16,384 blocks would be 4 GiB."""
    given = {n: torch.tensor(x, requires_grad=True) for n, x in arrays(rng, 9).items()}
    large, small = (msa.MSAConfig(block_size=64, top_k=k) for k in (LARGEST_TOP_K, 1))
    for config in (large, small):
        output = msa.attention(**given, config=config, align=True)
        (output.out.sum() + output.kl).backward()
    np.testing.assert_array_equal(output.selection.counts, 1)
    pages = [torch.randn(2, 64, *d) for d in ((2, 64), (2, 64), (3,))]
    cache = msa.PagedKV(*pages, torch.tensor([[0, 1]]), torch.tensor([70]))
    q, q_idx = torch.randn(1, 1, 4, 64), torch.randn(1, 1, 2, 3)
    spy = mock.Mock(wraps=decode.attend_pages)
    with mock.patch.object(decode, "attend_pages", spy):
        wide, narrow = (
            msa.decode(q, q_idx, cache, config=msa.MSAConfig(64, k)) for k in (LARGEST_TOP_K, 2)
        )
    assert [call.args[1].shape[-1] for call in spy.call_args_list] == [2, 2]
    assert torch.equal(wide.out, narrow.out)
