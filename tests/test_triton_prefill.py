"""Prefill over pages on the triton backend: the bits of the same kernels over packed keys (R2)."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch

import msa
from msa import kernel_choice
from msa.ir import PagedKV, Sequences
from msa.triton_impl import attention, tuning
from msa.triton_impl.paged_keys import matrix_sizes

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [pytest.mark.gpu] * CUDA
BLOCK, GROUPS, GROUP, DIM = 16, 2, 3, 16
CONFIG = msa.MSAConfig(BLOCK, 4)
COUNTS, LENGTHS = (37, 0, 0, 3, 9), (150, 0, 20, 47, 9)


RANDOM = torch.Generator().manual_seed(0)


def random(*shape):
    return torch.randn(shape, generator=RANDOM)


def chunk(dtype=torch.float32):
    """Queries, packed keys, and the same keys in pages of NaN; the table has columns to spare."""
    sequences = Sequences(*((0, *accumulate(n)) for n in (COUNTS, LENGTHS)))
    shapes = {"k": (GROUPS, DIM), "v": (GROUPS, DIM), "k_idx": (DIM,)}
    q, q_idx = random(sum(COUNTS), GROUPS * GROUP, DIM), random(sum(COUNTS), GROUPS, DIM)
    keys = {name: random(sum(LENGTHS), *dims).to(DEVICE, dtype) for name, dims in shapes.items()}
    blocks = [-(-n // BLOCK) for n in LENGTHS]
    order = torch.randperm(sum(blocks) + 2, generator=RANDOM)
    table = torch.full((len(LENGTHS), max(blocks) + 2), 10**9, dtype=torch.int32)
    pages = {
        name: torch.full((len(order), BLOCK, *dims), torch.nan).to(DEVICE, dtype)
        for name, dims in shapes.items()
    }
    cu_blocks = [0, *accumulate(blocks)]
    for s, keys_of in enumerate(sequences.spans()):
        own = order[cu_blocks[s] : cu_blocks[s + 1]]
        table[s, : len(own)] = own.int()
        token = torch.arange(LENGTHS[s])
        for name, array in pages.items():
            array[own[token // BLOCK], token % BLOCK] = keys[name][keys_of[1]]
    cache = PagedKV(*pages.values(), table.to(DEVICE), torch.tensor(LENGTHS, device=DEVICE))
    return q.to(DEVICE, dtype), q_idx.to(DEVICE, dtype), keys, cache, sequences


@pytest.mark.parametrize("loop_order", ["auto", "union", "kv_outer"])
@pytest.mark.parametrize("super_tiles", [False, True])
def test_the_bits_of_packed_keys(loop_order, super_tiles, monkeypatch):
    """A super-tile may begin inside a sequence, behind others, some without queries."""
    q, q_idx, keys, cache, sequences = chunk()
    borders = {"cu_seqlens_q": sequences.cu_seqlens_q}
    options = {"config": CONFIG, "loop_order": loop_order, "kernels": "portable"}
    options["backend"] = "triton"
    if loop_order == "auto":
        monkeypatch.setattr(attention, "limits", lambda top_k: (2, 4))
        monkeypatch.setattr(attention, "choose_order", lambda selection, group: "split")
    if super_tiles:
        monkeypatch.setattr(tuning, "PARTIAL_BYTES", 2**14)
    parts = []
    attend_part = attention.attend_part
    monkeypatch.setattr(attention, "attend_part", lambda *a: (parts.append(a), attend_part(*a)))
    got = msa.prefill(q, q_idx, cache, **borders, **options)
    assert (len(parts) > 3) == (super_tiles and loop_order != "union")
    want = msa.attention(
        q, keys["k"], keys["v"], q_idx, keys["k_idx"], **borders,
        cu_seqlens_k=sequences.cu_seqlens_k, **options,
    )  # fmt: skip
    assert torch.equal(got.selection.indices, want.selection.indices)
    assert torch.equal(got.out, want.out) and torch.equal(got.lse, want.lse)


def test_batched_queries_are_packed_ones():
    q, q_idx, _, cache, _ = chunk()
    live = cache.lengths > 8
    cache = PagedKV(
        cache.k_pages, cache.v_pages, cache.k_idx_pages, cache.page_table[live], cache.lengths[live]
    )
    n, batch = 4, int(live.sum())
    q, q_idx = q[: n * batch], q_idx[: n * batch]
    options = {"config": CONFIG, "backend": "triton"}
    borders = range(0, n * batch + 1, n)
    packed = msa.prefill(q, q_idx, cache, cu_seqlens_q=borders, **options)
    batched = msa.prefill(q.unflatten(0, (batch, n)), q_idx.unflatten(0, (batch, n)), cache,
                          **options)  # fmt: skip
    assert batched.out.shape[:2] == (batch, n) == batched.lse.shape[:2]
    assert torch.equal(batched.out.flatten(0, 1), packed.out)
    decoded = msa.decode(q.unflatten(0, (batch, n)), q_idx.unflatten(0, (batch, n)), cache,
                         **options)  # fmt: skip
    assert torch.equal(decoded.selection.indices, packed.selection.indices)
    torch.testing.assert_close(decoded.out, batched.out, rtol=1e-5, atol=1e-5)


# -- pages as a matrix ----------------------------------------------------------------------------
def views(both, first=True):
    """The keys (or the values) of a tensor whose last dim holds both."""
    half = both.shape[-1] // 2
    return both[..., :half] if first else both[..., half:]


@pytest.mark.parametrize(
    ("pages", "sizes"),
    [
        (torch.empty(5, 8, 2, 32), (40, 64)),
        (views(torch.empty(5, 8, 2, 64)), (40, 96)),  # tokens before heads
        (views(torch.empty(5, 8, 2, 64), first=False), (40, 96)),
        (views(torch.empty(5, 2, 8, 64)).transpose(1, 2), (80, 32)),  # heads before tokens
        (views(torch.empty(5, 3, 2, 8, 64)[:, 1]).transpose(1, 2), (4 * 48 + 16, 32)),  # layers
        (torch.empty(5, 8, 32), (40, 32)),
        (torch.empty(5, 8, 1, 32).expand(5, 8, 3, 32), (40, 32)),
        (torch.empty(5, 8, 3, 24), None),  # a size that is no power of two
        (torch.empty(5, 8 * 64 + 16)[:, : 8 * 64].unflatten(1, (8, 64)), None),  # between tokens
        (torch.empty(5, 1, 2, 32).expand(5, 8, 2, 32), None),  # one token again and again
        (torch.empty(5, 8, 2, 32)[:0], None),
        (torch.empty(5 * 8 * 64 + 1)[1:].unflatten(0, (5, 8, 2, 32)), None),  # starts anywhere
        (torch.empty(5, 8, 2, 16 + 2)[..., :16], None),
    ],
)
def test_pages_are_a_matrix_if_they_lie_so(pages, sizes):
    assert matrix_sizes(pages) == sizes


@pytest.mark.parametrize("layout", ["tokens before heads", "heads before tokens", "layers"])
def test_a_row_and_a_column_lead_to_each_key(layout):
    """As `key_row` computes them."""
    shape = {"tokens before heads": (5, 8, 3, 64), "heads before tokens": (5, 3, 8, 64),
             "layers": (5, 2, 3, 8, 64)}[layout]  # fmt: skip
    both = torch.arange(float(torch.Size(shape).numel())).view(shape)
    pages = views(both[:, 1] if layout == "layers" else both, first=False)
    pages = pages if layout == "tokens before heads" else pages.transpose(1, 2)
    step_p, step_t, step_h = pages.stride()[:3]
    matrix = pages.as_strided(matrix_sizes(pages), (step_t, 1))
    for page, token, head in torch.cartesian_prod(*map(torch.arange, (5, 8, 3))).tolist():
        row = page * (step_p // step_t) + head * step_h // step_t + token
        column = head * step_h % step_t
        assert torch.equal(matrix[row, column : column + 32], pages[page, token, head])


# -- kernels for Hopper ---------------------------------------------------------------------------
def hopper_cache(pages=9):
    """Pages of the sizes that hopper kernels take: keys and values beside one another."""
    random = torch.Generator(DEVICE).manual_seed(0)
    both, k_idx = (
        torch.randn(shape, generator=random, device=DEVICE).bfloat16()
        for shape in ((pages, 2, 128, 256), (pages, 128, 128))
    )
    k, v = (views(both, first).transpose(1, 2) for first in (True, False))
    table = torch.arange(pages, dtype=torch.int32, device=DEVICE).flip(0)[None]
    return PagedKV(k, v, k_idx, table, torch.tensor([pages * 128 - 5], device=DEVICE))


@pytest.mark.skipif(
    kernel_choice.obstacle(kernel_choice.usual_call()) is not None, reason="needs a Hopper GPU"
)
@pytest.mark.parametrize("named", ["auto", "hopper"])
def test_hopper_kernels_read_pages(named):
    cache = hopper_cache()
    cache.k_idx_pages.round_()  # scores are exact
    q, q_idx = (torch.randn(600, n, 128, device=DEVICE).round().bfloat16() for n in (32, 2))
    got = msa.prefill(q, q_idx, cache, kernels=named)
    want = msa.prefill(q, q_idx, cache, kernels="portable")
    assert torch.equal(got.selection.indices, want.selection.indices)
    torch.testing.assert_close(got.out, want.out, rtol=2.0**-6, atol=2.0**-6)
