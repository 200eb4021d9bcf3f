"""Steps of training lower both losses, in every precision and backend; what reading measures."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import test_model_train
import torch
from test_model_train import MICRO, metrics

import msa
from msa import cli
from msa.model import checkpoint
from msa.training.documents import pack
from msa.training.evaluate import read_documents, unseen_documents
from msa.training.presets import TINY
from msa.training.trainer import Trainer, split_parameters

micro = test_model_train.micro


def test_both_parts_are_clipped_each_by_itself():
    trainer = Trainer(replace(MICRO, schedule=replace(MICRO.schedule, clip=1e-3)), 0)
    parts = split_parameters(trainer.model)
    assert sum(map(len, parts.values())) == len(list(trainer.model.parameters()))
    assert len(parts["index"]) == 8
    told = trainer.take_step()
    for name, weights in parts.items():
        assert told[f"{name}_gradient"] > 1e-3
        norm = torch.stack([w.grad.norm() for w in weights]).norm()
        assert norm == pytest.approx(1e-3, rel=1e-3)


def test_routers_are_balanced_at_every_step():
    trainer = Trainer(MICRO, 0)
    (router,) = trainer.model.routers()
    trainer.take_step()
    assert router.bias.abs().max() == pytest.approx(MICRO.schedule.balance)
    assert router.load.sum() == 0


def test_thirty_steps_lower_both_losses():
    schedule = replace(TINY.schedule, steps=30, contexts=(64, 128), tokens=512, rising=5)
    trainer = Trainer(replace(TINY, schedule=schedule), 0)
    told = [trainer.take_step() for _ in range(30)]
    assert {line["mode"] for line in told} == {"dense", "sparse"}
    assert told[0]["language"] > 5
    assert sum(line["language"] for line in told[-5:]) / 5 < 3.6
    warm = [line["kl"] for line in told if line["mode"] == "dense"]
    assert sum(warm[-3:]) / 3 < 0.95 * warm[0]


def test_kernels_take_the_same_steps():
    """In Triton's interpreter where there is no GPU; dense and sparse steps, gradients included."""
    told = {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    schedule = replace(MICRO.schedule, steps=2, warm_up=0.5, contexts=(40,), tokens=40)
    sizes = replace(MICRO.model, head_dim=16, index_dim=16, msa=msa.MSAConfig(16, 2))
    for backend, place in (("torch", "cpu"), ("triton", device)):
        preset = replace(MICRO, model=sizes, schedule=schedule, backend=backend, device=place)
        trainer = Trainer(preset, 0)
        told[backend] = [trainer.take_step() for _ in range(2)]
    for one, other in zip(told["torch"], told["triton"]):
        for name in ("language", "kl", "backbone_gradient", "index_gradient"):
            assert other[name] == pytest.approx(one[name], rel=1e-3), (one["step"], name)


def test_half_precision_takes_nearly_the_same_steps():
    told = {}
    for half in (False, True):
        trainer = Trainer(replace(MICRO, half=half), 0)
        told[half] = [trainer.take_step() for _ in range(6)]
    assert {line["mode"] for line in told[True]} == {"dense", "sparse"}
    for one, other in zip(told[False], told[True]):
        assert one["language"] != other["language"] == pytest.approx(one["language"], rel=0.02)


def test_reading_measures_what_training_minimises():
    model = Trainer(MICRO, 0).model
    documents = unseen_documents(64, 2, 2, 3)
    batch = pack(documents, MICRO.model.vision, answers=0.0)
    reading = read_documents(model, documents)
    wanted = model.eval().losses(
        batch.tokens, batch.targets, batch.cu_seqlens, images=batch.images, weights=batch.weights
    )
    assert reading.prose == pytest.approx(wanted.language.item(), rel=1e-5)
    alone = read_documents(model, documents, at_once=1)
    assert torch.equal(alone.right, reading.right)
    assert alone.prose == pytest.approx(reading.prose, rel=1e-5)
    asked = [q.distance for document in documents for q in document.questions]
    assert reading.distances.tolist() == asked
    places = [q.record / 64 for document in documents for q in document.questions]
    assert reading.depths.tolist() == pytest.approx(places)
    parts = reading.by_depth(4)
    assert [n for _, n in parts] == [sum(int(4 * x) == i for x in places) for i in range(4)]
    assert sum(right for right, _ in parts) == int(reading.right.sum())


@torch.no_grad()
def test_a_right_answer_counts_as_one():
    """A model that says "7" whatever it is asked is right where 7 is the digit."""
    model = Trainer(MICRO, 0).model
    model.norm.weight.fill_(-1.0)  # its last hidden state is 0, and so are all logits
    model.head = torch.nn.Linear(32, 257)
    model.head.weight.zero_()
    model.head.bias.zero_()[ord("7")] = 1.0
    documents = unseen_documents(200, 8, 8, 6)
    sevens = [q.digit == 7 for document in documents for q in document.questions]
    assert 0 < sum(sevens) < len(sevens)
    assert read_documents(model, documents).right.tolist() == sevens


def test_the_command_trains(tmp_path, capsys):
    words = ["train", "--steps", "1", "--warm-up", "0", "--out", str(tmp_path / "out")]
    assert cli.main(words) == 0
    told = capsys.readouterr().out
    assert "step      1 unseen: prose" in told
    assert re.search(r"block recall \d+\.\d%, score recall \d+\.\d%", " ".join(told.split()))
    assert metrics(tmp_path / "out")[0]["mode"] == "sparse"
    assert checkpoint.load(tmp_path / "out").config == MICRO.model
    assert cli.main([*words, "--minutes", "1"]) == 2
    assert "msa: minutes must be None where steps are given" in capsys.readouterr().err
