"""`msa bench serving` without a GPU: what it prints, what it lacks, its shapes."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
from benchmarks import engine_files, report, serving, serving_stages  # noqa: E402

RACE = {"vllm": {"ms": 3.0}, "msa": {"ms": 1.5}, "times": 2.0}
FOUND = {
    "prefill": {"bf16": {"by_calls": 2.5, "shapes": [RACE | {"query_len": 7, "kv_len": 90}]}},
    "mixed": {"fp8": RACE}, "decode": {"bf16": {"8 x 128K": RACE}},
    "sglang": {"decode": {"sglang": {"ms": 2.0}, "msa": {"ms": 1.0}, "times": 2.0}},
}  # fmt: skip


def test_every_race_is_shown():
    out = io.StringIO()
    serving.show(FOUND, Console(file=out, width=120))
    for text in ("prefill 7 of 90, bf16", "8K chunk and 32 decodes, fp8", "decode 8 x 128K, bf16",
                 "SGLang decode", "3.000", "2.50 times by calls"):  # fmt: skip
        assert text in out.getvalue()


@pytest.mark.parametrize(("part", "engine"), [("decode", "vllm==0.33.0"), ("sglang", "sglang==0")])
def test_missing_files_are_named(part, engine, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "has_device", lambda _: True)
    options = serving.ServingOptions(parts=(part,), engines=tmp_path)
    assert serving.run(options) == 2
    assert f"{tmp_path} has no wheel of {engine}" in capsys.readouterr().err


def test_an_unpacked_wheel_is_taken_as_it_is(tmp_path):
    first = tmp_path / engine_files.FILES["vllm"][0]
    first.parent.mkdir(parents=True)
    first.touch()
    assert engine_files.missing("vllm", tmp_path) is None
    assert engine_files.unpack("vllm", tmp_path, tmp_path / "other") == tmp_path


def test_modules_of_an_engine_are_gone_afterwards():
    import sys

    with engine_files.modules_of("not_an_engine"):
        engine_files.stub("not_an_engine.part", answer=42)
        from not_an_engine import part

        assert part.answer == 42
    assert "not_an_engine" not in sys.modules


def test_production_shapes_stand_for_many_calls():
    shapes = serving_stages.production_shapes()
    assert len(shapes) == 16 and sum(s["weight"] for s in shapes) == 10434
    rows = [s | RACE for s in shapes]
    assert serving_stages.by_calls(rows) == pytest.approx(2.0)
