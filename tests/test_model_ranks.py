"""Several processes train the same model as one process: losses, gradients, routers.

This file, run as a program, is one of these processes.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from msa.model import checkpoint
from msa.training import train
from msa.training.documents import IMAGE_TOKEN, pack, world, write_document
from msa.training.presets import PRESETS, TINY
from msa.training.ranks import check_processes
from msa.training.train import METRICS, TrainOptions
from msa.training.trainer import Trainer

ROOT = Path(__file__).parent.parent
SMALL = replace(
    TINY,
    model=replace(
        TINY.model, width=32, attention=("msa",) * 2, mlp=("moe",) * 2, head_dim=8,
        rotary_dim=4, index_dim=8, mlp_width=32, expert_width=16, shared_width=16,
        msa=replace(TINY.model.msa, block_size=8, top_k=2),
    ),
    schedule=replace(  # one, three or six documents for two processes
        TINY.schedule, steps=6, contexts=(24, 48, 96), record_every=16, tokens=144, warm_up=0.3,
        rising=2, test_every=6, save_every=6, clip=0.05,
    ),
)  # fmt: skip
SEED = 28  # draws documents of all three lengths in the six steps
NUMBERS = ("language", "kl", "backbone_gradient", "index_gradient")


def run_small(folder, ports=("", "")):
    """Take six steps, interrupted after the third if the first process says so."""
    train.HELD_OUT, PRESETS["tiny"] = 2, SMALL
    first = os.environ.get("RANK", "0") == "0"
    for port in ports:
        os.environ["MASTER_PORT"] = port
        options = TrainOptions(out=folder, seed=SEED, context_parallel=int(os.environ["CONTEXT"]))
        train.train(options, lambda line: first and line["step"] == 2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_small(Path(sys.argv[1]), sys.argv[2:])


def start(folder, processes, context=1):
    """Start the processes as torchrun does; `context` of them read the same documents."""
    with socket.socket() as one, socket.socket() as two:
        for free in (one, two):
            free.bind(("127.0.0.1", 0))
        ports = [str(free.getsockname()[1]) for free in (one, two)]
    shared = {
        "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(processes),
        "TORCHELASTIC_RUN_ID": "test", "CONTEXT": str(context),
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), *ports],
            stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]  # fmt: skip
    for process in started:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said


def lines(folder):
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """The results of one process."""
    monkeypatch.setattr(train, "HELD_OUT", 2)
    monkeypatch.setitem(PRESETS, "tiny", SMALL)
    monkeypatch.setenv("MASTER_PORT", "")
    monkeypatch.setenv("CONTEXT", "1")
    run_small(tmp_path / "alone")
    return tmp_path / "alone"


@pytest.mark.parametrize("processes, context", [(2, 1), (2, 2), (4, 2)])
def test_processes_take_the_steps_of_one(tmp_path, alone, processes, context):
    start(tmp_path / "both", processes, context)
    one, two = lines(alone), lines(tmp_path / "both")
    assert [line["step"] for line in two] == list(range(6))
    assert {line["context"] for line in two} == {24, 48, 96}
    assert {line["mode"] for line in two} == {"dense", "sparse"}
    for a, b in zip(one, two):
        for name in NUMBERS:
            assert b[name] == pytest.approx(a[name], rel=1e-5), (a["step"], name)
        assert b["context"] == a["context"]
    assert two[-1]["test"]["prose"] == pytest.approx(one[-1]["test"]["prose"], rel=1e-5)
    found = load_file(tmp_path / "both" / checkpoint.WEIGHTS)
    biases = 0
    for name, weight in load_file(alone / checkpoint.WEIGHTS).items():
        assert torch.allclose(found[name], weight, rtol=1e-3, atol=1e-4), name
        if name.endswith("router.bias"):
            biases += 1
            assert weight.abs().max() > 0.015  # they moved more than once
            assert torch.allclose(found[name], weight, rtol=0, atol=1e-5), name
    assert biases == 2
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == (
        sorted(path.name for path in alone.iterdir())
    )


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7])
def test_parts_are_the_whole(parts):
    """The shares keep the order, pictures and questions of the documents, and their weights."""
    trainer = Trainer(SMALL, SEED)
    batch = next(b for b in map(trainer.batch, range(20)) if b.cu_seqlens[1] == 48)
    assert len(batch.cu_seqlens) == 4
    cut = [batch.part(number, parts) for number in range(parts)]
    for name in ("tokens", "targets", "weights", "digits", "distances"):
        assert torch.equal(torch.cat([getattr(b, name) for b in cut]), getattr(batch, name))
    assert torch.equal(torch.cat([b.images.patches for b in cut]), batch.images.patches)
    sizes = [len(part.cu_seqlens) - 1 for part in cut]
    assert sum(sizes) == 3
    assert max(sizes) - min(sizes) <= 1
    for part in cut:
        assert part.cu_seqlens == tuple(range(0, len(part.tokens) + 1, 48))
        assert len(part.images.grids) == int((part.tokens == IMAGE_TOKEN).sum())
        assert (part.tokens[part.places] == ord("=")).all()
        assert torch.equal(part.tokens[part.places + 1], part.digits + ord("0"))


def test_documents_of_several_lengths_are_parted_too():
    rng = np.random.default_rng(0)
    documents = [write_document(world("train"), 30 + 20 * n, 1 + n, 1, rng) for n in range(3)]
    batch = pack(documents, SMALL.model.vision)
    for number, document in enumerate(documents):
        part = batch.part(number, 3)
        assert part.tokens.tolist() == document.tokens.tolist()
        own = pack([document], SMALL.model.vision)
        assert torch.equal(part.images.patches, own.images.patches)
        assert torch.equal(part.places, own.places)


def test_more_processes_than_gpus_are_refused():
    check_processes(4, 4)
    with pytest.raises(ValueError, match="nproc-per-node must be at most 4, the number of GPUs, g"):
        check_processes(5, 4)
