"""Which selections are validated, how often calls wait for the device, and the cost of it."""

from __future__ import annotations

import copy
import pickle
import sys
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch

import msa
from msa import selection as selections

CONFIG = msa.MSAConfig(block_size=4, top_k=3)
READS = ("cpu", "numpy", "item", "tolist", "__bool__", "__int__", "__float__", "__index__")


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    shapes = {"q": (30, 4, 8), "k": (30, 2, 8), "v": (30, 2, 8), "q_idx": (30, 2, 4)}
    return {n: torch.randn(s) for n, s in shapes.items()} | {"k_idx": torch.randn(30, 4)}


@pytest.fixture
def waits(monkeypatch):
    """A list that grows by one each time that the host reads numbers of a tensor."""
    found = []
    for name in READS:
        was = getattr(torch.Tensor, name)

        def counted(self, *args, was=was, **options):
            found.append(was)
            return was(self, *args, **options)

        monkeypatch.setattr(torch.Tensor, name, counted)
    return found


def made_by(tensors):
    """A Selection of each function of msa that returns one."""
    index = tensors["q_idx"], tensors["k_idx"]
    return {
        "select": msa.select(*index, config=CONFIG),
        "attention": msa.attention(**tensors, config=CONFIG).selection,
        "lower": msa.lower(**tensors, config=CONFIG).selection,
    }


def validated(tensors, selection):
    """Whether a call with this Selection validates it."""
    with mock.patch.object(selections, "check_canonical") as check:
        msa.sparse_attention(*(tensors[n] for n in "qkv"), selection)
    return check.called


