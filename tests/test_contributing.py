"""CONTRIBUTING and other files: paths exist, hooks are those of `make lint`, versions agree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import msa
from docs.hooks import included

ROOT = Path(__file__).parent.parent
TEXTS = ("DESIGN.md", "CONTRIBUTING.md", "README.md")
MADE = ("benchmarks/NAME", "msa/NAME", "msa/triton_impl/NAME", "msa/triton_impl/hopper/NAME",
        "benchmarks/figures/NAME", "benchmarks/run",
        "msa/reference/X", "msa/torch_impl/X", "msa/triton_impl/X")  # fmt: skip
"""Prefixes of paths that mean new files, results of a run, or the file of any step."""
FOLDERS = ("msa/", "docs/", "tests/", "exercises/", "benchmarks/", "examples/")


def paths(text: str) -> list[str]:
    """Everything in code style that looks like a path of the repository."""
    words = [word for code in re.findall(r"`([^`\n]+)`", text) for word in code.split()]
    return [w for w in words if w.startswith(FOLDERS) and not w.startswith(MADE)]


@pytest.mark.parametrize("name", TEXTS)
def test_every_path_that_is_named_exists(name):
    named = paths((ROOT / name).read_text())
    assert named
    missing = [path for path in named if not (ROOT / path.partition("::")[0]).exists()]
    assert not missing


def test_contributing_answers_ten_questions():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| (Where .*?\?) \| (.*) \|$", text, re.M)
    assert len(rows) >= 10
    for question, answer in rows:
        assert paths(answer), question


def test_names_in_the_instructions_are_in_their_files():
    """A name in capitals, or in parentheses of code, stands in the file of the same line."""
    for item in re.findall(r"^\d\. (.*?)(?=^\d\. |^$)", instructions(), re.M | re.S):
        for path, names in re.findall(r"`([\w/]+\.py)`: ([^;.]*)", item):
            for name in re.findall(r"`([A-Z_]{4,}|[a-z]+_[a-z_]+)`", names):
                if not path.startswith(MADE):
                    assert name in (ROOT / path).read_text(), (path, name)


def instructions() -> str:
    """The part of CONTRIBUTING from the first recipe on."""
    return (ROOT / "CONTRIBUTING.md").read_text().partition("## Add a backend")[2]


def test_hooks_are_what_make_lint_runs():
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    assert recipe is not None
    wanted = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe[1].splitlines()]
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["entry"] for hook in local["hooks"]] == wanted


def test_the_version_is_written_once():
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.findall(r"^## (.*)$", changelog, re.M)[0] == "Unreleased"
    assert f"\n## {msa.__version__} - 20" in changelog


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")))
def test_issue_forms_ask_for_the_doctor(path):
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= set(form)
    fields = {part["id"]: part for part in form["body"]}
    assert "msa doctor" in fields["doctor"]["attributes"]["label"]
    assert all(part["validations"]["required"] for part in form["body"])


def test_pages_of_the_site_show_these_texts():
    for name in ("DESIGN.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        assert included.body(name).strip()
    assert "](contributing.html)" in included.body("DESIGN.md")
    with pytest.raises(LookupError, match="must lead to a page"):
        included.on_the_site("msa/api.py")
