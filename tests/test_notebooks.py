"""The notebooks of the chapters, and that what a page shows runs where the reader is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from docs.hooks import address, notebooks

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [p for p in sorted(DOCS.rglob("*.md")) if 'source="above"' in p.read_text()]
CHAPTERS = sorted((DOCS / "chapters").glob("*.md"))
VARIABLE = 'os.environ["TRITON_INTERPRET"] = "1"'


def shown(path: Path) -> list[str]:
    """The code that a page shows, block by block."""
    return [
        textwrap.dedent(block[3]) for block in notebooks.BLOCK.finditer(path.read_text())
        if 'source="above"' in block[2]
    ]  # fmt: skip


def in_the_interpreter(path: Path) -> str:
    """The block of a page that says how to run without a GPU."""
    return next(code for code in shown(path) if VARIABLE in code)


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_code_that_is_shown_uses_no_hidden_name(path):
    assert notebooks.unknown_names(path) == []


def test_a_hidden_name_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        '```python exec="1"\nimport secret\n```\n\n'
        '```python exec="1" source="above"\nsecret.x\n```\n'
    )
    assert notebooks.unknown_names(page) == ["secret"]


def test_kernels_of_the_pages_run_in_a_fresh_python():
    """As printed: the variable is set by the code itself, and not by whoever starts Python."""
    pages = [p for p in PAGES if VARIABLE in p.read_text()]
    assert len(pages) == 5
    code = "\n".join(f"exec({in_the_interpreter(path)!r}, {{}})" for path in pages)
    free = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
        env=free | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "False" not in done.stdout


def test_whoever_names_triton_says_how_to_run_it():
    for path in CHAPTERS:
        text = "\n".join(shown(path))
        if 'backend="triton"' in text or "import triton" in text:
            assert VARIABLE in text, path.stem


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_a_notebook_has_the_cells_of_its_chapter(path):
    cells = notebooks.make(path)["cells"]
    code = [cell["source"] for cell in cells if cell["cell_type"] == "code"]
    assert len(code) == 1 + len(notebooks.BLOCK.findall(path.read_text()))
    assert "git" in code[0] and "shown" in code[0]
    for source in code:
        compile(source, path.stem, "exec")
    prose = "\n".join(cell["source"] for cell in cells if cell["cell_type"] == "markdown")
    assert not re.search(r"^```python exec|^\?\?\?|markdown>", prose, re.M)


def test_links_lead_to_notebooks_and_pages():
    for path in CHAPTERS:
        for cell in notebooks.make(path)["cells"]:
            if cell["cell_type"] == "markdown":
                assert not re.search(r"\]\((?!http)[^)]*\.md", cell["source"]), path.stem


def test_the_address_of_the_repository_is_a_line_of_configuration(tmp_path, monkeypatch):
    places = {"clone": "https://host.example/us/msa-stack.git", "colab": "https://colab.example/nb"}
    path, text = tmp_path / "mkdocs.yml", (ROOT / "mkdocs.yml").read_text()
    monkeypatch.setattr(address, "CONFIGURATION", path)

    def configure(**values):
        changed = text
        for name, value in values.items():
            changed, found = re.subn(rf'(?m)^  {name}: "[^"]*"', f'  {name}: "{value}"', changed)
            assert found == 1
        path.write_text(changed)

    configure(clone="", colab="")
    assert "Colab" not in notebooks.links("02-gqa") and "ADDRESS" in address.install()
    configure(**places)
    assert 'href="https://colab.example/nb/02-gqa.ipynb"' in notebooks.links("02-gqa")
    assert f"git clone {places['clone']} msa-stack" in address.install()
    (first, *_) = [c for c in notebooks.make(CHAPTERS[1])["cells"] if c["cell_type"] == "code"]
    assert places["clone"] in first["source"]


def test_notebooks_follow_the_format_and_run(tmp_path):
    """The second chapter in a kernel; the code of all others runs when the site is built."""
    pytest.importorskip("nbformat", reason="make install brings it, make test does not")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    import nbformat

    made = notebooks.write(tmp_path)
    assert len(made) == len(CHAPTERS)
    notebook = nbformat.read(made[1], as_version=4)
    where = {"metadata": {"path": str(ROOT)}}
    done = nbclient.NotebookClient(notebook, timeout=60, resources=where).execute()
    outputs = [out for cell in done.cells for out in cell.get("outputs", ())]
    assert any("html" in str(out.get("data", {}).keys()) for out in outputs)
