"""The model of the package answers, and `msa demo` shows which blocks it read."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

import msa
from msa import cli
from msa.demo import figure
from msa.demo.demo import DemoOptions, compute
from msa.model.checkpoint import TRAINED, load_trained
from msa.training.documents import IMAGE_TOKEN, world
from msa.training.evaluate import read_documents, unseen_documents
from msa.training.presets import PRESETS
from msa.training.train import METRICS

DOCS = (Path(__file__).parent.parent / "docs" / "model.md").read_text()


def test_the_trained_model_answers_for_unseen_documents():
    model = load_trained("tiny", backend="torch")
    assert model.config == PRESETS["tiny"].model
    assert not model.training
    reading = read_documents(model, unseen_documents(512, 8, 8, 8, seed=1))
    assert len(reading.right) == 64
    assert reading.accuracy() >= 0.9
    assert reading.prose < 1.9


@pytest.mark.parametrize(
    ("name", "steps", "told_steps"),
    [
        ("tiny", PRESETS["tiny"].schedule.steps, [100, 200, 300, 450]),
        ("small", 1261, [250, 500, 750, 1000, 1261]),  # the steps that fit into the time
    ],
)
def test_metrics_are_those_of_the_documents(name, steps, told_steps):
    lines = [json.loads(line) for line in (TRAINED[name] / METRICS).read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(steps))
    assert load_trained(name).config == PRESETS[name].model
    section = DOCS[DOCS.index(f" {name} preset (") :]
    rows = re.findall(r"^\| ([\d,]+) \| (?:dense|MSA)[^|]*\|(.*)\|$", section, re.M)
    for step, (told_step, told) in zip(told_steps, rows):
        assert int(told_step.replace(",", "")) == step
        test = lines[step - 1]["test"]
        shares = [f"{test[name]:.1%}" for name in ("answers", "near", "far")]
        assert [cell.strip() for cell in told.split("|")] == [f"{test['prose']:.2f}", *shares]


def test_another_name_is_refused():
    with pytest.raises(ValueError, match="name must be small or tiny, got 'huge'"):
        load_trained("huge")


@pytest.fixture(scope="module")
def shown():
    return compute(DemoOptions(backend="torch", tokens=600, records=4, seed=3))


def test_the_demo_asks_for_every_picture_of_an_unseen_document(shown):
    test = world("test")
    assert len(shown.images) == len(shown.questions) == 4
    assert sorted(question.picture for question in shown.questions) == [0, 1, 2, 3]
    for question in shown.questions:
        assert len(question.tokens) == 600
        pictures = [image.tobytes() for image in test.images]
        number = pictures.index(shown.images[question.picture].tobytes())
        assert test.labels[number] == question.right
        assert question.key.encode() in test.keys
    assert shown.right(shown.sparse) >= 3
    wrong = [replace(a, digit=(a.digit + 1) % 10) for a in shown.sparse]
    assert shown.right(wrong) <= 4 - shown.right(shown.sparse)
    other = compute(DemoOptions(backend="torch", tokens=600, records=4, seed=4))
    assert shown.questions[0].tokens.tolist() != other.questions[0].tokens.tolist()


def test_keys_and_blocks_are_those_of_the_selection(shown):
    """For one layer and group: all blocks are full, except the own block (R3)."""
    size = shown.block_size
    for question, dense, sparse in zip(shown.questions, shown.dense, shown.sparse):
        assert dense.opened is None
        assert dense.keys == question.place + 1
        assert sparse.opened.shape == (3, 2, -(-600 // size))
        assert bool(sparse.opened[..., question.place // size].all())
        assert not bool(sparse.opened[..., question.place // size + 1 :].any())
        assert set(sparse.opened.sum(-1).flatten().tolist()) == {5}
        assert sparse.keys == 4 * size + question.place % size + 1


def test_watching_changes_nothing_and_shows_each_msa_layer():
    model = load_trained("tiny", backend="torch")
    text, seen = torch.arange(90), []
    with torch.no_grad():
        logits = model(text, watch=seen.append).logits
        assert torch.equal(logits, model(text).logits)
        assert len(seen) == 3
        for layer in seen:
            assert layer.selection.indices.shape == (90, 2, 5)
            heads = msa.sparse_attention(
                layer.q, layer.k, layer.k, layer.selection, softmax_scale=layer.softmax_scale
            )
            assert heads.out.shape == layer.q.shape
        model(text, mode="dense", watch=seen.append)
    assert len(seen) == 3


def test_backends_open_the_same_blocks(shown):
    other = compute(DemoOptions(backend="reference", tokens=600, records=4, seed=3))
    for a, b in zip(shown.sparse, other.sparse):
        assert a.digit == b.digit
        assert torch.equal(a.opened, b.opened)


def test_the_page_draws_what_was_opened(shown, tmp_path, capsys):
    path = tmp_path / "deep" / "demo.html"
    words = ["--backend", "torch", "--tokens", "600", "--records", "4", "--seed", "3"]
    drawn = ["--html", str(path), "--png", str(path.with_suffix(".png"))]
    assert cli.main(["demo", *words, *drawn]) == 0
    text, told = path.read_text(encoding="utf-8"), capsys.readouterr().out
    opened = sum(int(a.opened.sum()) for a in shown.sparse)
    assert len(re.findall(r'<rect class="(?:open|own)"', text)) == opened
    assert len(re.findall(r'<rect class="own"', text)) == 4 * 6
    read = [int(a.opened.any(0).any(0).sum()) for a in shown.sparse]
    assert len(re.findall(r'<div class="block(?: holds)?">', text)) == sum(read)
    held = [
        str(q.record // 16)
        for a, q in zip(shown.sparse, shown.questions)
        if bool(a.opened[..., q.record // 16].any())
    ]
    assert re.findall(r'<div class="block holds">.*?<small>block (\d+)', text, re.S) == held != []
    assert not re.findall(r"https?:|<script|<link", text)
    assert "prefers-color-scheme: dark" in text
    page = Balanced()
    page.feed(text)
    assert page.open == []
    for question in shown.questions:
        assert f"?{question.key}=" in told
        assert f"?{question.key}=" in text
    right = shown.right(shown.sparse)
    assert f"read with MSA, as they were trained, for {right}, with" in " ".join(told.split())
    assert "dense twin: trained" in told and "The fair control" in told
    assert "The fair control is a dense twin" in text
    assert (tmp_path / "deep" / "demo.png").stat().st_size > 10_000


def test_the_figure_draws_what_was_opened(shown):
    drawn = figure.draw(shown)
    assert drawn.get_figwidth() * drawn.dpi == 1200
    assert len(drawn.axes) == 4
    for axes, question, answer in zip(drawn.axes, shown.questions, shown.sparse):
        (image,) = axes.images
        own = question.place // shown.block_size
        for layer, group, block in np.ndindex(answer.opened.shape):
            colour = figure.OWN if block == own else figure.OPEN
            wanted = colour if answer.opened[layer, group, block] else figure.CELL
            assert to_hex(image.get_array()[2 * layer + group, block]) == wanted
        (frame,) = axes.patches
        assert frame.get_x() + 0.5 == question.record // shown.block_size
        (text,) = (text.get_text() for text in axes.texts)
        assert text.startswith(f"?{question.key}=   right {question.right}   dense ")
        assert text.endswith(f"MSA {answer.digit} {question.mark(answer)}")
        assert [inset.images[0].get_array().tolist() for inset in axes.child_axes] == (
            shown.images.tolist()
        )
        boxes = [inset.get_window_extent().intervalx for inset in axes.child_axes]
        left, right = axes.get_window_extent().intervalx
        blocks = (np.mean(boxes, axis=1) - left) / (right - left) * answer.opened.shape[2]
        (places,) = np.nonzero(question.tokens == IMAGE_TOKEN)
        assert blocks == pytest.approx(places // shown.block_size + 0.5)


class Balanced(HTMLParser):
    """Every tag that is opened is closed, in order."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "!doctype"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_larger_model_by_its_name():
    options = DemoOptions(model="small", tokens=300, records=2, backend="torch")
    found = compute(options)
    assert found.block_size == 128
    assert found.right(found.dense) == found.right(found.sparse) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokens", "40"], "tokens must be at least 97 for 8 records and 8 questions, got 40"),
        (["--model", "nowhere"], "config.json must be the configuration of a model, got no such"),
        (
            ["--device", "cuda"],
            "device must be cpu, for this machine has no CUDA device, got 'cuda'",
        ),
    ],
)
def test_what_cannot_be_shown_is_said(words, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["demo", *words]) == 2
    assert message in capsys.readouterr().err
