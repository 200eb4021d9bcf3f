"""Source code on the pages: listings with an anchor for each line, excerpts, links to lines."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from html import escape
from pathlib import Path

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "msa/reference": "source-reference", "msa/torch_impl": "source-torch",
    "msa/triton_impl": "source-triton", "msa/triton_impl/hopper": "source-hopper",
    "msa/model": "source-model",
    "msa/training": "source-training", "msa/ablations": "source-ablations",
    "msa/demo": "source-demo",
    "msa/serving": "source-serving", "msa/integrations": "source-integrations",
    "msa": "source-package", "tests": "source-tests",
}  # fmt: skip


def page_of(path: str) -> str:
    """The page that lists a file, seen from a folder beside `reference/`.

    Raises:
        KeyError: for a file that no page lists.
    """
    return f"../reference/{FOLDERS[str(Path(path).parent)]}.html"


def anchor_of(path: str, line: int) -> str:
    """The name of one line of a listing."""
    return f"{Path(path).stem.replace('_', '-')}-{line}"


def lines_of(path: str, name: str) -> tuple[int, int]:
    """First and last line of a function or class of a file, decorators included.

    Raises:
        LookupError: if the file has no such name.
    """
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        kinds = ast.FunctionDef | ast.ClassDef
        if isinstance(node, kinds) and node.name == name:
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            return first, node.end_lineno or first
    raise LookupError(f"{path} has no {name}")


def link(path: str, name: str | None = None) -> str:
    """A link to a file's listing, or to the line where a name of it begins."""
    line = lines_of(path, name)[0] if name else 1
    words = f"{path}, line {line}: {name}" if name else path
    return f'<a href="{page_of(path)}#{anchor_of(path, line)}">{escape(words)}</a>'


def links(*targets: str) -> str:
    """ "In the source:" with links; a target is `path` or `path:name`."""
    found = [link(*target.partition(":")[::2]) for target in targets]
    return f'<p class="source">In the source: {" · ".join(found)}</p>'


def excerpt(path: str, name: str, skip_docstring: bool = False) -> str:
    """The code of a function, and a link to its place in the file."""
    first, last = lines_of(path, name)
    lines = (ROOT / path).read_text().splitlines()[first - 1 : last]
    code = textwrap.dedent("\n".join(lines)) + "\n"
    if skip_docstring:
        body = ast.parse(code).body[0]
        assert isinstance(body, ast.FunctionDef | ast.ClassDef)
        doc = body.body[0]
        kept = code.splitlines()
        code = "\n".join(kept[: doc.lineno - 1] + kept[doc.end_lineno :]) + "\n"
    html = highlight(code, PythonLexer(), HtmlFormatter(cssclass="highlight", wrapcode=True))
    return f'<div class="listing">{html}</div><p class="source">{link(path, name)}</p>'


def pseudocode(path: str) -> str:
    """The docstring at the head of a kernel's file: the pseudocode, and what the kernel changes.

    Raises:
        LookupError: if the file does not begin with a docstring.
    """
    words = ast.get_docstring(ast.parse((ROOT / path).read_text()))
    if not words:
        raise LookupError(f"{path} has no docstring")
    return re.sub(
        r"(?m)^(?= 1\. )", "\n", inspect.cleandoc(words)
    )  # Markdown needs an empty line before a list


def listing(folder: str) -> str:
    """Every file of a folder, each under a heading, each line with an anchor."""
    parts: list[str] = []
    for path in sorted((ROOT / folder).glob("*.py")):
        name = str(path.relative_to(ROOT))
        style = HtmlFormatter(
            cssclass="highlight", linenos="inline", anchorlinenos=True,
            lineanchors=path.stem.replace("_", "-"),
        )  # fmt: skip
        html = highlight(path.read_text() or "# empty\n", PythonLexer(stripnl=False), style)
        heading = path.stem.replace("_", "-")
        parts.append(f'<h2 id="{heading}">{escape(name)}</h2><div class="listing">{html}</div>')
    return "\n".join(parts)
