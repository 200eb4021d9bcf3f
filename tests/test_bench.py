"""The benchmark command: refusals, checks before timing, table and figures of the results."""

from __future__ import annotations

import copy
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from rich.console import Console

from benchmarks import (
    cases,
    checks,
    counts,
    dense,
    plots,
    prefill,
    prefill_table,
    report,
    stages,
    topk_stages,
)
from benchmarks.cases import CONFIG, DIM, GROUPS, HEADS
from benchmarks.reading import committed
from msa import cli
from msa.ir import Selection, Sequences
from msa.kernel_choice import choose, usual_call

ROOT = Path(__file__).parent.parent
RESULTS = committed("prefill")
FOUND = json.loads(RESULTS.read_text())


# -- the command ----------------------------------------------------------------------------------
def test_the_module_is_the_same_command_without_tyro(tmp_path):
    code = (
        "import sys, runpy; sys.modules['tyro'] = None; sys.argv = ['prefill', '--parts', 'topk']; "
    )
    code += "runpy.run_module('benchmarks.prefill', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("msa bench prefill needs a CUDA device, ")


def test_outside_of_a_checkout_it_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "benchmarks", None)
    assert cli.main(["bench", "prefill"]) == 2
    assert "runs from a checkout" in capsys.readouterr().err


@pytest.fixture
def a_device(monkeypatch):
    """Pretend that there is a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    head = {name: FOUND[name] for name in ("device", "torch", "triton", "date")}
    monkeypatch.setattr(report, "machine", lambda: dict(head))


def test_results_are_written_after_each_part_and_what_is_wrong_ends_the_run(
    a_device, monkeypatch, capsys, tmp_path
):
    def wrong():
        raise checks.Wrong("off by 1")

    monkeypatch.setitem(stages.PARTS, "topk", lambda: FOUND["topk"])
    monkeypatch.setitem(stages.PARTS, "million", wrong)
    out = tmp_path / "new" / "results.json"
    assert prefill.run(prefill.PrefillOptions(out, ("topk", "million"))) == 1
    assert "not timed, for it is wrong: off by 1" in capsys.readouterr().err
    written = json.loads(out.read_text())
    assert written["topk"] == FOUND["topk"] and "million" not in written


def test_a_run_ends_with_the_table_and_the_figures(a_device, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(stages.PARTS, "lengths", lambda: FOUND["lengths"])
    out = tmp_path / "results.json"
    assert prefill.run(prefill.PrefillOptions(out, ("lengths",), tmp_path)) == 0
    shown = capsys.readouterr().out
    assert "Whole prompts" in shown and f"{tmp_path / 'results.svg'}: drawn" in shown


# -- correct before fast --------------------------------------------------------------------------
def few_inputs(n: int) -> cases.Inputs:
    random = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=random).bfloat16()

    return cases.Inputs(
        normal(n, HEADS, DIM), normal(n, GROUPS, DIM), normal(n, GROUPS, DIM),
        normal(n, GROUPS, DIM), normal(n, DIM), Sequences.one(n, n),
    )  # fmt: skip


def causal_attention(x: cases.Inputs) -> torch.Tensor:
    q, k, v = (t.transpose(0, 1)[None].float() for t in (x.q, x.k, x.v))
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def test_a_wrong_baseline_is_not_timed(monkeypatch):
    x = few_inputs(200)
    right = causal_attention(x)
    monkeypatch.setattr(dense, "timed", lambda call, graph: {"ms": 1.0})
    row = dense.checked(x, lambda: right, causal=True)
    assert row["ms"] == 1.0 and row["error"] < 0.02
    wrong = right.clone()
    wrong[-1, 5] += 0.1
    assert "Wrong: dense attention is off by 0.1" in dense.checked(x, lambda: wrong, causal=True)
    assert "Wrong" in dense.checked(x, lambda: right, causal=False)


def test_flash_attention_4_is_timed_or_said_to_be_absent(monkeypatch):
    x = few_inputs(130)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert dense.flash_attention_4(x).startswith("not installed: ")
    module = ModuleType("flash_attn.cute")
    module.flash_attn_func = lambda q, k, v, causal: (causal_attention(x)[None], None)
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", module)
    monkeypatch.setattr(dense, "timed", lambda call, graph: {"ms": 1.0})
    assert dense.flash_attention_4(x)["ms"] == 1.0


def test_attention_that_is_off_is_wrong(monkeypatch):
    x = few_inputs(200)
    ids = torch.tensor([[0, -1], [0, 1]], dtype=torch.int32).repeat_interleave(
        torch.tensor([128, 72]), 0
    )
    chosen = Selection(ids[:, None].repeat(1, GROUPS, 1), x.sequences, CONFIG.block_size)
    result = type("Result", (), {})()
    result.out, result.lse = causal_attention(x), torch.stack([
        torch.cat([checks.exact(x, i, r, slice(0, i + 1))[1] for r in range(GROUPS)])
        for i in range(200)
    ])  # fmt: skip
    monkeypatch.setattr(checks, "attend_selection", lambda *given: result)
    assert checks.check_attention(x, chosen, "auto") < 1e-4
    result.lse[0, 3] += 0.1
    with pytest.raises(checks.Wrong, match="auto attention"):
        checks.check_attention(x, chosen, "auto")


def test_score_lost_is_the_share_that_a_worse_choice_gives_away():
    x = few_inputs(4 * CONFIG.block_size)
    scores = checks.past_scores(x.q_idx, x.k_idx, x.sequences, len(x.q) - 1)
    assert scores.shape == (GROUPS, 3)
    order = scores.argsort(1, descending=True).int()
    rest = torch.full((len(x.q), GROUPS, 2), 3, dtype=torch.int32)
    fine, coarse = (rest.clone() for _ in range(2))
    fine[..., 0], coarse[..., 0] = -1, -1
    fine[-1, :, 0], coarse[-1, :, 0] = order[:, 0], order[:, 1]
    assert checks.score_lost(x, fine, fine) == 0
    best, second = scores.sort(1, descending=True).values[:, :2].double().sum(0)
    assert checks.score_lost(x, fine, coarse) == pytest.approx(float(1 - second / best))


def test_bytes_are_those_of_the_tensors():
    x, n = few_inputs(256), 256
    ids = torch.empty((n, GROUPS, CONFIG.top_k), dtype=torch.int32)
    lse = torch.empty((n, HEADS))
    assert counts.select_bytes(x.sequences) == sum(t.nbytes for t in (x.q_idx, x.k_idx, ids))
    once = sum(t.nbytes for t in (x.q, x.k, x.v, x.q, lse, ids))
    assert counts.walk_bytes(x.sequences) == once
    every = counts.partial_bytes(n * GROUPS)  # one edge of each query and group
    assert every == 3 * x.q.nbytes + 4 * lse.nbytes  # highest score and sum, written and read
    scores = torch.empty(10, 64)
    assert counts.topk_bytes(10, 64, 4) == scores.nbytes + 10 * 4 * 4


# -- table and figures ----------------------------------------------------------------------------
def shown(found: dict) -> str:
    console = Console(record=True, width=120, file=io.StringIO())
    prefill_table.show(found, console)
    return console.export_text()


def test_the_table_shows_the_committed_results():
    text = shown(FOUND)
    longest = FOUND["lengths"][-1]
    stage = next(s for s in longest["attention"] if s["keep"] == 0.95)
    assert f"{longest['cudnn']['ms'] / stage['whole']['ms']:.1f}×" in text
    assert f"{FOUND['production']['weighted_ms']:.3f} ms" in text
    assert f"{FOUND['million']['whole_keep_0.95']['bf16']['ms'] / 1e3:.2f} s" in text
    assert "…" not in text  # no text is cut off
    for row in FOUND["lengths"]:
        assert f"{row['n'] // 1024}K" in text


def test_the_table_shows_both_kinds_of_kernels():
    """Where the hopper kernels run, results time both kinds."""
    found = copy.deepcopy(FOUND)
    for row in found["lengths"]:
        beside = {f"portable_{kind}": {"ms": 77.7} for kind in ("bf16", "fp8_e4m3")}
        row["select"] |= {"kernels": "hopper"} | beside
    for row in found["topk"]:
        row["hopper"] = {"ms": row["torch"]["ms"] / 27}
    for row in found["production"]["cases"]:
        row["eight"] = {"ms": 55.5, "rounding": 0.0312}
    found["production"]["weighted_eight_ms"] = 44.4
    text = shown(found)
    assert text.count("55.5") == len(found["production"]["cases"])
    assert "8 bits 44.400 ms" in text and "changes outputs by up to 3.1%" in text
    assert "(hopper kernels)" in text and text.count("77.7") == 2 * len(found["lengths"])
    assert text.count("27.0×") == len(found["topk"]) and "…" not in text
    for row in found["lengths"]:
        row["select"]["kernels"] = "portable"
    text = shown(found)
    assert "(portable kernels)" in text and "77.7" not in text


@pytest.mark.gpu
def test_the_top_k_is_timed_by_the_kernels_of_this_gpu(monkeypatch):
    monkeypatch.setattr(topk_stages, "timed", lambda call: {"ms": float(call() is None)})
    for blocks in (100, 257, 1024):  # without maxima, and with them; not always whole pieces
        row = topk_stages.topk_rows(512, blocks, 16)
        assert ("hopper" in row) == (choose("auto", usual_call()) == "hopper")


def test_what_was_not_measured_is_a_dash_with_its_reason():
    found = copy.deepcopy(FOUND)
    for row in found["lengths"]:
        row["fa4"] = "not installed: No module named 'flash_attn'"
    text = shown(found)
    assert text.count("fa4: not installed") == 1
    assert re.search(r"8K +[\d.]+ +[\d.]+ +– ", text)


def test_figures_are_drawn_alike_from_the_same_results(tmp_path):
    once, again = (plots.draw(RESULTS, tmp_path / name) for name in "ab")
    assert [p.name for p in once] == [p.name for p in again]
    drawn = [path for path, reason in once.items() if not reason]
    names = {f"{RESULTS.stem}{suffix}.svg" for suffix in ("", "_roofline", "_union")}
    assert names == {path.name for path in drawn}
    for path in drawn:
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
        assert f"<dc:source>{plots.source(RESULTS)}</dc:source>" in path.read_text()


def test_committed_figures_are_those_of_the_committed_results(tmp_path):
    """Redraw them with `msa bench plots` after a new run."""
    drawn = {p.name for p, reason in plots.draw(RESULTS, tmp_path).items() if not reason}
    committed = {path.name: path for path in (ROOT / "docs").glob("prefill*.svg")}
    assert set(committed) == drawn
    for path in committed.values():
        assert f"<dc:source>{plots.source(RESULTS)}</dc:source>" in path.read_text(), path


def with_ceilings() -> dict:
    """The committed results, with values added that the roofline needs and they lack."""
    found = copy.deepcopy(FOUND)
    found.setdefault(
        "ceilings", {"copy_tbps": 3.0, "bf16_tflops": 700.0, "fp8_tflops": 1300.0}
    )  # fmt: skip
    for row in found["lengths"]:
        counted = [row["select"]["bf16"], row["select"]["fp8_e4m3"]]
        for stage in row["attention"]:
            counted += [stage[name] for name in ("auto", "kv_outer", "union", "reverse_index")]
        for stage in counted:
            stage.setdefault("gb", 1.0)
            stage.setdefault("gop", 1.0)
    for row in found["topk"]:
        row |= {"gop": 1.0, "gb": 4.0} | row
    return found


def test_the_roofline_needs_ceilings(tmp_path, capsys):
    full = with_ceilings()
    for name, found in (
        ("full", full),
        ("less", {k: v for k, v in full.items() if k != "ceilings"}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
        options = plots.PlotsOptions(tmp_path / f"{name}.json", tmp_path)
        assert plots.run(options) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path / 'full_roofline.svg'}: drawn" in said
    assert f"{tmp_path / 'less_roofline.svg'}: not drawn, the results have no 'ceilings'" in said
    assert not (tmp_path / "less_roofline.svg").exists()


def test_without_the_baseline_no_gain_is_drawn(tmp_path, capsys):
    found = copy.deepcopy(FOUND)
    found["lengths"][0]["cudnn"] = "RuntimeError: no cuDNN"
    (tmp_path / "found.json").write_text(json.dumps(found))
    assert plots.run(plots.PlotsOptions(tmp_path / "found.json", tmp_path)) == 0
    assert "found.svg: not drawn, the results lack a time of 'cudnn'" in capsys.readouterr().out


def test_plots_without_results_say_so(capsys, tmp_path):
    missing = tmp_path / "none.json"
    assert cli.main(["bench", "plots", "--results", str(missing)]) == 2
    assert f"results must be a file, got {missing}" in capsys.readouterr().err
