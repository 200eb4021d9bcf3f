"""The exercise of a chapter that is done, not read: its starter, what the check says, a solution."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

from exercises import run


def section(chapter: int) -> str:
    """The exercise as Markdown, with its solution folded.

    Raises:
        ValueError: the solution does not pass the check.
    """
    path, solved = run.starters()[chapter], run.solution(chapter)
    wrong, left = run.fault(chapter, path), run.fault(chapter, solved)
    if left:
        raise ValueError(f"the solution must pass, got {left}")
    words, code = parts(path)
    title, _, rest = words.partition("\n")
    name = f"exercises/{path.name}"
    title = re.sub(r"^Chapter \d+: ", "", title).rstrip(".")
    task = f"{rest.strip()}\n\n" if rest.strip() else ""
    body = (
        f"{task}Edit `{name}` in your checkout:\n\n{fenced(code)}\n\n"
        f"Run `msa exercise {chapter}` after each change. Now it says:\n\n{fenced(wrong, 'text')}"
    )
    answer = textwrap.indent(fenced(parts(solved)[1]), "    ")
    folded = f'??? success "A solution"\n{answer}'
    inner = textwrap.indent(f"{body}\n\n{folded}", "    ")
    return f'??? example "Do it: {title[0].lower()}{title[1:]}"\n{inner}\n'


def parts(path: Path) -> tuple[str, str]:
    """The docstring of a file, and what follows it."""
    text = path.read_text()
    first = ast.parse(text).body[0]
    assert isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return str(first.value.value).strip(), "\n".join(text.splitlines()[first.end_lineno :]).strip()


def fenced(code: str, language: str = "python") -> str:
    """A fenced block."""
    return f"```{language}\n{code.rstrip()}\n```"
