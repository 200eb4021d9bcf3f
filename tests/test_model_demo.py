"""The model that comes with the package: it is what the documents say, and it answers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from msa.model.checkpoint import TRAINED, load_trained
from msa.model.evaluate import read, unseen_documents
from msa.model.presets import PRESETS
from msa.model.train import METRICS

DOCS = (Path(__file__).parent.parent / "docs" / "model.md").read_text()


def test_the_trained_model_answers_for_unseen_documents():
    model = load_trained("tiny", backend="torch")
    assert model.config == PRESETS["tiny"].model
    assert not model.training
    reading = read(model, unseen_documents(512, 8, 8, 8, seed=1))
    assert len(reading.right) == 64
    assert reading.accuracy() >= 0.9
    assert reading.prose < 1.9


def test_its_metrics_are_those_of_the_documents():
    lines = [json.loads(line) for line in (TRAINED / "tiny" / METRICS).read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(PRESETS["tiny"].schedule.steps))
    rows = re.findall(r"^\| (\d+) \| (?:dense|MSA)[^|]*\|(.*)\|$", DOCS, re.M)
    assert [int(step) for step, _ in rows] == [100, 200, 300, 450]
    for step, told in rows:
        test = lines[int(step) - 1]["test"]
        shares = [f"{test[name]:.1%}" for name in ("answers", "near", "far")]
        assert [cell.strip() for cell in told.split("|")] == [f"{test['prose']:.2f}", *shares]


def test_another_name_is_refused():
    with pytest.raises(ValueError, match="name must be tiny, got 'huge'"):
        load_trained("huge")
