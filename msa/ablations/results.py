"""The results of the ablations: the file that `msa findings run` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msa import files

RESULTS = "findings_tiny.json"
SHIPPED = Path(__file__).parent / RESULTS
"""The results that come with the package."""
Found = dict[str, Any]
"""The contents of a results file; FORM says what it holds."""
MAYBE = (int, float, type(None))
ANSWERS = {"prose": MAYBE, "answers": MAYBE, "near": MAYBE, "far": MAYBE}
FORM = {
    "device": str, "torch": str, "date": str, "steps": int, "documents": int,
    "runs": [{
        "row": str, "seed": int, "command": str, "kl": MAYBE, "block_recall": MAYBE,
        "score_recall": MAYBE, "steepest": MAYBE, **ANSWERS, "budgets": [{"k": int, **ANSWERS}],
        "lengths": [{"tokens": int, "how": str, "answers": MAYBE}],
    }],
}  # fmt: skip
"""The names and types that a results file must have. It may have more."""


def read_results(name: str, path: Path) -> Found:
    """A file that `msa findings run` wrote. Messages call it `name`.

    Raises:
        ValueError: no such file, or a file of another kind.
    """
    found: Found = files.read_json(name, path)
    check_found(str(path), found)
    return found


def runs_of(found: Found, row: str) -> list[dict[str, Any]]:
    """The runs of a row, ordered by seed."""
    runs = [run for run in found["runs"] if run["row"] == row]
    return sorted(runs, key=lambda run: run["seed"])


def lengths_of(found: Found, row: str, how: str) -> dict[int, list[float | None]]:
    """For each length of documents, the share of right answers of each seed."""
    readings = readings_by(found, row, "lengths", "tokens")
    return {n: [r["answers"] for r in rs if r["how"] == how] for n, rs in readings.items()}


def readings_by(found: Found, row: str, part: str, name: str) -> dict[int, list[dict[str, Any]]]:
    """The readings under `part` of a row's runs, grouped by their number `name`."""
    readings = [reading for run in runs_of(found, row) for reading in run[part]]
    keys = sorted({reading[name] for reading in readings})
    return {key: [r for r in readings if r[name] == key] for key in keys}


def check_found(where: str, found: Any, form: Any = FORM) -> None:
    """The value has the names and types of `form`.

    >>> check_found("a.json", {"steps": "3"}, {"steps": int})
    Traceback (most recent call last):
    ValueError: a.json must be what msa findings run wrote, got another kind of value as steps: '3'
    """
    wanted = "must be what msa findings run wrote, got"
    if isinstance(form, dict):
        missing = [name for name in form if not isinstance(found, dict) or name not in found]
        if missing:
            raise ValueError(f"{where} {wanted} a part without {', '.join(missing)}")
        for name, inner in form.items():
            value = found[name]
            if isinstance(inner, list):
                if not isinstance(value, list):
                    raise ValueError(f"{where} {wanted} {name} that are no list")
                for part in value:
                    check_found(where, part, inner[0])
            elif not isinstance(value, inner) or isinstance(value, bool):
                raise ValueError(f"{where} {wanted} another kind of value as {name}: {value!r:.40}")
