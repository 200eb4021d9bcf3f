"""`msa bench decode`: refusal without a device, checks before times, its table and its figure."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import msa
from benchmarks import cases, decode, decode_stages, plots
from benchmarks.checks import Wrong
from benchmarks.figures.decode import bandwidth, least_bytes
from benchmarks.reading import committed

ROOT = Path(__file__).parent.parent
RESULTS = committed("decode")
FOUND = json.loads(RESULTS.read_text())


@pytest.fixture
def step(monkeypatch):
    """Three sequences of integer tokens in full, small blocks, on the CPU."""
    for module in (cases, decode_stages):
        monkeypatch.setattr(module, "CONFIG", msa.MSAConfig(16, top_k=4))
    for name, size in (("HEADS", 4), ("GROUPS", 2), ("DIM", 8)):
        monkeypatch.setattr(decode_stages, name, size)
    random = torch.Generator().manual_seed(0)

    def integers(*shape):
        return torch.randint(-3, 4, shape, generator=random).float()

    table = torch.randperm(75, generator=random).int().view(3, 25)
    lengths = torch.tensor([304, 400, 384])
    pages = integers(75, 16, 2, 8) / 4, integers(75, 16, 2, 8), integers(75, 16, 8)
    cache = msa.PagedKV(*pages, table, lengths)
    q, q_idx = integers(3, 1, 4, 8), integers(3, 1, 2, 8)
    return cache, q, q_idx, msa.decode(q, q_idx, cache, config=decode_stages.CONFIG)


def test_the_check_passes_what_is_right(step):
    cache, q, q_idx, output = step
    assert decode_stages.check(cache, q, q_idx, output) < 1e-4


def test_the_check_sees_what_is_wrong(step):
    cache, q, q_idx, output = step
    with pytest.raises(Wrong, match="is off by"):
        decode_stages.check(cache, q, q_idx, replace(output, lse=output.lse + 0.1))
    ids = output.selection.indices.clone()
    ids[2, 1, 0] += 1
    other = replace(output, selection=replace(output.selection, indices=ids))
    with pytest.raises(Wrong, match="selection of sequence 2"):
        decode_stages.check(cache, q, q_idx, other)


def test_the_table_shows_the_committed_results():
    shown = io.StringIO()
    decode.show(FOUND, Console(file=shown, width=140))
    for row in FOUND["steps"]:
        for form in decode_stages.FORMS:
            assert f"{row[form]['step']['us']:.1f}" in shown.getvalue()
    for kinds in FOUND["quality"].values():
        assert f"{kinds['index']['block_recall']:.2%}" in shown.getvalue()


def test_the_figure_is_that_of_the_committed_results(tmp_path):
    (path,) = plots.draw(RESULTS, tmp_path)
    assert path.name == f"{RESULTS.stem}.svg"
    assert path.read_text() == (ROOT / "docs" / path.name).read_text()


def test_marks_lie_below_what_was_measured():
    for row in FOUND["steps"]:
        for form in ("bf16", "fp8 index"):
            floor = least_bytes(row["batch"], row["context"], form) / bandwidth(FOUND) / 1e6
            assert 0.2 < floor / row[form]["layer"]["us"] < 1.0
