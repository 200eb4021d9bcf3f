"""`msa bench integrations`: refusal without a device, checks before times, its tables."""

from __future__ import annotations

import io
import sys
from functools import partial

import pytest
import torch
from rich.console import Console

if sys.version_info < (3, 11):
    pytest.skip("transformers 5.23 needs Python 3.11", allow_module_level=True)

from benchmarks import integration_stages as stages
from benchmarks import integrations
from benchmarks.checks import Wrong
from msa.ops import functional

WAYS = "function", "operator", "compiled", "captured"
SIZES = {
    "vocab_size": 1024, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "dense_intermediate_size": 32, "index_n_heads": 2, "index_head_dim": 16,
    "index_block_size": 8, "index_topk_blocks": 3, "initializer_range": 0.2,
}  # fmt: skip


def test_the_shape_is_that_of_the_model():
    """The defaults of the configuration are the values of the released model."""
    model = stages.make_model(torch.bfloat16, "meta", num_hidden_layers=4)
    config = model.config
    assert (config.index_n_heads, config.index_head_dim) == (4, 128)
    assert (config.index_block_size, config.index_topk_blocks, config.index_local_blocks) == (
        128, 16, 1
    )  # fmt: skip
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (64 * 128, 2048)


@pytest.fixture
def model():
    return stages.make_model(torch.float32, "cpu", **SIZES)


def test_all_ways_agree(model):
    errors = stages.check_ways(model, stages.make_ids(60, "cpu"))
    assert list(errors) == ["eager", "sdpa", "msa", "enabled"]
    assert max(error["median"] for error in errors.values()) < 1e-5


def test_a_way_that_differs_is_not_timed(model, monkeypatch):
    kept = functional.operators.attention
    monkeypatch.setattr(
        functional.operators, "attention", lambda *args: (2 * kept(*args)[0], *kept(*args)[1:])
    )
    with pytest.raises(Wrong, match=r"enabled: \d+\.\d% of the tokens are off by more than 0.001"):
        stages.check_ways(model, stages.make_ids(60, "cpu"))


def test_a_result_that_differs_is_not_timed():
    x = torch.arange(3.0)
    stages.check_equal("same", (x, x), (x.clone(), x))
    with pytest.raises(Wrong, match="other: result 1 is off by 1"):
        stages.check_equal("other", (x, x + 1), (x, x))


def test_a_way_ends_where_it_does_not_fit(monkeypatch):
    def forward_pass(model, n):
        if n > 8192:
            raise torch.cuda.OutOfMemoryError("no")
        return {"time": {"ms": n / 100}, "gib": n / 4096}

    monkeypatch.setattr(stages, "forward_pass", forward_pass)
    rows = stages.walk(None, stages.LENGTHS)
    assert [row["n"] for row in rows] == [4096, 8192, 16384]
    shown = io.StringIO()
    way = {"ms": 0.25, "min": 0.2, "max": 0.3}
    row = {"name": "a call"} | dict.fromkeys(WAYS, way)
    found = {"operators": [row], "lengths": {"ways": {"eager": rows, "enabled": rows[:2]}}}
    integrations.show(found, Console(file=shown, width=120))
    assert "41.0 (1.0)" in shown.getvalue()
    assert "out of memory" in shown.getvalue()
    assert shown.getvalue().count("0.250") == 4


def capture(operator, tensors):
    """Replaces a CUDA graph: calls the function with its copies of the tensors."""
    static = tuple(t.clone() for t in tensors)
    return lambda: operator(*static), static


def test_functions_and_operators_of_the_first_part_are_the_same(monkeypatch):
    """A small measurement on the CPU, without graphs."""
    config = stages.msa.MSAConfig(block_size=8, top_k=3)
    monkeypatch.setattr(stages, "CONFIG", config)
    shapes = (40, 4, 16), (40, 2, 16), (40, 2, 16), (40, 2, 8), (40, 8)
    tensors = tuple(torch.randn(s) for s in shapes)
    others = tuple(torch.randn(s) for s in shapes)
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", partial(compile_, backend="aot_eager"))
    monkeypatch.setattr(stages, "capture", capture)
    monkeypatch.setattr(stages, "timed", lambda call, graph: {"ms": len(call())})
    pair = stages.attention, stages.attention_operator
    row = stages.in_four_ways("attention", *pair, tensors, others)
    assert row == {"name": "attention"} | {way: {"ms": 3} for way in WAYS}
    pair = stages.with_loss, stages.with_loss_operator
    row = stages.in_four_ways("step", *pair, tensors, others, stages.training_step)
    assert row == {"name": "step"} | {way: {"ms": 5} for way in WAYS}

    def wrong(*tensors):
        return *stages.attention_operator(*tensors)[:2], torch.zeros(40, 2, 3).int()

    with pytest.raises(Wrong, match="mixed, operator: result 2 is off by"):
        stages.in_four_ways("mixed", stages.attention, wrong, tensors, others)

    def stale(operator, tensors):
        results = operator(*tensors)
        return lambda: results, tuple(t.clone() for t in tensors)

    monkeypatch.setattr(stages, "capture", stale)
    with pytest.raises(Wrong, match="attention, captured: result 0 is off by"):
        stages.in_four_ways("attention", stages.attention, stages.attention_operator,
                            tensors, others)  # fmt: skip
