"""Sizes at and beyond the edges of what the kernels count: blocks per query, heads, sequences.

Index scores are exact integers and all different, except for intended ties, so a count in too few
bits shows. Results are compared with the torch backend. Loops over blocks take long in the
interpreter, so the greatest sizes run on a GPU only.
"""

from __future__ import annotations

import gc
import importlib

import numpy as np
import pytest
import torch

import msa
import msa.ops
from msa import checks
from msa.dispatch import load_backend
from msa.ir import Selection, Sequences
from msa.triton_impl import attention, page_attention, selection, tile_union, topk, tuning
from msa.triton_impl.tuning import TileConfig

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [pytest.mark.gpu] * CUDA
TORCH, TRITON = load_backend("torch"), load_backend("triton")
LARGEST = checks.KERNEL_TOP_K
BLOCK = 16
SMALL = TileConfig(rows=16, keys=16, warps=1, stages=1)
TOO_MANY = (
    rf"top_k must be at most {LARGEST} for backend='triton', got {LARGEST + 1}: "
    "use backend='torch'"
)


def index_tensors(n_q, n_k, groups=1, seed=0):
    """Products are a permutation of 0 ... n_k - 1, for every second query and group times -1."""
    random = torch.Generator().manual_seed(seed)
    q_idx, k_idx = torch.zeros(n_q, groups, BLOCK), torch.zeros(n_k, BLOCK)
    q_idx[:, :, 0] = 1 - 2 * (torch.arange(n_q * groups).view(n_q, groups) % 2)
    k_idx[:, 0] = torch.randperm(n_k, generator=random).float()
    return q_idx.to(DEVICE), k_idx.to(DEVICE)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def random_selection(sequences, groups, top_k, seed=0):
    """Each query's own block and up to k - 1 others before it, in canonical form."""
    rng = np.random.default_rng(seed)
    rows = np.full((sequences.total_q, groups, top_k), -1, np.int32)
    for i, position in enumerate(sequences.positions()):
        own = position // BLOCK
        for r in range(groups):
            others = rng.permutation(own)[: rng.integers(top_k // 2, top_k)]
            row = np.sort(np.append(others, own))
            rows[i, r, : len(row)] = row
    chosen = Selection(torch.from_numpy(rows).to(DEVICE), sequences, BLOCK)
    chosen.validate()
    return chosen


# -- blocks per query -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fused", "top_k"),
    [(False, k) for k in (127, 128, 255, 256, 257, 300, LARGEST)]
    + [(True, k) for k in ((256, 257, LARGEST) if CUDA else (256, 257))],
)
def test_selection_around_the_borders_of_narrow_counts(fused, top_k):
    n_q, n_k = 2, (top_k + 25) * BLOCK
    q_idx, k_idx = index_tensors(n_q, n_k)
    sequences, config = Sequences.one(n_q, n_k), msa.MSAConfig(BLOCK, top_k)
    want = TORCH.select_fused(q_idx, k_idx, sequences, config).indices
    if fused:
        got = selection.select_portable(q_idx, k_idx, sequences, config, tile=SMALL)
    else:
        scores = TORCH.score_blocks(q_idx, k_idx, sequences, config)
        got = TRITON.select_blocks(scores, config)
    got.validate()
    assert torch.equal(got.indices, want)


def test_many_places_are_cut_back(monkeypatch):
    """One program scans 540 blocks, rising scores in equal pairs; its buffer has room for 512."""
    monkeypatch.setattr(selection, "PROGRAMS", 1)
    selection.plan_scan.cache_clear()
    k_idx = (torch.arange(540) // 2).float().repeat_interleave(BLOCK)[:, None].to(DEVICE)
    q_idx, sequences = torch.ones(1, 1, 1, device=DEVICE), Sequences.one(1, len(k_idx))
    config = msa.MSAConfig(BLOCK, 300, sink_blocks=1)
    assert selection.capacity_for(config) == 512
    got = selection.select_portable(q_idx, k_idx, sequences, config, tile=SMALL).indices
    selection.plan_scan.cache_clear()
    assert torch.equal(got, TORCH.select_fused(q_idx, k_idx, sequences, config).indices)


@pytest.mark.parametrize("order", ["auto", "kv_outer", "union"])
@pytest.mark.parametrize("top_k", [70, 257, LARGEST] if CUDA else [70])
def test_attention_over_many_blocks(top_k, order):
    """Attention and gradients of two queries; their union has blocks of one and of both."""
    n_q, n_k = 2, (top_k + 10) * BLOCK
    chosen = random_selection(Sequences.one(n_q, n_k), 1, top_k)
    results = []
    for backend, options in ((TORCH, {}), (TRITON, {"loop_order": order})):
        q, k, v = (
            normal(n, h, 16, seed=seed).requires_grad_()
            for seed, (n, h) in enumerate(((n_q, 2), (n_k, 1), (n_k, 1)))
        )
        output = backend.attend_selection(q, k, v, chosen, 0.3, **options)
        loss = output.out.square().sum() + output.lse.sum()
        gradients = torch.autograd.grad(loss, (q, k, v)) if order != "kv_outer" else ()
        results.append((output.out, output.lse, *gradients))
    for want, got in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("top_k", [70, 257, LARGEST] if CUDA else [70])
def test_the_alignment_loss_over_many_blocks(top_k):
    n_q, n_k = 1, (top_k + 10) * BLOCK
    sequences, config = Sequences.one(n_q, n_k), msa.MSAConfig(BLOCK, top_k)
    chosen = random_selection(sequences, 1, top_k)
    results = []
    for backend in (TORCH, TRITON):
        q, k = normal(n_q, 2, 16, seed=1), normal(n_k, 1, 16, seed=2)
        q_idx, k_idx = normal(n_q, 1, 16, seed=3), normal(n_k, 16, seed=4)
        q_idx.requires_grad_()
        k_idx.requires_grad_()
        loss = backend.align_index(q, k, q_idx, k_idx, chosen, sequences, config)
        results.append((loss, *torch.autograd.grad(loss, (q_idx, k_idx))))
    for want, got in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def cache_of(lengths, columns, groups=1, seed=0):
    """Pages in random order, index keys whose products are all different."""
    random = torch.Generator().manual_seed(seed)
    pages = len(lengths) * columns
    k, v = normal(2, pages, BLOCK, groups, 16, seed=seed)
    k_idx = index_tensors(1, pages * BLOCK, seed=seed)[1].view(pages, BLOCK, BLOCK)
    table = torch.randperm(pages, generator=random).view(len(lengths), columns).int().to(DEVICE)
    return msa.PagedKV(k, v, k_idx, table, torch.tensor(lengths, dtype=torch.int32, device=DEVICE))


@pytest.mark.parametrize(
    ("most", "top_k", "sink", "local"),
    [(1, 3, 0, 1), (1, 5, 1, 2)]
    + [(128, 129, 0, 1), (128, 130, 0, 1), (128, 131, 1, 1), (128, 257, 2, 3)] * CUDA,
)
def test_decoding_over_many_blocks(most, top_k, sink, local, monkeypatch):
    """A full sequence, an empty slot of the batch, and a sequence with fewer blocks than places;
    two new tokens each."""
    monkeypatch.setattr(page_attention, "MOST_PLACES", most)
    columns = top_k + 4
    cache = cache_of([columns * BLOCK - 3, 0, (top_k // 2) * BLOCK + 1], columns)
    config = msa.MSAConfig(BLOCK, top_k, sink_blocks=sink, local_blocks=local)
    q, (q_idx, _) = normal(3, 2, 2, 16, seed=5), index_tensors(3, 1, 2)
    q_idx = q_idx.view(3, 2, 1, BLOCK)
    want, got = (
        msa.decode(q, q_idx, cache, config=config, backend=name) for name in ("torch", "triton")
    )
    assert torch.equal(got.selection.indices, want.selection.indices)
    torch.testing.assert_close(got.out, want.out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.lse, want.lse, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.large
def test_decoding_with_the_most_blocks():
    """The kernel of `block_topk` selects first, from a table with more than LARGEST blocks."""
    cache = cache_of([(LARGEST + 5) * BLOCK], LARGEST + 5)
    config = msa.MSAConfig(BLOCK, LARGEST)
    q, (q_idx, _) = normal(1, 1, 1, 16, seed=5), index_tensors(1, 1)
    q_idx = q_idx.view(1, 1, 1, BLOCK)
    want, got = (
        msa.decode(q, q_idx, cache, config=config, backend=name) for name in ("torch", "triton")
    )
    assert torch.equal(got.selection.indices, want.selection.indices)
    torch.testing.assert_close(got.out, want.out, rtol=1e-4, atol=1e-5)


def too_many():
    """Every function of the triton backend refuses one block per query too many."""
    config, sequences = msa.MSAConfig(BLOCK, LARGEST + 1), Sequences.one(1, 1)
    q, k, v = (torch.ones(1, 1, 16, device=DEVICE) for _ in range(3))
    k_idx, cache = k[:, 0], cache_of([1], 1)
    ids = torch.full((1, 1, LARGEST + 1), -1, dtype=torch.int32, device=DEVICE)
    ids[..., 0] = 0
    chosen = Selection(ids, sequences, BLOCK)
    scores = TORCH.score_blocks(q, k_idx, sequences, config)
    index = TORCH.reverse_selection(chosen)
    schedule = TORCH.schedule_chunks(index, 4)
    partials = TORCH.attend_chunks(q, k, v, schedule, 1.0)
    new, options = q[None], {"config": config, "backend": "triton"}
    calls = {
        "attention": lambda: msa.attention(q, k, v, q, k_idx, **options),
        "select": lambda: msa.select(q, k_idx, **options),
        "sparse_attention": lambda: msa.sparse_attention(q, k, v, chosen, backend="triton"),
        "align_index": lambda: msa.align_index(q, k, q, k_idx, chosen, backend="triton"),
        "decode": lambda: msa.decode(new, new, cache, **options),
        "lower": lambda: msa.lower(q, k, v, q, k_idx, **options),
        "attend": lambda: TRITON.attend(q, k, v, q, k_idx, sequences, config),
        "attend_selection": lambda: TRITON.attend_selection(q, k, v, chosen, 1.0),
        "select_blocks": lambda: TRITON.select_blocks(scores, config),
        "select_fused": lambda: TRITON.select_fused(q, k_idx, sequences, config),
        "reverse_selection": lambda: TRITON.reverse_selection(chosen),
        "attend_chunks": lambda: TRITON.attend_chunks(q, k, v, schedule, 1.0),
        "combine_partials": lambda: TRITON.combine_partials(partials),
        "unite_tiles": lambda: TRITON.unite_tiles(chosen, 8),
        "align_index of the backend": lambda: TRITON.align_index(
            q, k, q, k_idx, chosen, sequences, config
        ),
        "decode_step": lambda: TRITON.decode_step(new, new, cache, config),
    }
    if CUDA:
        calls |= {
            "operator of attention": lambda: msa.ops.attention(q, k, v, q, k_idx, config=config),
            "operator of selection": lambda: msa.ops.select_blocks(q, k_idx, config=config),
            "operator of a choice": lambda: msa.ops.sparse_attention(q, k, v, ids, block_size=16),
            "operator of the loss": lambda: msa.ops.align_index(q, k, q, k_idx, ids, config=config),
            "operator of decoding": lambda: msa.ops.decode(new, new, cache, config),
        }
    return calls


@pytest.mark.parametrize("entry", too_many())
def test_more_blocks_than_there_is_room_for(entry):
    with pytest.raises(ValueError, match=TOO_MANY):
        too_many()[entry]()


def test_the_warm_up_form_has_as_many_blocks_as_it_likes():
    """The loss over all visible tokens reads no top_k."""
    q, config = torch.ones(1, 1, 16, device=DEVICE), msa.MSAConfig(BLOCK, LARGEST + 1)
    loss = msa.align_index(q, q, q, q[:, 0], config=config, backend="triton")
    assert float(loss) == 0


def test_counts_have_room_for_the_largest():
    """What `keep_best` packs: keys above the threshold, and tied ones of the longest row."""
    above, bits = LARGEST + selection.SLACK, topk.ABOVE_BITS.value
    assert above < 2**bits
    assert max(2**17, selection.WIDEST, 2 * LARGEST) << bits < 2**31


# -- unions, heads, sequences ---------------------------------------------------------------------
def test_a_union_of_thousands_of_blocks():
    """Unions, and their reverse index, in which a tile takes the place of a query."""
    tile_size, sequences = 31, Sequences.one(32, 2500 * BLOCK)
    chosen = random_selection(sequences, 1, 200)
    want, got = (backend.unite_tiles(chosen, tile_size) for backend in (TORCH, TRITON))
    assert want.block_ids.shape[-1] > 2000
    for name in ("starts", "stops", "block_ids", "row_masks"):
        assert torch.equal(getattr(got, name).long(), getattr(want, name).long()), name
    union = tile_union.split_tiles(chosen, tile_size)
    edges = attention.reverse_union(union, chosen, 64).schedule.reverse_index
    ids = union.block_ids
    assert int(edges.row_offsets[-1]) == int((ids >= 0).sum()) == int((want.block_ids >= 0).sum())


@pytest.mark.parametrize("top_k", [3, 70])
def test_a_short_and_a_long_way_to_a_union(top_k, monkeypatch):
    """Ragged sequences; both kernels for the same tiles."""
    sequences = Sequences((0, 0, 5, 5, 38), (0, 40, 300, 400, 400 + 90 * BLOCK))
    chosen = random_selection(sequences, 3, top_k)
    want = TORCH.unite_tiles(chosen, 8)
    for most in (0, 2**20):
        monkeypatch.setattr(tile_union, "PAIRED", most)
        got = TRITON.unite_tiles(chosen, 8)
        assert torch.equal(got.block_ids, want.block_ids)
        assert torch.equal(got.row_masks, want.row_masks)


@pytest.mark.parametrize(
    ("groups", "group", "sequences"), [(3, 5, 2), (5, 1, 3), (1, 24, 2), (1, 1, 20)]
)
def test_heads_that_are_no_powers_of_two_and_many_sequences(groups, group, sequences):
    """Out, the selection, the loss and all gradients equal those of torch."""
    n_q = [1 + (3 * s) % 5 for s in range(sequences)]
    n_k = [n + (29 * s) % 40 for s, n in enumerate(n_q)]
    borders = [[0, *np.cumsum(n).tolist()] for n in (n_q, n_k)]
    t, n = borders[0][-1], borders[1][-1]
    q_idx, k_idx = index_tensors(t, n, groups)
    drawn = normal(t, groups * group, 12), normal(n, groups, 12), normal(n, groups, 8), q_idx, k_idx
    config, results = msa.MSAConfig(BLOCK, 2, index_scale=0.01), []
    for name in ("torch", "triton"):
        tensors = [x.clone().requires_grad_() for x in drawn]
        output = msa.attention(
            *tensors, cu_seqlens_q=borders[0], cu_seqlens_k=borders[1], config=config, align=True,
            backend=name,
        )  # fmt: skip
        loss = output.out.square().sum() + output.lse.sum() + output.kl
        ids = output.selection.indices.float()
        results.append((ids, output.out, output.lse, *torch.autograd.grad(loss, tensors)))
    for want, got in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# -- memory of the backward -----------------------------------------------------------------------
def test_gradients_by_super_tiles(monkeypatch):
    """Sequences without queries before, between and behind others; the same bits twice (R19)."""
    borders = {
        "cu_seqlens_q": (0, 0, 20, 20, 33, 40, 40),
        "cu_seqlens_k": (0, 17, 80, 90, 120, 127, 140),
    }
    drawn = [normal(*shape) for shape in ((40, 4, 16), (140, 2, 16), (140, 2, 12))]
    index, config = index_tensors(40, 140, 2), msa.MSAConfig(BLOCK, 3)
    sizes, held = [], []

    def gradients(name):
        tensors = [x.clone().requires_grad_() for x in drawn]
        output = msa.attention(*tensors, *index, config=config, backend=name, **borders)
        loss = output.out.square().sum() + output.lse.cos().sum()
        return torch.autograd.grad(loss, tensors)

    keys = importlib.import_module("msa.triton_impl.key_gradients")
    part, add_up = attention.gradients_of_part, keys.sum_items

    def noted(tensors, *args, **options):
        sizes.append(len(tensors[0]))
        return part(tensors, *args, **options)

    def held_by(parts, *args, **options):
        held.append(parts.nbytes)
        return add_up(parts, *args, **options)

    monkeypatch.setattr(attention, "gradients_of_part", noted)
    monkeypatch.setattr(keys, "sum_items", held_by)
    whole = gradients("triton")
    assert sizes == [40]
    monkeypatch.setattr(tuning, "KEY_TILES", 2)
    monkeypatch.setattr(tuning, "PARTIAL_BYTES", 250_000)  # two tiles
    sizes.clear()
    held.clear()
    cut, again = gradients("triton"), gradients("triton")
    assert sizes == 2 * [20, 20]
    one_each = 4 * 2 * BLOCK * (16 + 12) * Sequences(*borders.values()).cu_blocks(BLOCK)[-1]
    assert max(a + b for a, b in zip(held[::2], held[1::2])) <= 250_000 + one_each
    for want, *got in zip(gradients("torch"), whole, cut, again):
        for x in got:
            torch.testing.assert_close(x, want, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(cut, again))


@pytest.mark.parametrize(("tokens", "super_tiles"), [(2**17, 1), (2**18, 2), (2**20, 8)])
def test_when_the_backward_is_cut(tokens, super_tiles):
    """One super-tile up to 128K tokens in the usual shape, so nothing is slower there."""
    ids = torch.empty((tokens, 4, 16), dtype=torch.int32, device="meta")
    chosen = Selection(ids, Sequences.one(tokens, tokens), 128)
    size = attention.gradient_tile(chosen, 64, 4, 256)
    assert -(-tokens // size) == super_tiles


@pytest.mark.gpu
@pytest.mark.large
def test_a_backward_over_256k_tokens_keeps_to_its_bound():
    """The memory that `msa.triton_impl.attention` states, and that of the three gradients."""
    tokens, heads, groups, dim, top_k = 2**18, 64, 4, 128, 16
    q, k, v = (
        torch.randn(tokens, h, dim, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        for h in (heads, groups, groups)
    )
    own = torch.arange(tokens, dtype=torch.int32, device="cuda")[:, None] // 128
    ids = own + torch.arange(1 - top_k, 1, dtype=torch.int32, device="cuda")  # the last 16 blocks
    ids = torch.where(ids < 0, 2**30, ids).sort(1)[0]
    ids = torch.where(ids == 2**30, -1, ids)[:, None].repeat(1, groups, 1)
    chosen = Selection(ids, Sequences.one(tokens, tokens), 128)
    out = TRITON.attend_selection(q, k, v, chosen, 0.1).out
    d_out = torch.randn_like(out)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = torch.autograd.grad(out, (q, k, v), d_out)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    size = attention.gradient_tile(chosen, heads, groups, 2 * dim)
    edges = size * groups * top_k
    bound = sum(x.nbytes for x in gradients) + tuning.PARTIAL_BYTES
    bound += 2 * 4 * tokens * groups * 2 * dim + 2 * 32 * edges + 4 * 2 * tokens * heads
    bound += 2**28
    print(f"{extra / 2**30:.2f} GiB, {bound / 2**30:.2f} allowed")
    assert extra <= bound
    assert all(x.isfinite().all() for x in gradients)
