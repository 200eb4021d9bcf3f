"""The examples run, and do what they say."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import rms_norm

import msa

ROOT = Path(__file__).parent.parent


@pytest.fixture
def loop(monkeypatch):
    """On the CPU, in float32, where rounding moves no choice of a byte."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module("generate_loop")


def test_the_command_runs():
    done = subprocess.run(
        [sys.executable, "examples/generate_loop.py", "--backend", "torch",
         "--prompt-tokens", "200", "--new-tokens", "5", "--chunk", "90", "--index-dtype", "fp8"],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"prefill .* 100% .* [\d,]+ tokens/s", done.stdout), done.stdout
    assert re.search(r"decode .* 100% .* [\d,]+ tokens/s", done.stdout), done.stdout
    assert "wrote b'" in done.stdout


def written_without_a_cache(loop, options):
    """The same model over the whole text at each step."""
    model = loop.Model(options, torch.device("cpu"), torch.float32)
    text = loop.read_prompt(options.prompt_tokens)
    for _ in range(options.new_tokens):
        x = first = model.embedding[text]
        for layer in model.layers:
            h = rms_norm(x, x.shape[-1:])
            q, k, v = ((h @ to).unflatten(1, (-1, loop.DIM))
                       for to in (layer.to_q, layer.to_k, layer.to_v))  # fmt: skip
            q_idx = (h @ layer.to_q_idx).unflatten(1, (loop.GROUPS, -1))
            k_idx = h @ layer.to_k_idx
            out = msa.attention(q, k, v, q_idx, k_idx, config=loop.CONFIG, backend="torch").out
            x = x + out.flatten(1) @ layer.to_out
        scores = (x - first)[-1] @ model.embedding.T
        text = torch.cat([text, scores.argmax()[None]])
    return bytes(text[-options.new_tokens :].tolist())


@pytest.mark.parametrize(("chunk", "prompt"), [(1000, 600), (64, 600), (1, 150)])
def test_what_it_writes_is_what_the_model_writes_without_a_cache(loop, chunk, prompt):
    options = loop.Options("torch", prompt_tokens=prompt, new_tokens=8, chunk=chunk)
    text = loop.main(options)
    assert len(set(text)) > 2
    assert text == written_without_a_cache(loop, options)


@pytest.mark.parametrize(("index", "kv"), [("fp8", "none"), ("none", "fp8"), ("fp8", "fp8")])
def test_8_bits(loop, index, kv):
    options = loop.Options("torch", 300, 4, 100, index, kv)
    model = loop.Model(options, torch.device("cpu"), torch.float32)
    names, wanted = ("k_pages", "v_pages", "k_idx_pages"), (kv, kv, index)
    for layer in model.layers:
        eight = [getattr(layer.pool.cache, name).dtype == torch.float8_e4m3fn for name in names]
        assert eight == [kind == "fp8" for kind in wanted]
    assert len(loop.main(options)) == 4
