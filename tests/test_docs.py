"""The documents are right: docstring examples, and the code and commands of the README, run."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from benchmarks.reading import best_dense
from msa import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language in the README."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.S | re.M)


def commands() -> list[str]:
    """Every command line in the README's console blocks, without its comment."""
    return [
        line.split("#")[0].strip()
        for block in blocks("console")
        for line in block.splitlines()
        if line.split("#")[0].strip()
    ]


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("msa ")])
def test_msa_commands_run(command, tmp_path, monkeypatch, capsys):
    words = shlex.split(command)[1:]
    monkeypatch.chdir(tmp_path)
    benchmark = words[0] == "bench"  # not measured here: without a device it must say so
    if benchmark:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    try:
        code = cli.main(words)
    except SystemExit as end:  # of --help
        code = end.code
    said = capsys.readouterr()
    if benchmark:
        assert "needs a CUDA device" in said.err
    assert code == (2 if benchmark else 0), said.out + said.err
    for word in words:
        if word.endswith(".png"):
            assert (tmp_path / word).stat().st_size > 10_000


def test_every_command_is_of_a_known_kind():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for command in commands():
        program, *words = shlex.split(command)
        assert program == "msa" or (program == "make" and set(words) <= targets), command
    assert {"make demo", "make test"} <= set(commands())


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code, capsys):
    if "import transformers" in code:
        pytest.importorskip("transformers")
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out


def test_measured_figures_are_those_of_the_results():
    results = ROOT / "benchmarks" / "results"
    cpu = json.loads((results / "crossing_cpu.json").read_text())
    assert f"{cpu['crossing_tokens']:,.0f} tokens" in README
    gains = [
        f"{t['dense']['median'] / t['msa']['median']:.1f}× at {int(n) // 1024}K"
        for n, t in cpu["seconds"].items()
        if int(n) >= 8192
    ]
    assert ", ".join(gains) in README
    gpu = json.loads((results / "prefill_h100.json").read_text())
    training = json.loads((results / "train_h100.json").read_text())
    assert "H100" in gpu["device"] and "H100" in training["device"]
    prompts = [
        (row["n"], row["cudnn"]["ms"], stage["whole"]["ms"])
        for row in gpu["lengths"] for stage in row["attention"]
        if row["n"] >= 8192 and stage["keep"] == 0.95
    ]  # fmt: skip
    steps = [
        (row["n"], row["dense"]["ms"], sparse["step"]["ms"])
        for row in training["steps"] for sparse in row["sparse"] if sparse["keep"] == 0.95
    ]  # fmt: skip
    assert len(prompts) >= 3 and len(steps) == 3
    for rows in (prompts, steps):
        gains = [f"{dense / ours:.1f}× at {n // 1024}K" for n, dense, ours in rows]
        assert ", ".join(gains) in README
    decoding = json.loads((results / "decode_h100.json").read_text())
    assert "H100" in decoding["device"]
    gain = {
        (row["batch"], row["context"], form): f"{best_dense(row) / row[form]['step']['us']:.1f}×"
        for row in decoding["steps"]
        for form in ("bf16", "fp8 index")
    }
    one, four = (gain[b, n, "bf16"] for b, n in ((1, 2**17), (4, 2**20)))
    assert f"{one} at 128K, {gain[1, 2**20, 'bf16']} at 1M; {four} for four" in README
    assert f"in 8 bits {gain[4, 2**20, 'fp8 index']}" in README
    ways = json.loads((results / "integrations_h100.json").read_text())["lengths"]["ways"]
    eager, sdpa, _, ours = ({row["n"]: row for row in rows} for rows in ways.values())
    gains = [f"{x[8192]['time']['ms'] / ours[8192]['time']['ms']:.1f}×" for x in (eager, sdpa)]
    assert f"{'; '.join(gains)} at 8K" in README
    assert eager[16384]["ends"] == sdpa[16384]["ends"] == "out of memory"
    last = ours[131072]
    assert f"{last['time']['ms'] / 1000:.2f} s and {last['gib']:.1f} GiB at 128K" in README


def test_files_that_the_readme_names_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    tree = re.search(r"^```\nmsa/\n(.*?)^```", README, re.S | re.M)
    assert tree is not None
    for line in tree[1].splitlines():
        inside = line.startswith("  ")
        for name in re.findall(r"^(?:  )?((?:[\w.]+/? )+)", line)[0].split():
            if "." in name or name.endswith("/"):
                assert ((ROOT / "msa" if inside else ROOT) / name).exists(), name
