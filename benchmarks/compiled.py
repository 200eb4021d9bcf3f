"""Compile every kernel and tile for GPUs that need not be here, and check that they fit.

    python -m benchmarks.compiled                          # all families, in half an hour
    python -m benchmarks.compiled --families 8.0 gfx942
    python -m benchmarks.compiled --day 17                 # what CI does on one day, in a minute

Each family is compiled in a process of its own (`benchmarks.compile_target`), for Triton keeps one
target per process. The results are merged into the file by version of Triton. That a kernel
compiles and fits says nothing about its speed, and it has not run.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from msa import chips

Row = dict[str, Any]

REGISTERS = 2**16
"""Registers of a multiprocessor of NVIDIA: a program has no more."""
REGISTERS_AMD = 512
"""Registers that the compiler may give one thread of AMD."""
SPILLED = {
    "scan_kernel": 128,
    "walk_kernel": 96,  # over pages of 8 bits
    "hopper_walk_kernel": 192,  # with Triton 3.9; none with the pinned release
    "block_sums_kernel": 160,
    "index_loss_kernel": 256,
    "query_gradients_kernel": 64,
    "key_gradients_kernel": 448,
    "append_kernel": 160,
    "hopper_query_gradients_kernel": 512,
    "hopper_loss_kernel": 256,
    "page_attend_kernel": 32,  # over pages of 8 bits
}
"""Bytes that a kernel may spill for each thread; the others may spill none."""
PORTIONS = 8
"""On one day CI compiles one of so many portions of a family's kernels."""
KEPT = ("kernel", "shape", "options", "shared", "threads", "registers", "spilled", "error")
"""What the file keeps of a row."""


@dataclass(frozen=True)
class CompiledOptions:
    """Compile every kernel and tile for a family of GPUs, and check that they fit."""

    families: tuple[str, ...] = tuple(chips.FAMILIES)
    day: int | None = None
    """A number such as the day of the year: compile a portion of 9.0 and of two other families, all
    of which come in turn, and write nothing."""
    out: Path = Path("benchmarks/results/compiled.json")


def wrong(row: Row, family: chips.Family) -> str:
    """What is wrong with a compiled kernel; empty if nothing.

    >>> row = {"kernel": "a", "shared": 2**17, "threads": 128, "registers": 9, "spilled": 0}
    >>> wrong(row, chips.FAMILIES["8.9"])
    'takes 128 KB of shared memory, there are 99'
    >>> wrong(row, chips.FAMILIES["9.0"])
    ''
    """
    if "error" in row:
        return row["error"]
    if row["shared"] > family.shared:
        return (
            f"takes {row['shared'] / 1024:g} KB of shared memory, there are {family.shared >> 10}"
        )
    most = SPILLED.get(row["kernel"], 0)
    if row["spilled"] > most:
        return f"spills {row['spilled']} bytes for each thread, at most {most} are expected"
    if row["threads"] > 1024:
        return f"has {row['threads']} threads, 1024 are possible"
    registers = row["registers"] if family.is_amd else row["registers"] * row["threads"]
    most = REGISTERS_AMD if family.is_amd else REGISTERS
    if registers > most:
        return f"takes {registers} registers, there are {most}"
    return ""


def todays(day: int) -> tuple[tuple[str, ...], str]:
    """The families of a day, and the portion of their kernels.

    >>> todays(0), todays(1)
    ((('9.0', '8.0', '8.6'), '0/8'), (('9.0', '8.9', '10.0'), '1/8'))
    """
    others = [name for name in chips.FAMILIES if name != "9.0"]
    pair = (others[(2 * day + i) % len(others)] for i in range(2))
    return ("9.0", *pair), f"{day % PORTIONS}/{PORTIONS}"


def compiled(family: str, *words: str) -> list[Row]:
    """The kernels of a family, compiled by other processes; on 9.0 those for Hopper, too."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    rows: list[Row] = []
    for hopper in (False, True) if chips.FAMILIES[family].hopper else (False,):
        more = ["--hopper"] if hopper else list[str]()
        command = [sys.executable, "-m", "benchmarks.compile_target", family, *words, *more]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{family}: {done.stderr[-2000:]}")
        rows += [json.loads(line) for line in done.stdout.splitlines()]
    return rows


def distinct(rows: list[Row]) -> list[Row]:
    """Each variant of a kernel once, without the times."""
    kept = [{name: row[name] for name in KEPT if name in row} for row in rows]
    return list({json.dumps(row, sort_keys=True): row for row in kept}.values())


def run(options: CompiledOptions) -> int:
    """Compile, check, print what is wrong, write; the exit code is 1 if anything is."""
    families, words = options.families, ()
    if options.day is not None:
        families, portion = todays(options.day)
        words = ("--portion", portion)
    faults = 0
    for family in families:
        rows = compiled(family, *words)
        kernels = distinct(rows)
        found = [(row, wrong(row, chips.FAMILIES[family])) for row in kernels]
        bad = [(row, what) for row, what in found if what]
        seconds = sum(row.get("seconds", 0) for row in rows)
        said = f"{family}: {len(kernels)} kernels in {seconds:.0f} s, {len(bad)} do not fit"
        print(said, flush=True)
        for row, what in bad:
            print(f"  {row['kernel']}, {row['shape']}, {row.get('options')}: {what}")
        faults += len(bad)
        if options.day is None:
            write(options.out, family, kernels)
    return 1 if faults else 0


def write(path: Path, family: str, rows: list[Row]) -> None:
    """Put the rows of a family into the file, in place of those of the same release of Triton."""
    import triton

    known = json.loads(path.read_text()) if path.exists() else {"versions": {}}
    version = known["versions"].setdefault(triton.__version__, {"families": {}})
    version["date"] = datetime.date.today().isoformat()
    version["families"][family] = rows
    text = json.dumps(known, indent=1)
    for row in rows_of(known):  # one line for each kernel
        text = text.replace(indented(row), json.dumps(row))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def rows_of(found: dict[str, Any]) -> list[Row]:
    """All rows of a file."""
    return [
        row for version in found["versions"].values()
        for rows in version["families"].values() for row in rows
    ]  # fmt: skip


def indented(row: Row) -> str:
    """A row as `json.dumps` writes it inside the file."""
    return json.dumps(row, indent=1).replace("\n", "\n" + 5 * " ")


if __name__ == "__main__":
    sys.exit(run(tyro.cli(CompiledOptions)))
