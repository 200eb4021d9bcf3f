"""The imports between the files of the model, its training, the ablations and the demos."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "msa"
ROOMS = {  # each package, and which of the others it may import
    "model": set(),
    "training": {"model"},
    "ablations": {"model", "training"},
    "demo": {"model", "training"},
}
FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for room in ROOMS
    for path in (PACKAGE / room).rglob("*.py")
}


def imported(path: Path) -> set[str]:
    """All modules that a file imports, also in functions and for types."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path} imports relatively"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in FILES else node.module for name in full}
    return names


GRAPH = {name: imported(path) for name, path in FILES.items()}


def test_no_file_imports_itself_by_way_of_others():
    inside = {name: names & FILES.keys() for name, names in GRAPH.items()}
    order = list(TopologicalSorter(inside).static_order())  # raises CycleError, which names them
    assert len(order) == len(FILES) > 40


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_lies_below(room):
    own = [names for name, names in GRAPH.items() if name.split(".")[1] == room]
    assert own
    found = {name.split(".")[1] for names in own for name in names if name.startswith("msa.")}
    assert found & ROOMS.keys() <= ROOMS[room] | {room}


def test_only_the_command_line_starts_benchmarks():
    for path in PACKAGE.rglob("*.py"):
        assert "benchmarks" not in {name.split(".")[0] for name in imported(path)}, path
        if path != PACKAGE / "cli.py":
            assert '"benchmarks' not in path.read_text(), path


def test_only_the_command_line_imports_the_commands():
    for path in PACKAGE.rglob("*.py"):
        rooms = {n.split(".")[1] for n in imported(path) if n.startswith("msa.")} & ROOMS.keys()
        assert not rooms or path in FILES.values(), path
