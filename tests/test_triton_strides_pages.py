"""Kernels of decoding address pages, tables and scales by their strides, in 64 bits.

The layouts are those of tests/strided.py.
"""

from __future__ import annotations

import pytest
import strided
import torch
from strided import (
    BLOCK,
    CONFIG,
    CUDA,
    DEVICE,
    DIM,
    E4M3,
    GROUPS,
    HEADS,
    columns,
    expanded,
    far,
    normal,
    same,
    spaced,
    transposed,
    turned,
)

import msa
from msa.ir import PagedKV

pytestmark = [pytest.mark.gpu] * CUDA
folder = strided.folder


# -- decoding -------------------------------------------------------------------------------------
BATCH, PAGES = 3, 9
EIGHTS = [(), ("k", "v", "k_idx")]
INTEGERS = ("page_table", "lengths")  # the others are contiguous in their last dim (R20)


def cached(eight=()):
    """Three sequences of three, no and two pages, in an order of no meaning."""
    shapes = {"k": (GROUPS, DIM), "v": (GROUPS, DIM), "k_idx": (DIM,)}
    made = {
        f"{name}_pages": normal(seed, PAGES, BLOCK, *dims)
        for seed, (name, dims) in enumerate(shapes.items())
    }
    for seed, name in enumerate(eight):
        made[f"{name}_pages"] = made[f"{name}_pages"].float().to(E4M3)
        powers = torch.randint(
            -3, 4, (PAGES, *shapes[name][:-1]), generator=torch.manual_seed(seed)
        )
        made[f"{name}_scales"] = (2.0 ** powers.float()).to(DEVICE)
    table = torch.tensor([[4, 0, 7, 1], [8, 8, 8, 8], [2, 5, 3, 6]], dtype=torch.int32)
    lengths = torch.tensor([2 * BLOCK + 7, 0, BLOCK + 11], dtype=torch.int32)
    return made | {"page_table": table.to(DEVICE), "lengths": lengths.to(DEVICE)}


def asked(n=1):
    return {"q": normal(7, BATCH, n, HEADS, DIM), "q_idx": normal(8, BATCH, n, GROUPS, DIM)}


def step(parts, queries, backend="triton"):
    output = msa.decode(**queries, cache=PagedKV(**parts), config=CONFIG, backend=backend)
    live = output.out[[0, 2]], output.lse[[0, 2]]
    assert not output.out[1].any() and (output.lse[1] == -torch.inf).all()
    return [*live, output.selection.indices]


def chunk(parts, queries, backend="triton"):
    """A prefill of three tokens of each sequence that has tokens."""
    cache = parts | {name: parts[name][::2] for name in INTEGERS}
    output = msa.prefill(**{n: x[::2] for n, x in queries.items()}, cache=PagedKV(**cache),
                         config=CONFIG, backend=backend)  # fmt: skip
    return [output.out, output.lse, output.selection.indices]


def every(change, change_integers, home):
    """All arguments in another layout, as far as the checks allow."""
    return {n: (change_integers if n in INTEGERS else change)(x) for n, x in home.items()}


LAYOUTS = [(spaced, columns), (turned, transposed)]


@pytest.mark.parametrize("call", [step, chunk])
@pytest.mark.parametrize("eight", EIGHTS, ids=["wide", "8 bits"])
def test_decode_and_prefill(call, eight):
    parts, queries = cached(eight), asked()
    want = call(parts, queries)
    for layout in LAYOUTS:
        same(call(every(*layout, parts), every(*layout, queries)), want)
    for name in INTEGERS:
        same(call(parts | {name: columns(parts[name])}, queries), want)


@pytest.mark.parametrize("name", [*(n for n in cached(EIGHTS[1]) if n != "k_idx_scales"), *asked()])
def test_decode_with_expanded_tensors(name):
    parts, queries = cached(EIGHTS[1]), asked()
    parts["lengths"] = torch.full_like(parts["lengths"], BLOCK + 3)
    home = parts if name in parts else queries
    home[name] = expanded(home[name])
    assert home[name].stride(0) == 0
    got, want = (
        msa.decode(**{n: change(x) for n, x in queries.items()}, config=CONFIG, backend="triton",
                   cache=PagedKV(**{n: change(x) for n, x in parts.items()}))
        for change in (lambda x: x, torch.clone)
    )  # fmt: skip
    same((got.out, got.lse, got.selection.indices), (want.out, want.lse, want.selection.indices))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_decode_with_any_integers(dtype, as_users_run_it):
    """An empty slot is one also where integers have no sign."""
    parts, queries = cached(), asked()
    want = step(parts, queries)
    if torch.iinfo(dtype).max >= 2 * BLOCK + 7:
        same(step(parts | {"lengths": parts["lengths"].to(dtype)}, queries), want)
    same(step(parts | {"page_table": parts["page_table"].to(dtype)}, queries), want)


