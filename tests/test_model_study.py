"""Statistics of layers: recall of each group, KL of each layer, loads of the experts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import needle
from msa.model import Model
from msa.model.checkpoint import load_trained
from msa.recall import measure
from msa.training.documents import pack
from msa.training.evaluate import unseen_documents
from msa.training.layer_stats import measure_layers, recall_of_groups
from msa.training.presets import TINY

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model():
    return load_trained("tiny", backend="torch")


@pytest.fixture(scope="module")
def documents():
    return unseen_documents(300, 4, 4, 2)


def seen_by(model, documents):
    batch, seen = pack(documents, model.config.vision), []
    with torch.no_grad():
        output = model(
            batch.tokens, batch.cu_seqlens, images=batch.images, align=True, watch=seen.append
        )
    return seen, output.kl


def test_numbers_of_layers_and_groups_make_up_those_of_the_whole(model, documents):
    found = measure_layers(model, documents)
    seen, kl = seen_by(model, documents)
    assert np.mean(found.kl) == pytest.approx(kl.item(), rel=1e-5)
    assert len(set(found.kl)) == 3
    for layer, blocks, scores in zip(seen, found.block_recall, found.score_recall):
        whole = measure(layer.q, layer.k, layer.selection, layer.softmax_scale)
        groups = recall_of_groups(layer)
        assert sum(group.queries for group in groups) == whole.queries > 0
        assert np.mean(blocks) == pytest.approx(whole.blocks)
        assert [group.score for group in groups] == list(scores)
        assert len(set(blocks)) == 2
        assert 0.2 < min(blocks) <= max(blocks) < 1
        assert min(scores) > min(blocks)
    assert json.loads(json.dumps(found.summary()))["kl"] == list(found.kl)


def test_a_group_is_judged_by_its_own_heads(model, documents):
    """A group with the keys and the selection of another group gets the same numbers."""
    (layer, *_), _ = seen_by(model, documents)
    first = replace(
        layer, k=layer.k[:, [0, 0]], q=torch.cat([layer.q[:, :2]] * 2, 1),
        selection=replace(layer.selection, indices=layer.selection.indices[:, [0, 0]]),
    )  # fmt: skip
    one, other = recall_of_groups(layer)
    assert recall_of_groups(first) == [one, one]
    assert one != other


def test_an_expert_that_is_always_chosen_has_half_of_the_load(documents):
    """Two of four experts are chosen for each token, so a share is at most one half."""
    model = Model(TINY.model, backend="torch")
    for router, favourite in zip(model.routers(), (1, 3)):
        router.bias[favourite] = 2.0
    found = measure_layers(model, documents)
    for load, favourite in zip(found.expert_load, (1, 3)):
        assert load[favourite] == 0.5
        assert sum(load) == pytest.approx(1)


def test_the_model_is_left_as_it_was(documents):
    model = Model(TINY.model, backend="torch").train()
    measure_layers(model, documents)
    assert model.training
    assert all(router.load.sum() == 0 for router in model.routers())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_without_an_index_has_no_numbers_of_it(documents):
    sizes = replace(TINY.model, attention=("dense",) * 3)
    found = measure_layers(Model(sizes, backend="torch"), documents)
    assert found.kl == found.block_recall == found.score_recall == ()
    assert len(found.expert_load) == 2


# -- length and depth -----------------------------------------------------------------------------
def test_the_map_is_measured_and_drawn(tmp_path):
    options = needle.Needle(
        lengths=(128, 200), depths=4, documents=2, out=tmp_path / "r.json",
        figure=tmp_path / "f.svg", threads=torch.get_num_threads(),
    )  # fmt: skip
    needle.main(options)
    found = json.loads(options.out.read_text())
    assert set(found) >= {"device", "threads", "versions", "date", "case", "keys"}
    drawn = options.figure.read_bytes()
    for rows in found["right_of_asked"].values():
        assert [sum(asked for _, asked in row) for row in rows.values()] == [16, 16]
        assert all(len(row) == 4 for row in rows.values())
        assert all(0 <= right <= asked for row in rows.values() for right, asked in row)
    needle.main(replace(options, measure=False))
    assert options.figure.read_bytes() == drawn


def test_the_shipped_map_is_of_the_shipped_results():
    """The printed table has the numbers of the page."""
    import hashlib

    results = ROOT / "benchmarks" / "results" / "needle_cpu.json"
    digest = hashlib.sha256(results.read_bytes()).hexdigest()
    assert f"{results.name} sha256 {digest}" in (ROOT / "docs" / "needle.svg").read_text()
    found = json.loads(results.read_text())["right_of_asked"]
    page = (ROOT / "docs" / "model.md").read_text()
    for length in found["dense"]:
        shares = [
            f"{sum(r for r, _ in found[mode][length]) / sum(n for _, n in found[mode][length]):.1%}"
            for mode in ("dense", "sparse")
        ]
        assert f"| {int(length):,} | {shares[0]} | {shares[1]} |" in page
