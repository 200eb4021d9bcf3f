"""`msa exercise`: check the code that a reader has written for a chapter.

An exercise is a file `exercises/chNN_name.py` that is unfinished or wrong. Its check is a function
of `exercises/checks.py` or `exercises/checks_kernels.py`, and its solution has the same name in
`exercises/solutions/`.
"""

from __future__ import annotations

import importlib.util
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import tyro
from rich.console import Console

FOLDER = Path(__file__).parent
Check = Callable[[Any], None]


class Wrong(Exception):
    """What a check found wrong, in words for the reader."""


@dataclass(frozen=True, kw_only=True)
class ExerciseOptions:
    """Check the code that you have written for a chapter's exercise, and say what is wrong.

    The files are in `exercises/`. Kernels run in Triton's interpreter, so no GPU is needed.
    """

    chapter: tyro.conf.Positional[int | None] = None
    """The number of a chapter. None: check all exercises and list which of them are done."""
    file: Path | None = None
    """Your file, if it is not the one in `exercises/`."""


def run(options: ExerciseOptions) -> int:
    """Check one exercise, or list all of them; 1 if one that was asked for is not right.

    Raises:
        ValueError: there is no such chapter or file.
    """
    console = Console()
    if options.chapter is None:
        if options.file is not None:
            raise ValueError("file must be given with the number of a chapter, got no chapter")
        for chapter, path in starters().items():
            done = "open" if fault(chapter, path) else "done"
            console.print(f"{chapter:3}  {done}  exercises/{path.name}", highlight=False)
        return 0
    files = starters()
    if options.chapter not in files:
        raise ValueError(f"chapter must be one of 1 to {max(files)}, got {options.chapter}")
    path = files[options.chapter] if options.file is None else options.file
    if not path.is_file():
        raise ValueError(f"file must be a Python file, got {path}")
    wrong = fault(options.chapter, path)
    console.print(wrong or f"exercise {options.chapter}: right", highlight=False, markup=False)
    return int(bool(wrong))


def starters() -> dict[int, Path]:
    """The file of each chapter's exercise."""
    return {int(path.name[2:4]): path for path in sorted(FOLDER.glob("ch[0-9][0-9]_*.py"))}


def solution(chapter: int) -> Path:
    """The file that passes the check of a chapter."""
    return FOLDER / "solutions" / starters()[chapter].name


def check_of(chapter: int) -> Check:
    """The check of a chapter."""
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported
    from exercises import checks, checks_kernels

    return {**checks.CHECKS, **checks_kernels.CHECKS}[chapter]


def fault(chapter: int, path: Path) -> str:
    """What is wrong with a file, or an empty string."""
    check = check_of(chapter)
    try:
        with np.errstate(all="ignore"):
            check(load(path))
    except Wrong as error:
        return f"exercise {chapter}: {error}"
    except (Exception, SystemExit) as error:  # of the reader's code: where, and what Python says
        own = {str(path), str(path.resolve())}
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename in own]
        line = f", line {frames[-1].lineno}: {frames[-1].line}" if frames else ""
        return f"exercise {chapter}: {type(error).__name__}: {error}\n  {path.name}{line}"
    return ""


def load(path: Path) -> ModuleType:
    """Import a file under its own name, anew each time."""
    spec = importlib.util.spec_from_file_location(f"exercise_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def close(what: str, got: Any, wanted: Any, bound: float = 1e-6) -> None:
    """Compare numbers.

    Raises:
        Wrong: they differ by more than the bound, or have another shape.
    """
    a, b = np.asarray(got, float), np.asarray(wanted, float)
    if a.shape != b.shape:
        raise Wrong(f"{what}: the shape must be {list(b.shape)}, got {list(a.shape)}")
    if not np.allclose(a, b, bound, bound):
        raise Wrong(f"{what}: {shown(b)} is right, got {shown(a)}")


def shown(x: np.ndarray) -> str:
    """A few numbers of an array.

    >>> shown(np.arange(9.0))
    '[0, 1, 2, 3, 4, 5, ...]'
    """
    first = [f"{value:.6g}" for value in x.ravel()[:6]]
    return f"[{', '.join(first)}{', ...' if x.size > 6 else ''}]" if x.ndim else first[0]
