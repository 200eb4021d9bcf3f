"""The vLLM plug-in around vLLM's own files, which are taken from its wheel (skipped without it)."""

from __future__ import annotations

import importlib
import os
import re
import types

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
from benchmarks import engine_files, vllm_files  # noqa: E402
from benchmarks.vllm_files import Batch  # noqa: E402
from tests.plugin_parts import entry_points_of_the_project, needs  # noqa: E402

pytestmark = needs("vllm")
HEADS, GROUPS, DIM, TOP_K = 8, 2, 32, 4


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    wheels, into = os.environ[engine_files.VARIABLE], tmp_path_factory.mktemp("vllm")
    with vllm_files.loaded(engine_files.unpack("vllm", wheels, into)) as made:
        engine_files.untuned(made.topk)
        yield made


class Step:
    """A layer with pages in one of vLLM's orders: NaN behind each sequence, stale columns."""

    def __init__(self, engine, batch, order="LBNHC", sinks=0, heads=HEADS, groups=GROUPS):
        rng = torch.Generator().manual_seed(sum(batch.lengths))
        self.engine, self.batch, self.tokens = engine, batch, sum(batch.new)
        layer = engine.layer(heads, groups, DIM, TOP_K, 512, sinks=sinks, device="cpu")
        self.layer = layer
        blocks = [-(-max(n, 1) // 128) for n in batch.lengths]
        pages = sum(blocks) + 3
        free = (
            torch.randperm(pages - 1, generator=rng) + 1
        ).tolist()  # page 0 is vLLM's null block
        self.table = torch.full((len(blocks), max(blocks) + 2), free[-1], dtype=torch.int32)
        self.table[:, -1] = 0
        for s, n in enumerate(blocks):
            self.table[s, :n] = torch.tensor([free.pop(0) for _ in range(n)])

        def numbers(*shape):
            return torch.randn(shape, generator=rng)

        kv, keys = numbers(pages, groups, 128, 2 * DIM), numbers(pages, 1, 128, DIM)
        if order == "LBNHC":
            kv = numbers(pages, 128, groups, 2 * DIM).transpose(1, 2)
        elif order == "BLHNC":
            kv = numbers(pages, 3, groups, 128, 2 * DIM)[:, 1]
            keys = numbers(pages, 2, 1, 128, DIM)[:, 1]
        unused = torch.ones(pages, 128, dtype=torch.bool)
        for s, n in enumerate(batch.lengths):
            for b in range(-(-n // 128)):
                unused[self.table[s, b], : n - 128 * b] = False
        # vLLM itself reads index keys behind a sequence's end, so these are large, not NaN
        kv.masked_fill_(unused[:, None, :, None], torch.nan)
        keys.masked_fill_(unused[:, None, :, None], 1e4)
        layer.kv_cache = kv
        layer.indexer.index_cache.bind_kv_cache(keys)
        self.q = numbers(self.tokens, heads * DIM)
        self.q_idx = numbers(self.tokens, groups * DIM)

    def run(self):
        self.layer.topk_indices_buffer.fill_(-7)
        self.engine.build(self.layer, self.batch, self.table)
        out = self.layer.run(self.q, self.q_idx)
        return out.clone(), self.layer.topk_indices_buffer[: self.tokens].sort(-1).values


BATCHES = {
    "decodes": Batch((1, 1, 1), (130, 1000, 5)),
    "decodes, one padded": Batch((1, 1, 1), (700, 1000, 0)),
    "three tokens each": Batch((3, 3), (900, 640), drafts=2),
    "prefills": Batch((20, 3), (20, 3)),
    "chunks": Batch((40, 9), (800, 513)),
    "mixed": Batch((1, 1, 30), (900, 257, 700)),
    "rejected drafts beside a chunk": Batch((3, 2, 20), (900, 640, 300), 2, (900, 642, 300)),
}


CASES = [(kind, "LBNHC") for kind in BATCHES]  # vLLM's default order; then the others
CASES += [(kind, order) for kind in ("mixed", "three tokens each") for order in ("LBHNC", "BLHNC")]


@pytest.mark.parametrize(("kind", "order"), CASES)
def test_the_plug_in_gives_what_vllm_gives(engine, kind, order):
    step = Step(engine, BATCHES[kind], order, sinks=int(kind == "mixed"))
    theirs, their_ids = step.run()
    engine.plug_in(step.layer)
    assert type(step.layer.impl).__name__ == "MsaSparse"
    ours, ids = step.run()
    live = np.repeat(np.array(step.batch.lengths) > 0, step.batch.new)
    assert (ids[live] == their_ids[live]).all()
    torch.testing.assert_close(ours[live], theirs[live], rtol=1e-5, atol=3e-6)
    assert (ours[~live] == 0).all() and (ids[~live] == -1).all()


@pytest.mark.parametrize("heads", [4, 3])  # of ranks that share KV heads, or have one each
def test_a_rank_with_one_group(engine, heads):
    step = Step(engine, Batch((1, 1, 10), (300, 129, 140)), heads=heads, groups=1)
    theirs, their_ids = step.run()
    engine.plug_in(step.layer)
    ours, ids = step.run()
    assert torch.equal(ids, their_ids)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=3e-6)


def test_all_layers_of_a_step_share_its_tables(engine):
    step = Step(engine, BATCHES["mixed"])
    engine.plug_in(step.layer)
    made = engine.build(step.layer, step.batch, step.table)[vllm_files.NAME].msa_sequences
    first = step.layer.run(step.q, step.q_idx).clone()
    tables = set(made.tables)
    again = step.layer.run(step.q, step.q_idx)
    assert tables and set(made.tables) == tables
    assert torch.equal(first, again)


def test_nothing_runs_while_vllm_measures_its_memory(engine):
    step = Step(engine, BATCHES["decodes"])
    engine.plug_in(step.layer)
    engine.forward.attn_metadata = None
    out = torch.ones(3, HEADS * DIM)
    assert step.layer.run(step.q, step.q_idx, out) is out and (out == 1).all()


def test_one_line_is_logged(engine):
    engine.log.clear()
    engine.plug_in(Step(engine, BATCHES["decodes"]).layer)
    (line,) = engine.log
    for part in (
        "1 sparse layers",
        "KV cache auto",
        "8 query heads and 2 groups",
        "4 blocks of 128",
    ):
        assert part in line


@pytest.mark.parametrize(("spoil", "says"), [
    (lambda layer, config: setattr(config.attention_config, "minimax_m3_indexer_cp", True),
     "minimax_m3_indexer_cp must be off"),
    (lambda layer, config: setattr(config.parallel_config, "decode_context_parallel_size", 2),
     "decode_context_parallel_size must be 1"),
    (lambda layer, config: setattr(layer, "impl", object()), "must be MiniMaxM3SparseTritonImpl"),
    (lambda layer, config: setattr(layer.indexer.impl, "score_type", "lse"), "must be 'max'"),
    (lambda layer, config: setattr(layer.indexer.impl, "local_blocks", 0), "at least 1, got 0"),
    (lambda layer, config: setattr(layer, "topk_indices_buffer", None), "must be a tensor"),
])  # fmt: skip
def test_what_cannot_be_served_stops_vllm(engine, spoil, says):
    layer = Step(engine, BATCHES["decodes"]).layer
    before = (
        engine.config.attention_config.__dict__ | {},
        engine.config.parallel_config.__dict__ | {},
    )
    try:
        spoil(layer, engine.config)
        with pytest.raises(RuntimeError, match=f"cannot serve this: .*{says}.*unset MSA_VLLM"):
            engine.layers.enable(layer, engine.config)
        assert not type(layer.impl).__name__.startswith("Msa")
    finally:
        engine.config.attention_config.__dict__.update(before[0])
        engine.config.parallel_config.__dict__.update(before[1])


# -- the entry point ------------------------------------------------------------------------------
@pytest.fixture
def loader(engine, tmp_path, monkeypatch):
    """vLLM's own loader of plug-ins, with a registry of models that notes what it is given."""
    found = {}
    registry = types.SimpleNamespace(register_model=lambda name, model: found.update({name: model}))
    engine_files.stub("vllm", ModelRegistry=registry)
    engine_files.stub("vllm.envs", VLLM_PLUGINS=None)
    plugins = engine_files.load(engine.folder, "vllm.plugins")

    def run(version="0.33.0"):
        entry_points_of_the_project(tmp_path, monkeypatch, {"vllm": version})
        plugins.plugins_loaded = False
        plugins.load_general_plugins()
        return found

    return run


def test_vllms_loader_finds_and_runs_the_entry_point(loader, monkeypatch):
    monkeypatch.setenv("MSA_VLLM", "1")
    found = loader()
    assert set(found) == {"MiniMaxM3SparseForCausalLM", "MiniMaxM3MTP"}
    theirs = {"MiniMaxM3SparseForCausalLM": type("A", (), {}), "MiniMaxM3MTP": type("B", (), {})}
    engine_files.stub("vllm.models.minimax_m3", **theirs)
    for name, model in found.items():
        module, _, attribute = model.partition(":")
        assert issubclass(getattr(importlib.import_module(module), attribute), theirs[name])


def test_without_the_variable_nothing_is_registered(loader, monkeypatch):
    monkeypatch.delenv("MSA_VLLM", raising=False)
    assert loader() == {}


@pytest.mark.parametrize(("value", "version", "says"), [
    ("1", "0.34.0", "vLLM must be 0.33.* for MSA_VLLM=1, got 0.34.0"),
    ("yes", "0.33.0", "MSA_VLLM must be 0 or 1, got 'yes'"),
])  # fmt: skip
def test_another_version_stops_vllm(loader, monkeypatch, value, version, says):
    monkeypatch.setenv("MSA_VLLM", value)
    with pytest.raises(RuntimeError, match=re.escape(says)):
        loader(version)
