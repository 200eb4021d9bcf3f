"""The SGLang plug-in in SGLang's own loader and hooks, from its wheel (skipped without it)."""

from __future__ import annotations

import os

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
import msa  # noqa: E402
from benchmarks import engine_files, sglang_files  # noqa: E402
from tests.plugin_parts import entry_points_of_the_project, needs  # noqa: E402

pytestmark = needs("sglang")
HEADS, GROUPS, DIM, TOP_K = 8, 2, 32, 4


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    wheels, into = os.environ[engine_files.VARIABLE], tmp_path_factory.mktemp("sglang")
    with sglang_files.loaded(engine_files.unpack("sglang", wheels, into), TOP_K) as made:
        engine_files.untuned(*made.kernels)
        yield made


@pytest.fixture
def plugged(engine, tmp_path, monkeypatch):
    """SGLang's functions after its loader ran the project's entry point."""
    monkeypatch.setenv("MSA_SGLANG", "1")
    entry_points_of_the_project(tmp_path, monkeypatch, {"sglang": "0.5.23"})
    originals = vars(engine.functions) | {}
    engine.plug_in()
    yield engine
    vars(engine.functions).update(originals)
    sys_registry().reset()


def sys_registry():
    import sys

    return sys.modules["sglang.srt.plugins.hook_registry"].HookRegistry


