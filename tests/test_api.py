"""The public functions: every layout, both kinds of array, the choice of a backend."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from itertools import product
from unittest import mock

import numpy as np
import pytest
import torch

import msa
from msa import cache_checks, checks, recall
from msa.config import LARGEST_TOP_K
from msa.dispatch import resolve
from msa.torch_impl import decode

CONFIG = msa.MSAConfig(block_size=4, top_k=3)
BACKENDS = ["reference", "torch"]


def arrays(rng, *lead_q, lead_k=None, heads=4, kv_heads=2, dim=6, dtype=np.float32):
    lead_k = lead_k or lead_q
    shapes = {
        "q": (*lead_q, heads, dim), "k": (*lead_k, kv_heads, dim), "v": (*lead_k, kv_heads, 5),
        "q_idx": (*lead_q, kv_heads, 3), "k_idx": (*lead_k, 3),
    }  # fmt: skip
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batched_is_packed(backend, rng):
    given = arrays(rng, 3, 10, lead_k=(3, 17))
    batched = msa.attention(**given, config=CONFIG, backend=backend)
    packed = msa.attention(
        **{name: x.reshape(-1, *x.shape[2:]) for name, x in given.items()},
        cu_seqlens_q=[0, 10, 20, 30], cu_seqlens_k=[0, 17, 34, 51],
        config=CONFIG, backend=backend,
    )  # fmt: skip
    assert batched.out.shape == (3, 10, 4, 5) and batched.lse.shape == (3, 10, 4)
    assert (batched.out.reshape(30, 4, 5) == packed.out).all()
    assert (batched.selection.indices == packed.selection.indices).all()
    assert batched.selection.sequences == msa.Sequences.uniform(3, 10, 17)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "kind", [list, tuple, np.array, lambda b: torch.tensor(b, dtype=torch.int32)]
)
def test_borders_may_come_as_any_sequence(kind, backend, rng):
    given = arrays(rng, 9)
    borders = {"cu_seqlens_q": kind([0, 2, 2, 9]), "cu_seqlens_k": kind([0, 2, 2, 9])}
    apart = msa.attention(**given, **borders, config=CONFIG, backend=backend)
    for qs in (slice(0, 2), slice(2, 9)):
        alone = {name: x[qs] for name, x in given.items()}
        expected = msa.attention(**alone, config=CONFIG, backend=backend)
        np.testing.assert_allclose(apart.out[qs], expected.out, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_numpy_in_numpy_out(backend, rng):
    for dtype in (np.float16, np.float32, np.float64):
        output = msa.attention(**arrays(rng, 9, dtype=dtype), config=CONFIG, backend=backend)
        assert type(output.out) is np.ndarray and output.out.dtype == dtype
        assert type(output.lse) is np.ndarray and output.lse.dtype == np.float32
        assert type(output.selection.indices) is np.ndarray
        assert output.selection.indices.dtype == np.int32


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_call_gives_the_loss_too(backend, rng):
    given = arrays(rng, 2, 9)
    plain = msa.attention(**given, config=CONFIG, backend=backend)
    output = msa.attention(**given, config=CONFIG, align=True, backend=backend)
    assert plain.kl is None and output.kl.shape == () and output.kl.dtype == np.float32
    assert (output.out == plain.out).all() and (output.lse == plain.lse).all()
    branches = [given[n] for n in ("q", "k", "q_idx", "k_idx")]
    for lse in (None, plain.lse, plain.lse.astype(np.float64)):
        loss = msa.align_index(*branches, plain.selection, lse=lse, config=CONFIG, backend=backend)
        np.testing.assert_allclose(loss, output.kl, rtol=1e-5)
    wide = {n: x.astype(np.float64) for n, x in given.items()}
    assert msa.attention(**wide, config=CONFIG, align=True, backend=backend).kl.dtype == np.float64


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_torch_in_torch_out(dtype, backend, rng):
    given = {name: torch.tensor(x).to(dtype) for name, x in arrays(rng, 2, 9).items()}
    output = msa.attention(**given, config=CONFIG, backend=backend)
    assert output.out.dtype == dtype and output.lse.dtype == torch.float32
    assert output.selection.indices.dtype == torch.int32
    loss = msa.align_index(
        *(given[n] for n in ("q", "k", "q_idx", "k_idx")), config=CONFIG, backend=backend
    )
    assert isinstance(loss, torch.Tensor) and loss.shape == ()


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_with_a_contiguous_last_dim(backend, rng):
    given = {name: torch.tensor(x) for name, x in arrays(rng, 2, 9).items()}
    # [B, H, T, D] in memory, seen as [B, T, H, D]; and a slice of a wider tensor
    moved = {
        name: x.transpose(1, 2).contiguous().transpose(1, 2) if x.ndim == 4 else x
        for name, x in given.items()
    }
    moved["k"] = torch.cat([moved["k"], torch.full_like(moved["k"], torch.nan)], -1)[..., :6]
    assert not moved["q"].is_contiguous() and not moved["k"].is_contiguous()
    expected = msa.attention(**given, config=CONFIG, backend=backend)
    output = msa.attention(**moved, config=CONFIG, backend=backend)
    assert torch.equal(output.out, expected.out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_parts_make_the_whole(backend, rng):
    given = arrays(rng, 2, 9)
    whole = msa.attention(**given, config=CONFIG, backend=backend)
    selection = msa.select(given["q_idx"], given["k_idx"], config=CONFIG, backend=backend)
    assert (selection.indices == whole.selection.indices).all()
    parts = msa.sparse_attention(*(given[n] for n in "qkv"), selection, backend=backend)
    assert (parts.out == whole.out).all() and parts.out.shape == (2, 9, 4, 5)
    assert parts.selection.indices is not None
    trace = msa.lower(**given, config=CONFIG, backend=backend, chunk_size=3, tile_size=4)
    np.testing.assert_allclose(trace.output.out.reshape(whole.out.shape), whole.out, atol=1e-6)
    np.testing.assert_allclose(trace.union_output.out, trace.output.out, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_decode_is_the_end_of_a_prefill(backend, rng):
    given = arrays(rng, 11)
    pages = rng.permutation(5)[:3]  # three pages of four tokens, anywhere in a pool of five
    pool = {}
    for name in ("k", "v", "k_idx"):
        padded = np.full((12, *given[name].shape[1:]), np.nan, np.float32)
        padded[:11] = given[name]
        pool[name] = np.full((5, 4, *given[name].shape[1:]), np.nan, np.float32)
        pool[name][pages] = padded.reshape(3, 4, *given[name].shape[1:])
    table = np.array([[0, 0, 0], pages])
    cache = msa.PagedKV(pool["k"], pool["v"], pool["k_idx"], table, np.array([0, 11]))
    new = {n: np.stack([given[n][-2:], given[n][-2:]]) for n in ("q", "q_idx")}
    output = msa.decode(new["q"], new["q_idx"], cache, config=CONFIG, backend=backend)
    prefill = msa.attention(**given, config=CONFIG, backend=backend)
    np.testing.assert_allclose(output.out[1], prefill.out[-2:], atol=1e-6)
    np.testing.assert_allclose(output.lse[1], prefill.lse[-2:], atol=1e-6)
    assert (output.out[0] == 0).all() and (output.lse[0] == -np.inf).all()
    assert (output.selection.indices == prefill.selection.indices[-2:]).all()


def test_auto_goes_by_the_kind_of_array():
    assert resolve("auto", np.zeros(1)) == "reference"
    assert resolve("auto", torch.zeros(1)) == "torch"
    assert resolve("torch", np.zeros(1)) == "torch"


def test_gradients_reach_what_they_should(rng):
    given = {n: torch.tensor(x, requires_grad=True) for n, x in arrays(rng, 9).items()}
    output = msa.attention(**given, config=CONFIG)
    output.out.sum().backward()
    assert all(given[n].grad is not None for n in "qkv")
    assert given["q_idx"].grad is None and given["k_idx"].grad is None


def test_the_reference_does_not_drop_gradients_silently(rng):
    given = {n: torch.tensor(x, requires_grad=True) for n, x in arrays(rng, 9).items()}
    with pytest.raises(ValueError, match="q must not require a gradient"):
        msa.attention(**given, config=CONFIG, backend="reference")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_selection_brings_its_own_block_size_to_the_loss(backend, rng):
    """A selection has its own block size; that of the configuration is for the warm-up form."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    given = arrays(rng, 40, dim=16)
    q, k, q_idx, k_idx = (torch.tensor(given[n]).to(device) for n in ("q", "k", "q_idx", "k_idx"))
    config = msa.MSAConfig(block_size=16, top_k=2)
    chosen = msa.select(q_idx, k_idx, config=config, backend=backend)
    wanted = msa.align_index(q, k, q_idx, k_idx, chosen, config=config, backend=backend)
    assert msa.align_index(q, k, q_idx, k_idx, chosen, backend=backend) == wanted


