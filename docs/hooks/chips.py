"""The page of GPUs that are not measured: what compiles for them, what they lack, who tried one."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.compile_shapes import MAIN
from benchmarks.compiled import wrong
from docs.hooks import measured
from docs.hooks.curves import table
from msa import loop_order
from msa.chips import FAMILIES, MEASURED, missing

COMPILED = measured.RESULTS / "compiled.json"
CONTRIBUTED = measured.RESULTS / "contributed"
ROW = {"kernel": str, "shape": str}
REPORT = {
    "date": str,
    "versions": dict,
    "devices": [{"name": str, "model": str, "capability": str}],
    "parts": [{"part": str, "runs": bool, "reason": str}],
}
"""What a file of `msa doctor --report` must hold."""


# -- compiled -------------------------------------------------------------------------------------
def versions() -> dict[str, dict[str, Any]]:
    """The compiled kernels of each release of Triton, by family; checked."""
    found = json.loads(COMPILED.read_text())["versions"]
    for version, entry in found.items():
        for family, rows in entry["families"].items():
            measured.check(rows, [ROW], f"compiled[{version}][{family}]")
    return found


def cell(rows: list[dict[str, Any]], family: str) -> str:
    """The variant of a kernel that needs most: KB of shared memory, registers, bytes spilled.

    >>> row = {"kernel": "k", "shared": 2048, "threads": 32, "registers": 40, "spilled": 0}
    >>> cell([row, row | {"shared": 4096, "registers": 30}], "8.0"), cell([], "8.0")
    ('4 / 40', '–')
    """
    if not rows:
        return "–"
    faults = [what for row in rows if (what := wrong(row, FAMILIES[family]))]
    if faults:
        return f"**{escape(faults[0])}**"
    most = [max(row[name] for row in rows) for name in ("shared", "registers", "spilled")]
    numbers = [f"{most[0] / 1024:.0f}", *(str(n) for n in most[1:] if n or n is most[1])]
    return " / ".join(numbers)


def compiled_table(version: str) -> str:
    """Kernel by family, for the shape of MiniMax-M3."""
    families = versions()[version]["families"]
    names = list(dict.fromkeys(row["kernel"] for rows in families.values() for row in rows))
    lines = []
    for name in sorted(names):
        mine = {
            family: [row for row in rows if row["kernel"] == name and row["shape"] == MAIN]
            for family, rows in families.items()
        }
        kernel = name.removesuffix("_kernel").replace("_", " ")
        lines.append([kernel, *(cell(mine.get(family, []), family) for family in FAMILIES)])
    return table(["kernel", *FAMILIES], lines)


def compiled_sentences() -> str:
    """How many variants were compiled with each release of Triton, and how many do not fit."""
    said = []
    for version, entry in versions().items():
        families = entry["families"]
        rows = [(row, FAMILIES[family]) for family, some in families.items() for row in some]
        bad = sum(bool(wrong(row, family)) for row, family in rows)
        said.append(
            f"Triton {version}, {entry['date']}: {len(rows)} variants of kernels for "
            f"{', '.join(families)}; {f'{bad} of them do not fit' if bad else 'all of them fit'}."
        )
    return "\n\n".join(said)


# -- facts ----------------------------------------------------------------------------------------
def families() -> str:
    """What each family has, and what happens where it lacks something."""
    rows = []
    for family in FAMILIES.values():
        whole, pairs = loop_order.factors(family.operations_per_byte)
        numbers = "measured" if family == MEASURED.family else "counted, not measured"
        lacks = "; ".join(what for what, _ in missing(family)) or "nothing"
        rows.append([family.name, family.examples, f"{family.shared // 1024} KB", lacks,
                     f"{whole:g}, {pairs:g} ({numbers})"])  # fmt: skip
    columns = ["family", "GPUs", "shared memory", "lacks", "loop order: walks up to, pairs up to"]
    return table(columns, rows)


def without() -> str:
    """What happens without each feature."""
    from msa.chips import MISSING

    return table(["without", "what happens"], [list(words) for words in MISSING.values()])


# -- contributed ----------------------------------------------------------------------------------
def contributed(folder: Path = CONTRIBUTED) -> str:
    """A table of the reports that others sent; a sentence where there are none.

    Raises:
        measured.BadResults: if a file is not a report.
    """
    rows = []
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text())
        measured.check(found, REPORT, path.name)
        gpus = [d for d in found["devices"] if d["capability"]] or found["devices"]
        device = ", ".join(f"{d['model']} ({d['capability'] or d['name']})" for d in gpus)
        libraries = ", ".join(
            f"{name} {found['versions'][name]}" for name in ("torch", "triton", "driver")
            if found["versions"].get(name)
        )  # fmt: skip
        parts = [p for p in found["parts"] if not p["part"].startswith("extra ")]
        fails = (
            "; ".join(f"{p['part']}: {p['reason']}" for p in parts if not p["runs"]) or "nothing"
        )
        runs = f"{sum(p['runs'] for p in parts)} of {len(parts)}"
        rows.append([plain(text) for text in (device, libraries, found["date"], runs, fails)])
    if not rows:
        return "Nobody has sent a report yet."
    return table(["device", "with", "date", "parts that run", "what does not, and why"], rows)


def plain(text: str) -> str:
    """Text of a stranger's file, which must not end a cell or become HTML.

    >>> plain("a | <b>\\n")
    'a &#124; &lt;b&gt; '
    """
    return escape(text).replace("|", "&#124;").replace("\n", " ").replace("`", "&#96;")