def slots_of(lengths, seed=0):
    """Slots in pages of any order, NaN behind each request, rows of requests out of order."""
    rng = torch.Generator().manual_seed(seed)
    blocks = [-(-n // 128) for n in lengths]
    pages = sum(blocks) + 2
    free = (torch.randperm(pages - 1, generator=rng) + 1).tolist()  # page 0 is SGLang's for padding
    shape = pages * 128, GROUPS, DIM
    k, v = (torch.full(shape, torch.nan) for _ in range(2))
    k_idx = torch.full((pages * 128, 1, DIM), torch.nan)
    req_to_token = torch.full((len(lengths) + 3, 128 * (max(blocks) + 2)), 128, dtype=torch.int32)
    rows = torch.randperm(len(lengths) + 3, generator=rng)[: len(lengths)]
    for s, n in enumerate(lengths):
        for b in range(blocks[s]):
            first, some = 128 * free.pop(0), min(128, n - 128 * b)
            req_to_token[rows[s], 128 * b : 128 * b + 128] = first + torch.arange(128)
            k[first : first + some] = torch.randn(some, GROUPS, DIM, generator=rng)
            v[first : first + some] = torch.randn(some, GROUPS, DIM, generator=rng)
            k_idx[first : first + some] = torch.randn(some, 1, DIM, generator=rng)
    return sglang_files.Slots(k, v, k_idx, req_to_token, rows, list(lengths))


def spec(slots, new, q, q_idx):
    """Output and ids of the spec."""
    pages = [x.double().numpy().reshape(-1, 128, *x.shape[1:]) for x in (slots.k, slots.v)]
    index = slots.k_idx.double().numpy().reshape(-1, 128, DIM)
    table = (slots.req_to_token[slots.slot_ids][:, ::128] // 128).numpy()
    lengths = torch.tensor(slots.lengths).numpy()
    borders = (0, *torch.tensor(new).cumsum(0).tolist())
    found = msa.prefill(
        q.double().numpy(), q_idx.double().numpy(), msa.PagedKV(*pages, index, table, lengths),
        cu_seqlens_q=borders, config=msa.MSAConfig(128, TOP_K, index_scale=1.0),
        backend="reference",
    )  # fmt: skip
    return torch.from_numpy(found.out).float(), torch.from_numpy(found.selection.indices)


def queries(tokens, seed=1):
    rng = torch.Generator().manual_seed(seed)
    return (torch.randn(tokens, heads, DIM, generator=rng) for heads in (HEADS, GROUPS))


def test_decode_by_the_hook_is_the_spec(plugged):
    slots = slots_of([130, 1000, 1, 640])
    q, q_idx = queries(4)
    ids = torch.empty(GROUPS, 4, TOP_K, dtype=torch.int32)
    out = plugged.decode(slots, q, q_idx, topk_out=ids)
    want, chosen = spec(slots, [1] * 4, q, q_idx)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=3e-6)
    assert torch.equal(ids.transpose(0, 1), chosen)
    again = plugged.decode(slots, q, torch.full_like(q_idx, torch.nan), cached_topk_idx=ids)
    torch.testing.assert_close(again, want, rtol=1e-5, atol=3e-6)
    scaled = plugged.decode(slots, q, q_idx, k_scale=1.0, v_scale=2.0)
    torch.testing.assert_close(scaled, 2 * want, rtol=1e-5, atol=6e-6)


@pytest.mark.parametrize("new", [[30, 2, 140], [3, 3, 3]])  # any lengths; drafts to verify
def test_prefill_by_the_hook_is_the_spec(plugged, new):
    slots = slots_of([700, 258, 140])
    q, q_idx = queries(sum(new))
    out, ids = plugged.prefill(slots, new, q, q_idx)
    want, chosen = spec(slots, new, q, q_idx)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=3e-6)
    assert torch.equal(ids.transpose(0, 1), chosen)
    blind = torch.full_like(q_idx, torch.nan)
    again, _ = plugged.prefill(slots, new, q, blind, cached_topk_idx=ids)
    torch.testing.assert_close(again, want, rtol=1e-5, atol=3e-6)


def test_decode_of_sglang_is_the_same(engine):
    """SGLang's own kernels, for 16-bit numbers in Triton's interpreter."""
    slots = slots_of([130, 1000, 640])
    for name in ("k", "v", "k_idx"):
        setattr(slots, name, getattr(slots, name).nan_to_num(100.0).half())
    q, q_idx = (x.half() for x in queries(3))
    ids = torch.empty(GROUPS, 3, TOP_K, dtype=torch.int32)
    theirs = engine.decode(slots, q, q_idx, topk_out=ids)
    want, chosen = spec(slots, [1] * 3, q, q_idx)
    assert torch.equal(ids.transpose(0, 1).sort(-1).values, chosen.sort(-1).values)
    torch.testing.assert_close(theirs.float(), want, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("others", "says"), [
    ({"hisparse_swap_in_fn": print}, "HiSparse must be off"),
    ({"indexer_cp": print}, "context parallel indexing must be off"),
    ({"dense_main_attn_fn": print}, "dense attention over selected pages must be off"),
])  # fmt: skip
def test_what_cannot_be_served_stops_a_call(plugged, others, says):
    q, q_idx = queries(1)
    with pytest.raises(RuntimeError, match=f"cannot serve this: {says}.*unset MSA_SGLANG"):
        plugged.decode(slots_of([5]), q, q_idx, **others)


def test_without_the_variable_nothing_is_wrapped(engine, tmp_path, monkeypatch):
    monkeypatch.delenv("MSA_SGLANG", raising=False)
    entry_points_of_the_project(tmp_path, monkeypatch, {"sglang": "0.5.23"})
    before = engine.functions.minimax_sparse_decode
    engine.plug_in()
    assert engine.functions.minimax_sparse_decode is before


@pytest.mark.parametrize(("version", "says"), [
    ("0.5.24", "SGLang must be 0.5.23 for MSA_SGLANG=1, got 0.5.24"),
])  # fmt: skip
def test_another_version_ends_the_process(engine, tmp_path, monkeypatch, version, says):
    """SGLang would only log an exception, and serve with its own kernels."""
    monkeypatch.setenv("MSA_SGLANG", "1")
    entry_points_of_the_project(tmp_path, monkeypatch, {"sglang": version})
    with pytest.raises(SystemExit, match=says):
        engine.plug_in()
