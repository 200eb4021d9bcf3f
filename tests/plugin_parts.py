"""Entry points of the project as pip would install them, for the loaders of serving engines."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import engine_files
from msa.triton_impl.launch import INTERPRETED

ROOT = Path(__file__).parent.parent


def entry_points_of_the_project(folder, monkeypatch, engines):
    """Make the entry points of pyproject.toml, and engines of these versions, known to Python."""
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    for name, version in {"msa-stack": "0", **engines}.items():
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        if name == "msa-stack":
            (info / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(folder))


def needs(engine):
    """Marks for tests that run an engine's files in Triton's interpreter, with reasons."""
    why = engine_files.missing(engine)
    slow = "needs TRITON_INTERPRET=1; `msa bench serving` compares on a GPU"
    return [
        pytest.mark.skipif(why is not None, reason=str(why)),
        pytest.mark.skipif(not INTERPRETED, reason=slow),
    ]
