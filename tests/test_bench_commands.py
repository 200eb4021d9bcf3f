"""Tests of all `msa bench` commands on a GPU: refusals, names of parts, wrong results."""

from __future__ import annotations

import importlib
import json
from typing import get_args

import pytest
import torch

from benchmarks import report
from benchmarks.checks import Wrong
from msa import cli

BENCHES = {
    "prefill": "stages",
    "train": "train_stages",
    "decode": "decode_stages",
    "serving": "serving_stages",
    "integrations": "integration_stages",
}
"""Each benchmark and the module of its parts."""


@pytest.fixture(params=BENCHES)
def bench(request):
    """A benchmark's name, its module, and the module of its parts."""
    if request.param == "integrations":
        pytest.importorskip("transformers")
    stages = importlib.import_module(f"benchmarks.{BENCHES[request.param]}")
    return request.param, importlib.import_module(f"benchmarks.{request.param}"), stages


def test_without_a_device_the_command_says_so(bench, monkeypatch, capsys, tmp_path):
    name, _, _ = bench
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "results.json"
    assert cli.main(["bench", name, "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith(f"msa bench {name} needs a CUDA device, ")
    assert not out.exists()


def test_parts_of_the_options_are_those_of_the_stages(bench):
    _, module, stages = bench
    assert get_args(module.Part) == tuple(stages.PARTS)


def test_what_is_wrong_ends_the_run(bench, monkeypatch, capsys, tmp_path):
    """The parts that were measured before the failure stay in the results."""
    name, module, stages = bench

    def wrong():
        raise Wrong("gradients are off by 1")

    first, second = list(stages.PARTS)[:2]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(report, "machine", lambda: {"device": "NVIDIA H100 80GB HBM3"})
    monkeypatch.setitem(stages.PARTS, first, lambda: {"measured": 1})
    monkeypatch.setitem(stages.PARTS, second, wrong)
    (tmp_path / "vllm-0.33.0-none.whl").touch()  # `serving` reads files of this wheel
    monkeypatch.setenv("MSA_ENGINE_WHEELS", str(tmp_path))
    out = tmp_path / "results.json"
    options = getattr(module, f"{name.capitalize()}Options")(out, (first, second))
    assert module.run(options) == 1
    said = f"msa bench {name}: not timed, for it is wrong: gradients are off by 1"
    assert said in capsys.readouterr().err
    written = json.loads(out.read_text())
    assert written[first] == {"measured": 1} and second not in written
