"""One notebook for each chapter, from the same Markdown as the site.

    python -m docs.hooks.notebooks [folder]     # default: site/notebooks

Code that a page shows becomes a cell. Code that a page only runs, for figures, tables and exercises,
becomes a cell too, folded, which shows what that code prints. The first cell installs the project
from a checkout, or makes one where the address is configured (`extra.clone` in mkdocs.yml).
"""

from __future__ import annotations

import ast
import builtins
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

from docs.hooks import address

ROOT = Path(__file__).parents[2]
CHAPTERS = ROOT / "docs" / "chapters"
BLOCK = re.compile(r'^( *)```python exec="1"([^\n]*)\n(.*?)^\1```\n?', re.S | re.M)
FIRST = """\
# Run this cell first. It needs Python 3.11 or newer and a checkout of the repository.
import os
import subprocess
import sys
from pathlib import Path

root = next((p for p in (Path.cwd(), *Path.cwd().parents) if (p / "msa" / "api.py").exists()), None)
if root is None:  # such as on Colab
    address = "{clone}"
    if "/" not in address:
        raise SystemExit("Open this notebook in a checkout, or write its address into this cell.")
    subprocess.run(["git", "clone", "--quiet", address, "msa-stack"], check=True)
    root = Path("msa-stack").resolve()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "-e", f"{{root}}[all]"]
    subprocess.run(install, check=True)
os.chdir(root)
sys.path.insert(0, str(root))
os.environ["TRITON_INTERPRET"] = "1"  # without a GPU; with one, leave this line out
from docs.hooks.shown import shown, style

style()
"""


def make(path: Path) -> dict[str, Any]:
    """The notebook of a page, as the JSON that nbformat 4.5 describes."""
    text = re.sub(r"\A---\n.*?\n---\n+", "", path.read_text(), flags=re.S)
    title, _, text = text.partition("\n")
    cells = [markdown(title), code(FIRST.format(clone=address.clone()), "install")]
    end = 0
    for block in BLOCK.finditer(text):
        cells += [markdown(part) for part in [words(text[end : block.start()])] if part]
        body = textwrap.dedent(block[3]).strip()
        cells.append(code(body) if 'source="above"' in block[2] else hidden(body, block[2]))
        end = block.end()
    cells += [markdown(part) for part in [words(text[end:])] if part]
    for number, cell in enumerate(cells):
        cell["id"] = f"{path.stem}-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    about = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"nbformat": 4, "nbformat_minor": 5, "metadata": about, "cells": cells}


def words(text: str) -> str:
    """Prose of a page for a notebook: no attributes, questions in bold.

    A link to a chapter leads to its notebook, any other link to a page of the site, beside whose
    pages the folder of notebooks lies.

    >>> words("[a](02-gqa.md#x), [b](../model.md#y)")
    '[a](02-gqa.ipynb), [b](../model.html#y)'
    >>> words('??? question "Why?"\\n    Because.')
    '**Why?**\\n\\nBecause.'
    """
    text = re.sub(r'<p class="(\w+)" markdown>(.*?)</p>', r"*\2*", text, flags=re.S)
    text = re.sub(r"\]\((\d\d-[\w-]+)\.md[^)]*\)", r"](\1.ipynb)", text)
    text = re.sub(r"\]\((\.\./[^)#]+)\.md(#[^)]*)?\)", r"](\1.html\2)", text)
    text = re.sub(r'^\?\?\? \w+ "(.*)"$', r"**\1**\n", text, flags=re.M)
    text = re.sub(r"^ {4}(?=\S)", "", text, flags=re.M)
    text = text.replace("\\(", "$").replace("\\)", "$").replace("\\[", "$$").replace("\\]", "$$")
    return text.strip()


def markdown(text: str) -> dict[str, Any]:
    """A cell of prose."""
    return {"cell_type": "markdown", "metadata": {}, "source": text}


def code(body: str, *tags: str) -> dict[str, Any]:
    """A cell of code without output."""
    data = {"tags": list(tags)} if tags else {}
    return {
        "cell_type": "code", "metadata": data, "source": body, "outputs": [], "execution_count": None,
    }  # fmt: skip


def hidden(body: str, options: str) -> dict[str, Any]:
    """A folded cell that shows what a page's code prints: HTML or Markdown."""
    kind = "html" if 'html="1"' in options else "markdown"
    cell = code(f'with shown("{kind}"):\n{textwrap.indent(body, "    ")}', "figure")
    cell["metadata"]["jupyter"] = {"source_hidden": True}
    return cell


def unknown_names(path: Path) -> list[str]:
    """Names that the code which a page shows uses before that code defines them.

    A reader who copies all of it into a fresh Python would get a NameError.
    """
    known = {*dir(builtins), "__name__"}
    missing: list[str] = []
    for block in BLOCK.finditer(path.read_text()):
        if 'source="above"' not in block[2]:
            continue
        tree = ast.parse(textwrap.dedent(block[3]))
        own = known | defined(tree)
        used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        missing += sorted(used - own)
        known |= defined(tree)
    return missing


def defined(tree: ast.AST) -> set[str]:
    """Every name that code binds anywhere."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(a.asname or a.name).split(".")[0] for a in node.names}
    return names


def links(chapter: str) -> str:
    """A line for the page of a chapter: its notebook, and Colab if that is configured."""
    name = f"{chapter}.ipynb"
    colab = address.colab(name)
    badge = f' · <a href="{colab}">Open it in Colab</a>' if colab else ""
    return f'<p class="source"><a href="../notebooks/{name}" download>This chapter as a notebook</a>{badge}</p>'


def write(folder: Path) -> list[Path]:
    """Write the notebooks of all chapters, each checked against the format's schema."""
    import nbformat

    folder.mkdir(parents=True, exist_ok=True)
    made: list[Path] = []
    for path in sorted(CHAPTERS.glob("*.md")):
        notebook = nbformat.from_dict(make(path))
        nbformat.validate(notebook)
        made.append(folder / f"{path.stem}.ipynb")
        nbformat.write(notebook, made[-1])
    return made


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "site" / "notebooks"
    print(f"{len(write(target))} notebooks in {target}")
