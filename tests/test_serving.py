"""msa.serving: the kernels as an engine calls them, against the float64 spec."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import msa

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
from msa import reference, serving  # noqa: E402
from msa.triton_impl.launch import INTERPRETED  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or Triton's interpreter"
)
BLOCK, GROUPS, GROUP, DIM = 16, 2, 3, 16
CONFIG = msa.MSAConfig(block_size=BLOCK, top_k=3, index_scale=1.0)


class Engine:
    """One layer's pages in an engine's layout, tables with stale columns, NaN in unused places."""

    def __init__(self, lengths, seed=0, spare=2, order="tokens first"):
        rng = np.random.default_rng(seed)
        self.lengths, blocks = lengths, [-(-n // BLOCK) for n in lengths]
        pages = sum(blocks) + spare
        free = list(rng.permutation(pages))
        stale = free[-1]
        self.table = np.full((len(lengths), max(blocks) + spare), stale, np.int32)
        shape = (pages, BLOCK, GROUPS, 2 * DIM)
        if order == "heads first":
            shape = (pages, GROUPS, BLOCK, 2 * DIM)
        both = np.full(shape, np.nan, np.float32)
        view = both if order == "tokens first" else both.swapaxes(1, 2)
        self.index = np.full((pages, BLOCK, DIM), np.nan, np.float32)
        for s, n in enumerate(lengths):
            for b in range(blocks[s]):
                page = self.table[s, b] = free.pop(0)
                tokens = min(BLOCK, n - b * BLOCK)
                view[page, :tokens] = rng.standard_normal((tokens, GROUPS, 2 * DIM))
                self.index[page, :tokens] = rng.integers(-3, 4, (tokens, DIM))
        both = torch.from_numpy(both).to(DEVICE)
        self.both = both if order == "tokens first" else both.transpose(1, 2)
        self.rng = rng

    def queries(self, *lead):
        q = self.rng.standard_normal((*lead, GROUPS * GROUP, DIM)).astype(np.float32)
        return q, self.rng.integers(-3, 4, (*lead, GROUPS, DIM)).astype(np.float32)

    def kv(self, **scales):
        return serving.KVPages(self.both[..., :DIM], self.both[..., DIM:], **scales)

    def spec(self, factor=1.0):
        """The cache of the spec, keys and values times a factor."""
        both = factor * self.both.cpu().numpy().astype(np.float64)
        lengths = np.array(self.lengths)
        return msa.PagedKV(both[..., :DIM], both[..., DIM:], self.index.astype(np.float64),
                           self.table, lengths)  # fmt: skip

    def index_pages(self):
        return serving.IndexPages(give(self.index))


def give(x):
    return torch.from_numpy(np.ascontiguousarray(x)).to(DEVICE)


def near(found, want):
    np.testing.assert_allclose(found.cpu().numpy(), want, rtol=3e-5, atol=3e-6)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("order", ["tokens first", "heads first"])
def test_a_decode_writes_into_memory_of_the_engine(n, named, order):
    engine = Engine([40, 0, 131, 5], order=order)
    q, q_idx = engine.queries(4, n)
    want = reference.decode_step(*(x.astype(np.float64) for x in (q, q_idx)), engine.spec(), CONFIG)
    table, rows = give(engine.table), None
    if named:  # the engine's table has a row for every request that it may have
        rows = torch.tensor([5, 0, 2, 6], device=DEVICE)
        wide = torch.full((8, 128, table.shape[1]), -7, dtype=torch.int32, device=DEVICE)
        wide[rows, 0] = table
        table = wide[:, 0]
    part = serving.DecodePart(table, give(np.array(engine.lengths)), n, rows)
    out = torch.full((4, n, GROUPS * GROUP, DIM), torch.nan, device=DEVICE)
    ids = torch.full((4, n, GROUPS, 3), 77, dtype=torch.int32, device=DEVICE)
    scores = serving.score(give(q_idx), engine.index_pages(), part, CONFIG, GROUPS * GROUP)
    found, chosen = serving.attend_scored(give(q), engine.kv(), part, CONFIG, scores, out, ids)
    assert found.data_ptr() == out.data_ptr() and chosen.data_ptr() == ids.data_ptr()
    near(out, want.out)
    live = np.array(engine.lengths) > 0
    assert (ids.cpu().numpy()[live].reshape(-1, GROUPS, 3) == want.selection.indices).all()
    assert (ids.cpu().numpy()[~live] == -1).all()
    again = serving.attend_given(give(q), engine.kv(), part, CONFIG, ids.flip(-1))
    near(again, want.out)
    assert (ids.cpu().numpy()[~live] == -1).all()


def prefill_of(engine, new, bounds):
    """Queries for new tokens of each sequence, what the spec gives for them, and their part."""
    borders = (0, *np.cumsum(new).tolist())
    q, q_idx = engine.queries(borders[-1])
    exact = msa.Sequences(borders, (0, *np.cumsum(engine.lengths).tolist()))
    args = (x.astype(np.float64) for x in (q, q_idx))
    want = reference.prefill_chunk(*args, engine.spec(), exact, CONFIG)
    lengths = give(np.array(engine.lengths))
    return q, q_idx, want, serving.PrefillPart.of(give(engine.table), lengths, borders, bounds)


@pytest.mark.parametrize("tables", ["exact", "bounds"])
@pytest.mark.parametrize("order", ["tokens first", "heads first"])
@pytest.mark.parametrize("loops", ["union", "kv_outer", "several tiles"])
def test_a_prefill_takes_lengths_from_the_device(tables, order, loops, monkeypatch):
    """The host knows bounds of the lengths only; a draft of a token more may have been rejected."""
    from msa.triton_impl import attention, tuning

    if loops == "several tiles":
        monkeypatch.setattr(tuning, "PARTIAL_BYTES", 2**15)
    else:
        monkeypatch.setattr(attention, "choose_order", lambda *_: loops)
    lengths, new = [40, 131, 5], [7, 30, 5]
    bounds = lengths if tables == "exact" else [57, 133, 38]
    engine = Engine(lengths, spare=3, order=order)
    q, q_idx, want, part = prefill_of(engine, new, bounds)
    out = torch.full((len(q), GROUPS * GROUP, DIM), torch.nan, device=DEVICE)
    ids = torch.full((len(q), GROUPS, 3), 77, dtype=torch.int32, device=DEVICE)
    for _ in range(2):  # the second layer makes no table
        made = set(part.sequences.tables)
        chosen = serving.select(give(q_idx), engine.index_pages(), part, CONFIG, ids)
        serving.attend_selected(give(q), engine.kv(), part, chosen, DIM**-0.5, out)
    assert made == set(part.sequences.tables) != set()
    assert (ids.cpu().numpy() == want.selection.indices).all()
    near(out, want.out)


@given(
    st.lists(st.tuples(st.integers(1, 70), st.integers(0, 70), st.integers(0, 20)), min_size=1,
             max_size=4).filter(lambda rows: any(new for _, new, _ in rows)),
    st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=8, deadline=None)
@example([(1, 0, 0), (33, 33, 15), (16, 1, 17)], 0)
def test_any_lengths_new_tokens_and_bounds_give_the_spec(rows, seed):
    lengths = [length for length, *_ in rows]
    new = [min(length, n) for length, n, _ in rows]
    bounds = [length + slack for length, _, slack in rows]
    engine = Engine(lengths, seed, spare=3)
    q, q_idx, want, part = prefill_of(engine, new, bounds)
    chosen = serving.select(give(q_idx), engine.index_pages(), part, CONFIG)
    out = serving.attend_selected(give(q), engine.kv(), part, chosen, DIM**-0.5)
    assert (chosen.indices.cpu().numpy() == want.selection.indices).all()
    near(out, want.out)


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_one_scale_for_all_pages(phase):
    """Scales of keys and values are numbers on the device, which are not read back."""
    engine = Engine([40, 131], spare=1)
    q, q_idx = engine.queries(2, 1)
    want = reference.decode_step(
        *(x.astype(np.float64) for x in (q, q_idx)), engine.spec(1.25), CONFIG
    )
    scale = torch.tensor(1.25, device=DEVICE)
    kv, lengths = engine.kv(k_scale=scale, v_scale=scale.reshape(1)), give(np.array([40, 131]))
    if phase == "decode":
        part = serving.DecodePart(give(engine.table), lengths, 1)
        scores = serving.score(give(q_idx), engine.index_pages(), part, CONFIG, GROUPS * GROUP)
        out, _ = serving.attend_scored(give(q), kv, part, CONFIG, scores)
    else:
        part = serving.PrefillPart.of(give(engine.table), lengths, (0, 1, 2), [40, 131])
        chosen = serving.select(give(q_idx[:, 0]), engine.index_pages(), part, CONFIG)
        out = serving.attend_selected(give(q[:, 0]), kv, part, chosen, DIM**-0.5)
    near(out.reshape(want.out.shape), want.out)


@pytest.mark.parametrize("scale", [None, 1.25])
def test_a_prefill_over_pages_of_8_bits_takes_lengths_from_the_device(scale):
    """They are widened first: what lies between a length and its bound must not get there."""
    engine = Engine([40, 131, 5], spare=3)
    engine.both = engine.both.to(torch.float8_e4m3fn)
    wide = engine.both.float() * (scale or 1.0)
    one = None if scale is None else torch.tensor(scale, device=DEVICE)
    kv = engine.kv(k_scale=one, v_scale=one)
    engine.both = wide
    q, q_idx, want, part = prefill_of(engine, [7, 30, 5], [57, 133, 38])
    chosen = serving.select(give(q_idx), engine.index_pages(), part, CONFIG)
    assert (chosen.indices.cpu().numpy() == want.selection.indices).all()
    out = serving.attend_selected(give(q).half(), kv, part, chosen, DIM**-0.5)
    np.testing.assert_allclose(out.float().cpu().numpy(), want.out, rtol=2e-3, atol=4e-3)


def test_steps_of_equal_borders_are_not_the_same():
    """Else the tables of the step before would be taken."""
    table = torch.zeros(1, 1, dtype=torch.int32)
    one, two = (serving.PrefillPart.of(table, torch.tensor([n]), (0, 2), [9]) for n in (9, 8))
    assert one.sequences != two.sequences and len({one.sequences, two.sequences}) == 2


def test_one_scale_alone_is_refused():
    engine = Engine([5])
    with pytest.raises(ValueError, match="k_scale and v_scale must be given together"):
        replace(engine.kv(), k_scale=torch.ones(()))


# -- compiled before the first request -------------------------------------------------------------
def test_warm_up_makes_calls_of_all_kinds(monkeypatch):
    from msa import warming

    monkeypatch.setattr(warming, "PROMPTS", ((1, 0), (40, 20), (5, 500)))  # the last has no room
    shapes = msa.ServingShapes(6, 2, 3, head_dim=16, index_dim=16, dtype="float32",
                               new_tokens=(1, 2), columns=8)  # fmt: skip
    assert msa.warm_up(shapes, CONFIG, DEVICE) == 3 * 2 + 2


@pytest.mark.parametrize(("changes", "error", "says"), [
    ({"heads": 5}, ValueError, "multiple of Hkv = 2"),
    ({"most_sequences": 0}, ValueError, "shapes.most_sequences must be at least 1, got 0"),
    ({"new_tokens": (1, 0)}, ValueError, "shapes.new_tokens must be at least 1, got 0"),
    ({"dtype": "float64"}, ValueError, "shapes.dtype must be float16, .*got 'float64'"),
    ({"eight_bits": ("v",)}, ValueError, "shapes.eight_bits must hold kv or k_idx, got 'v'"),
])  # fmt: skip
def test_bad_shapes_are_refused(changes, error, says):
    shapes = replace(msa.ServingShapes(6, 2, 3), **changes)
    with pytest.raises(error, match=says):
        msa.warm_up(shapes, CONFIG, DEVICE)
    with pytest.raises(TypeError, match="shapes must be a msa"):
        msa.warm_up({})


def test_warm_up_of_a_layer_writes_nothing_into_the_engine():
    engine = Engine([40, 131])
    pages = engine.kv(), engine.index_pages()
    before = [x.clone() for x in (engine.both, pages[1].k_idx)]
    table = give(np.zeros((4, 24), np.int32))[:, ::2]
    ran = serving.warm_up_layer(
        *pages, table, GROUPS * GROUP, CONFIG, (torch.float32, torch.float32), batches=(1, 4),
        queries=(1, 3), prompts=((7, 0), (20, 30), (1, 999)), rows=True,
    )  # fmt: skip
    assert ran == 2 * 2 + 2
    for array, old in zip((engine.both, pages[1].k_idx), before):
        torch.testing.assert_close(array, old, rtol=0, atol=0, equal_nan=True)


def test_an_engine_is_warmed_up_once_and_not_in_a_capture(monkeypatch):
    from msa.integrations import engine_checks

    made, said, capturing = [], [], [True]
    monkeypatch.setattr(engine_checks.checks, "is_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(engine_checks, "WARM", set())

    def warm(key="layer"):
        return engine_checks.warm_up_once(
            key, lambda: made.append(key), lambda *line: said.append(line)
        )

    assert not warm() and not made
    capturing[0] = False
    assert warm() and warm() and made == ["layer"] and len(said) == 1
    monkeypatch.setenv("MSA_WARM_UP", "0")
    assert warm("another") and made == ["layer"]


@pytest.mark.parametrize(("capability", "says"), [
    (None, "a GPU of compute capability 9.0 is needed, got none"),
    ((10, 0), "the GPU must have compute capability 9.0, got 10.0"),
])  # fmt: skip
def test_plug_ins_refuse_other_gpus(monkeypatch, capability, says):
    from msa.integrations import engine_checks

    monkeypatch.setattr(engine_checks.checks, "is_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with pytest.raises(RuntimeError, match=f"{re.escape(says)}.*unset MSA_SGLANG"):
        engine_checks.check_gpu("SGLang")


def test_widened_pages_are_zero_behind_a_sequences_end():
    """The hopper walk reads whole blocks, and the host knows only a bound of where they end."""
    from msa.triton_impl.paged_keys import Pages
    from msa.triton_impl.wide_pages import widen_pages

    engine = Engine([40, 5], spare=3)
    pages = engine.both.to(torch.float8_e4m3fn)
    ones = torch.ones((), device=DEVICE).expand(len(pages), GROUPS)
    part = serving.PrefillPart.of(
        give(engine.table), give(np.array(engine.lengths)), (0, 1, 2), [57, 38]
    )
    ids = torch.tensor([0, 1, 2], dtype=torch.int32, device=DEVICE).expand(2, GROUPS, 3)
    chosen = serving.given(ids, part, CONFIG)
    k, v = pages[..., :DIM], pages[..., DIM:]
    wide = widen_pages(k, v, Pages(give(engine.table), ones, ones), chosen, torch.float16)
    for found, narrow in zip(wide, (k, v)):
        rows = found.float().flatten(0, 1)  # blocks of 57 tokens, then of 38
        want = narrow.float()[give(engine.table[0, :3]).long()].flatten(0, 1)[:40]
        torch.testing.assert_close(rows[:40], want, rtol=0, atol=0)
        assert (rows[40:48] == 0).all() and (rows[64 + 5 : 80] == 0).all()