def test_autocast_changes_nothing(rng):
    """Autocast does not change the backward pass either."""
    made, found = arrays(rng, 9), []
    for on in (False, True):
        given = {n: torch.tensor(x, requires_grad=True) for n, x in made.items()}
        q, k, v, q_idx, k_idx = given.values()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            output = msa.attention(**given, config=CONFIG, align=True)
            sparse = msa.sparse_attention(q, k, v, msa.select(q_idx, k_idx, config=CONFIG))
            warm = msa.align_index(q, k, q_idx, k_idx, config=CONFIG)
            trace = msa.lower(**{n: x.detach() for n, x in given.items()}, config=CONFIG)
        (output.out.sum() + sparse.out.sum() + output.kl + warm).backward()
        grads = (x.grad for x in given.values())
        found.append([output.out, sparse.out, output.kl, warm, trace.union_output.out, *grads])
    for plain, cast in zip(*found):
        assert torch.equal(plain, cast)


# -- which arrays are accepted --------------------------------------------------------------------
INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]


def on_backend(backend, array):
    """Tensors for triton, if its interpreter or a GPU runs it; NumPy arrays for the others."""
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
    """They are converted to Python numbers, so no backend gets another kind."""
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
    """Neither free pages nor entries of the table beyond a sequence's last block are read."""
    bits = torch.ones(4, 16, 1, 8).to(torch.float8_e4m3fn)
    table, lengths = torch.tensor([[0, 3], [2, 3]]), torch.tensor([16, 0])
    q, k_idx = torch.ones(2, 1, 1, 8), torch.ones(4, 16, 8)
    scales = torch.tensor([2.0, 0.0, -1.0, torch.nan])[:, None]
    cache = msa.PagedKV(bits, bits, k_idx, table, lengths, scales, scales)
    out = msa.decode(q, q, cache, config=msa.MSAConfig(16, 2), backend="torch").out
    assert out.flatten().tolist() == [2.0] * 8 + [0.0] * 8


def test_contents_are_looked_at_after_one_wait(monkeypatch):
    """Table, lengths and the scales of three kinds of pages are read with one wait."""
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
    """This calls the check itself: public functions refuse a meta tensor before they reach it."""
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
    """This runs in another process without checks of shapes, which cannot be traced."""
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
    """The largest k with nine tokens: memory for 16,384 blocks would be 4 GiB."""
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
