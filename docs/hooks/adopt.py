"""Puts the results of a run in the place of the committed ones.

python -m docs.hooks.adopt FOLDER

FOLDER has files that `msa bench` wrote, such as prefill_h200.json. For each of them:

1. The form of the file is checked, before anything is changed.
2. The committed file of the same benchmark goes. One of another device moves to
   benchmarks/results/history, from which docs/history.md is drawn; one of the same device stays in
   the history of Git alone.
3. Its figures in docs/ are deleted, and those of the new file drawn.

Then the table in README.md and the links to figures are written anew. The pages of the site read
the files when they are built, so there is nothing else to do.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from benchmarks import plots
from benchmarks.reading import RESULTS, committed, device
from docs.hooks import measured, readme

DOCS = measured.ROOT / "docs"
DRAWN = ("prefill", "decode", "integrations")
"""The benchmarks whose figures are files of docs/."""
BENCHMARKS = (*DRAWN, "train")


def checked(folder: Path) -> list[Path]:
    """The files of a run, whose form and whose names are right.

    Raises:
        ValueError: there is none, or one has the name of another benchmark or device.
        measured.BadResults: the form of a file is wrong.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise ValueError(f"FOLDER must hold files that msa bench wrote, got none in {folder}")
    for path in paths:
        found, (kind, _, word) = json.loads(path.read_text()), path.stem.partition("_")
        if kind not in BENCHMARKS or word != device(found).lower():
            raise ValueError(
                f"a file of FOLDER must be named BENCHMARK_DEVICE.json, with a benchmark among "
                f"{', '.join(BENCHMARKS)}, got {path.name} of {found['device']}"
            )
        measured.check(found, measured.SCHEMAS[kind], path.name)
    return paths


def adopt(path: Path, results: Path = RESULTS, docs: Path = DOCS) -> None:
    """Put one file, which is checked, in the place of the committed one, and draw its figures."""
    kind = path.stem.partition("_")[0]
    old = committed(kind, results)
    if old.name == path.name:
        old.unlink()
    else:
        (results / "history").mkdir(exist_ok=True)
        old.replace(results / "history" / old.name)
    shutil.copyfile(path, results / path.name)
    if kind in DRAWN:
        for figure in docs.glob(f"{kind}_*.svg"):
            figure.unlink()
        made = plots.draw(results / path.name, docs)
        if any(made.values()):
            raise ValueError(f"{path} must hold the numbers of all its figures: {made}")


def main() -> int:
    """Adopt a folder."""
    parser = argparse.ArgumentParser(description="Put results of a run in place of older ones.")
    parser.add_argument("folder", type=Path)
    try:
        paths = checked(parser.parse_args().folder)
        for path in paths:
            adopt(path)
            print(f"{path.name}: adopted")
    except (ValueError, measured.BadResults) as error:
        print(error, file=sys.stderr)
        return 2
    readme.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