@pytest.mark.large
@pytest.mark.parametrize("eight", EIGHTS, ids=["wide", "8 bits"])
@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("call", [step, chunk])
def test_decode_and_prefill_beyond_2_31(call, eight, dim, folder):
    parts, queries = cached(eight), asked(n=3)
    want = call(parts, queries)
    parts = {name: far_if_long(name, x, dim, folder) for name, x in parts.items()}
    queries = {name: far_if_long(name, x, dim, folder) for name, x in queries.items()}
    same(call(parts, queries), want)


def far_if_long(name, x, dim, folder):
    """Far apart along a dim of three entries or more that need not be contiguous."""
    lead = x.dim() if name in INTEGERS else x.dim() - 1
    return far(x, dim, folder) if dim < lead and x.shape[dim] > 2 else x


def tokens(n=3):
    shapes = {"k": (GROUPS, DIM), "v": (GROUPS, DIM), "k_idx": (DIM,)}
    return {name: normal(20 + s, BATCH, n, *dims) for s, (name, dims) in enumerate(shapes.items())}


def append(parts, new):
    """What the cache holds afterwards. The page of block 2 of the last sequence is a new one."""
    msa.append_tokens(PagedKV(**parts), **new)
    return list(parts.values())


APPENDED = EIGHTS if CUDA else EIGHTS[:1]  # the interpreter rounds to e4m3 wrongly


def fresh(eight):
    parts = cached(eight)
    parts["lengths"][2] = 2 * BLOCK - 1
    return parts


@pytest.mark.parametrize("eight", APPENDED, ids=["wide", "8 bits"][: len(APPENDED)])
def test_append_tokens(eight):
    """The caller's own tensors are written, whatever their strides."""
    want = append(fresh(eight), tokens())
    assert want[-1].tolist() == [2 * BLOCK + 10, 0 + 3, 2 * BLOCK + 2]
    for layout in LAYOUTS:
        same(append(every(*layout, fresh(eight)), every(*layout, tokens())), want)
    shared = {name: expanded(x) for name, x in tokens().items()}
    whole = {name: x.contiguous() for name, x in shared.items()}
    same(append(fresh(eight), shared), append(fresh(eight), whole))


def test_append_tokens_needs_memory_for_keys_and_for_values():
    parts = fresh(())
    parts["v_pages"] = parts["k_pages"]
    wanted = "cache.v_pages must have memory of its own, got that of cache.k_pages"
    with pytest.raises(ValueError, match=wanted):
        append(parts, tokens())


def test_append_tokens_writes_only_what_it_should():
    """A column of a wider tensor: the other one stays."""
    parts = fresh(())
    both = torch.stack([parts["lengths"], torch.full_like(parts["lengths"], 55)], 1)
    parts["lengths"] = both[:, 0]
    append(parts, tokens())
    assert both.tolist() == [[2 * BLOCK + 10, 55], [3, 55], [2 * BLOCK + 2, 55]]


@pytest.mark.large
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_append_tokens_beyond_2_31(dim, folder):
    want = append(fresh(APPENDED[-1]), tokens())
    parts, new = (
        {name: far_if_long(name, x, dim, folder) for name, x in home.items()}
        for home in (fresh(APPENDED[-1]), tokens())
    )
    same(append(parts, new), want)


@pytest.mark.parametrize("name", ["lengths", "k_pages", "v_pages", "k_idx_pages"])
def test_append_tokens_refuses_what_has_no_place_for_each_entry(name):
    parts = fresh(())
    parts[name] = expanded(parts[name])
    with pytest.raises(ValueError, match=rf"cache.{name} must have memory for each number, got"):
        append(parts, tokens())