# -- selections that msa made ---------------------------------------------------------------------
@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Writes to ids in the memory of the host count as those to ids on a GPU do."""
    counts = lambda ids: isinstance(ids, torch.Tensor) and not ids.is_inference()  # noqa: E731
    monkeypatch.setattr(selections, "counts_writes", counts)


@pytest.mark.parametrize("name", ["select", "attention", "lower"])
def test_what_msa_made_is_not_validated_again(as_on_a_gpu, name, tensors):
    selection = made_by(tensors)[name]
    assert not validated(tensors, selection)
    q, k, q_idx, k_idx = (tensors[n] for n in ("q", "k", "q_idx", "k_idx"))
    with mock.patch.object(selections, "check_canonical") as check:
        msa.align_index(q, k, q_idx, k_idx, selection)
    assert not check.called


def test_nor_is_what_comes_back_with_an_output(tensors):
    chosen = msa.select(tensors["q_idx"], tensors["k_idx"], config=CONFIG)
    output = msa.sparse_attention(*(tensors[n] for n in "qkv"), chosen)
    assert output.selection is chosen


@pytest.mark.parametrize("change", [
    lambda s: replace(s, indices=s.indices.clone()),
    lambda s: replace(s, indices=s.indices),
    lambda s: msa.Selection(s.indices, s.sequences, s.block_size),
    copy.deepcopy,
    lambda s: pickle.loads(pickle.dumps(s)),
])  # fmt: skip
def test_every_other_object_is_validated(as_on_a_gpu, change, tensors):
    selection = msa.select(tensors["q_idx"], tensors["k_idx"], config=CONFIG)
    assert validated(tensors, change(selection))
    assert not validated(tensors, selection)


def test_ids_that_were_written_to_are_validated(as_on_a_gpu, tensors):
    selection = msa.select(tensors["q_idx"], tensors["k_idx"], config=CONFIG)
    selection.indices[7, 0, 0] = -5
    with pytest.raises(ValueError, match=r"must hold block ids or -1 \(R8\), got -5 at query 7"):
        msa.sparse_attention(*(tensors[n] for n in "qkv"), selection)


@pytest.mark.parametrize("write", [
    lambda s: s.indices.numpy().__setitem__((7, 0, 0), -5),
    lambda s: s.indices.data.__setitem__((7, 0, 0), -5),
    lambda s: s.indices.untyped_storage().fill_(251),
    lambda s: np.from_dlpack(s.indices).__setitem__((7, 0, 0), -5),
    lambda s: object.__setattr__(s, "block_size", 64),
    lambda s: object.__setattr__(s, "sequences", msa.Sequences((0, 7, 30), (0, 7, 30))),
])  # fmt: skip
def test_a_write_that_torch_does_not_count_is_found(write, tensors):
    selection = msa.select(tensors["q_idx"], tensors["k_idx"], config=CONFIG)
    write(selection)
    with pytest.raises(ValueError, match=r"R8"):
        msa.sparse_attention(*(tensors[n] for n in "qkv"), selection)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_ids_written_before_the_backward_are_refused(backend, tensors):
    q, k, v = (tensors[n].clone().requires_grad_() for n in "qkv")
    config = msa.MSAConfig(block_size=16, top_k=2)
    selection = msa.select(tensors["q_idx"], tensors["k_idx"], config=config)
    output = msa.sparse_attention(q, k, v, selection, backend=backend)
    selection.indices.copy_(selection.indices.clone())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.out.sum().backward()


def test_ids_whose_writes_are_not_counted_are_validated(tensors):
    arrays = {name: x.numpy() for name, x in tensors.items()}
    assert validated(arrays, msa.select(arrays["q_idx"], arrays["k_idx"], config=CONFIG))
    with torch.inference_mode():
        assert validated(tensors, msa.select(tensors["q_idx"], tensors["k_idx"], config=CONFIG))


def test_validate_looks_at_every_selection(tensors):
    selection = msa.select(tensors["q_idx"], tensors["k_idx"], config=CONFIG)
    with mock.patch.object(selections, "check_canonical") as check:
        selection.validate()
    assert check.called


def test_its_groups_are_those_of_k_all_the_same(tensors):
    selection = msa.select(tensors["q_idx"], tensors["k_idx"], config=CONFIG)
    with pytest.raises(ValueError, match="Hkv = 1 groups as k has, got 2"):
        msa.sparse_attention(tensors["q"], tensors["k"][:, :1], tensors["v"][:, :1], selection)


# -- selections that the caller made --------------------------------------------------------------
def large(n, k, kind=torch):
    """Canonical ids of n queries in one sequence: the own block and those before it."""
    own = np.arange(n) // 64
    first = np.maximum(own - k + 1, 0)
    ids = first[:, None] + np.arange(k)
    ids = np.where(ids <= own[:, None], ids, -1).astype(np.int32)[:, None]
    ids = ids if kind is np else torch.from_numpy(ids)
    return msa.Selection(ids, msa.Sequences.one(n, n), 64)


def test_one_wait_for_the_device(waits):
    selection = large(1000, 4)
    waits.clear()
    selection.validate()
    assert len(waits) == 1


@pytest.mark.parametrize("kind", [np, torch])
def test_no_loop_over_queries(kind):
    """The check makes as many Python calls for 10 queries as for 100,000."""

    def calls(n):
        selection, found = large(n, 4, kind), 0

        def count(frame, event, arg):
            nonlocal found
            found += event in ("call", "line")
            return count

        sys.settrace(count)
        try:
            selections.check_selection_for(selection, selection.indices, selection.indices)
        finally:
            sys.settrace(None)
        return found

    calls(5)  # what is looked up once
    assert calls(10) == calls(100_000)


@pytest.mark.parametrize("kind", [np, torch])
@pytest.mark.parametrize(("row", "says"), [
    ([-1, -1, -1], "hold each query's own block"),
    ([0, 2, -1], "hold each query's own block"),
    ([1, 0, 3], "be ascending and unique"),
    ([3, 3, -1], "be ascending and unique"),
    ([0, -1, 3], "have -1 only after the last id"),
    ([-1, 3, -1], "have -1 only after the last id"),
    ([0, -2, 3], "hold block ids or -1"),
    ([0, 3, -2], "hold block ids or -1"),
    ([-7, -1, -1], "hold block ids or -1"),
    ([0, 3, 4], "hold visible blocks only"),
    ([3, 2**31 - 1, -1], "hold visible blocks only"),
])  # fmt: skip
def test_each_rule_is_told_from_the_others(row, says, kind):
    """Query 7 is in block 3, with blocks of two tokens."""
    ids = np.full((9, 2, 3), -1, np.int32)
    ids[..., 0] = (np.arange(9) // 2)[:, None]
    ids[7, 1] = row
    ids = ids if kind is np else torch.from_numpy(ids)
    with pytest.raises(ValueError, match=says) as error:
        msa.Selection(ids, msa.Sequences.one(9, 9), 2).validate()
    assert "at query 7, group 1, own block 3" in str(error.value)


@pytest.mark.parametrize("kind", [np, torch])
@pytest.mark.parametrize("k", [1, 3])
def test_no_queries_and_single_blocks(k, kind):
    for n in (0, 1, 200):
        large(n, k, kind).validate()
