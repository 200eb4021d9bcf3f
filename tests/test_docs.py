"""The documents are right: docstring examples, and the code and commands of the README, run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from docs.hooks import readme
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


@pytest.mark.parametrize("page", readme.PAGES)
def test_measured_numbers_and_figures_are_those_of_the_results(page):
    """`python -m docs.hooks.readme` writes them anew."""
    text = (ROOT / page).read_text()
    assert readme.renewed(text) == text
    figures = [found[0] for found in readme.FIGURE.finditer(text)]
    assert figures and all((ROOT / "docs" / name).exists() for name in figures)


def test_the_readme_has_the_table_of_the_results():
    table = readme.measured()
    assert table in README and len(table.splitlines()) == 7
    changed = README.replace("× at 128K", "× at 127K")
    assert changed != README and readme.renewed(changed) == README


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
