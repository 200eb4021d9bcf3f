"""Which module imports which, read from the source, and a picture of the rooms of the house.

    python -m docs.hooks.arrows    # writes docs/house.svg again

Every import counts: at the top of a module, for types alone (TYPE_CHECKING) and inside functions.
"""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE, PICTURE = ROOT / "msa", ROOT / "docs" / "house.svg"
Graph = dict[str, set[str]]

WIDTH, BOX, ROW, ROOM = 1180, 26, 74, 7.3  # pixels: picture, height of a box, of a row, a letter
STYLE = """
text { font: 12px ui-sans-serif, system-ui, sans-serif; fill: #1f2328; text-anchor: middle }
path { stroke: #8c959f; fill: none } marker path { fill: #8c959f; stroke: none }
.module { fill: #f6f8fa; stroke: #8c959f } .package { fill: #ddf4ff; stroke: #0969da }
"""


# -- the graph ------------------------------------------------------------------------------------
def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """The full name of every module of a package, and its file; a package is its __init__."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = (package.name, *path.relative_to(package).with_suffix("").parts)
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports(package: Path = PACKAGE) -> Graph:
    """For every module the modules of the same package that it imports."""
    files = modules(package)
    return {name: named(path, set(files)) - {name} for name, path in files.items()}


def named(path: Path, known: set[str]) -> set[str]:
    """The known modules that the import statements of a file name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else str(node.module) for name in inner}
    return found & known


def circles(graph: Graph) -> list[list[str]]:
    """One circle after the other, each without the modules of those before it.

    >>> circles({"a": {"b"}, "b": {"c"}, "c": {"b"}})
    [['b', 'c']]
    """
    found, left = [], graph
    while True:
        try:
            TopologicalSorter(left).prepare()
            return found
        except CycleError as error:
            circle = set(error.args[1])
            found.append(sorted(circle))
            left = {name: seen - circle for name, seen in left.items() if name not in circle}


# -- the picture ----------------------------------------------------------------------------------
def rooms(graph: Graph) -> Graph:
    """The same graph for the packages and modules directly in msa; a package counts as one room.

    >>> rooms({"msa.a": {"msa.b.x"}, "msa.b.x": {"msa.b.y"}, "msa.b.y": set(), "msa": {"msa.a"}})
    {'a': {'b'}, 'b': set()}
    """
    found: Graph = {}
    for name, seen in graph.items():
        if "." in name:
            room = name.split(".")[1]
            others = {other.split(".")[1] for other in seen if "." in other}
            found[room] = (found.get(room, set()) | others) - {room}
    return found


def levels(graph: Graph) -> dict[str, int]:
    """For each room the length of the longest chain of imports below it.

    >>> levels({"a": {"b", "c"}, "b": {"c"}, "c": set()})
    {'c': 0, 'b': 1, 'a': 2}
    """
    found: dict[str, int] = {}
    for room in TopologicalSorter(graph).static_order():
        found[room] = 1 + max((found[other] for other in graph[room]), default=-1)
    return found


def reduced(graph: Graph) -> Graph:
    """The graph without arrows that follow from two or more other arrows.

    >>> reduced({"a": {"b", "c"}, "b": {"c"}, "c": set()})
    {'c': set(), 'b': {'c'}, 'a': {'b'}}
    """
    below: Graph = {}
    found: Graph = {}
    for room in TopologicalSorter(graph).static_order():
        indirect = set().union(*(below[other] for other in graph[room]))
        found[room] = graph[room] - indirect
        below[room] = graph[room] | indirect
    return found


def places(graph: Graph) -> dict[str, tuple[float, float]]:
    """The centre of each room. Its level gives its row, its imports the order in the row."""
    level, found = levels(graph), {}
    top = max(level.values())
    for row in range(top + 1):
        names = [name for name in sorted(graph) if level[name] == row]

        def middle(name: str) -> float:
            known = [found[other][0] for other in graph[name]]
            return sum(known) / len(known) if known else 0.0

        names.sort(key=middle)
        gap = (WIDTH - sum(wide(name) for name in names)) / (len(names) + 1)
        x = gap
        for name in names:
            found[name] = (x + wide(name) / 2, BOX + ROW * (top - row))
            x += wide(name) + gap
    return found


def wide(name: str) -> float:
    """The width of a box."""
    return 18 + ROOM * len(name)


def picture(package: Path = PACKAGE) -> str:
    """The rooms of a package as SVG: an arrow goes from a room to a room that it imports."""
    graph = reduced(rooms(imports(package)))
    place = places(graph)
    height = max(y for _, y in place.values()) + BOX
    parts = []
    for name, others in sorted(graph.items()):
        x, y = place[name]
        for other in sorted(others):
            u, v = place[other]
            start, stop, bend = y + BOX / 2, v - BOX / 2 - 5, (v - y) * 0.4
            curve = f"M{x:.0f} {start:.0f} C{x:.0f} {start + bend:.0f} {u:.0f} {stop - bend:.0f}"
            parts.append(f'<path d="{curve} {u:.0f} {stop:.0f}" marker-end="url(#head)"/>')
    for name, (x, y) in sorted(place.items()):
        kind, w = "package" if (package / name).is_dir() else "module", wide(name)
        box = f'x="{x - w / 2:.0f}" y="{y - BOX / 2:.0f}" width="{w:.0f}" height="{BOX}"'
        parts.append(f'<rect class="{kind}" {box} rx="5"/>')
        parts.append(f'<text x="{x:.0f}" y="{y + 4:.0f}">{escape(name)}</text>')
    head = '<marker id="head" markerWidth="7" markerHeight="7" refX="3" refY="3" orient="auto">'
    return "\n".join((
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img"',
        '  aria-label="Packages and modules of msa, with an arrow from each to what it imports">',
        f"<style>{STYLE}</style>",
        f'<defs>{head}<path d="M0 0 L6 3 L0 6 Z"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height:.0f}" fill="#ffffff"/>',
        *parts, "</svg>\n",
    ))  # fmt: skip


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
