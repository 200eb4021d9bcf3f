"""`msa doctor`: versions, devices, and which parts of msa run on this machine.

A part that does not run is listed with the reason and with what to do; the command succeeds all the
same. Libraries are imported when the first part that needs them is tried.
"""

from __future__ import annotations

import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msa
from msa import chips, files
from msa.doctor_trials import Device, Finding, Versions, findings

LIBRARIES = ("numpy", "torch", "triton", "transformers", "hypothesis")


@dataclass(frozen=True)
class DoctorOptions:
    """Show versions and devices, and which backends, kernels and extras run on this machine."""

    json: bool = False
    """Print one JSON object instead of tables."""
    report: Path | None = None
    """Write versions, devices and parts to this JSON file, to be sent to the project."""


def run(options: DoctorOptions) -> int:
    """Find versions, try all parts and print the results; the exit code is always 0."""
    if options.report:
        files.check_target("report", options.report)
    torch = import_torch()
    versions, devices = versions_of(torch), devices_of(torch)
    parts = findings(versions, devices)
    found = {"devices": [asdict(d) for d in devices], "parts": [asdict(p) for p in parts]}
    if options.json:
        print(json.dumps({"versions": versions, **found}))
    else:
        show(versions, devices, parts)
    if options.report:
        report = {"date": datetime.date.today().isoformat(), "versions": versions, **found}
        files.write(options.report, (json.dumps(report, indent=1) + "\n").encode())
        print(f"Report: {options.report}", file=sys.stderr)
    return 0


def import_torch() -> Any:
    """torch, or None where it is missing or cannot be loaded."""
    try:
        return importlib.import_module("torch")
    except Exception:  # a broken installation raises OSError, RuntimeError and others
        return None


def versions_of(torch: Any) -> Versions:
    """The versions of everything that decides what runs; None for what was not found."""
    return {
        "msa": msa.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: version(name) for name in LIBRARIES},
        "cuda": torch.version.cuda if torch else None,
        "rocm": torch.version.hip if torch else None,
        "driver": driver(),
    }


def version(library: str) -> str | None:
    """The installed version of a library, without importing it."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver() -> str | None:
    """The version of the NVIDIA driver that nvidia-smi prints; None without a driver."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.partition("\n")[0].strip() or None if done.returncode == 0 else None


def devices_of(torch: Any) -> list[Device]:
    """The CPU, then every CUDA or ROCm device that torch sees."""
    found = [Device("cpu", f"{platform.machine()}, {os.cpu_count()} cores")]
    for i in range(torch.cuda.device_count() if torch else 0):
        device = torch.cuda.get_device_properties(i)
        memory = round(device.total_memory / 2**30, 1)
        capability = chips.capability_of(device)
        found.append(Device(f"cuda:{i}", device.name, capability, memory, *sizes_of(device)))
    return found


def sizes_of(device: Any) -> tuple[int | None, float | None, float | None]:
    """Multiprocessors, KiB of shared memory and MiB of L2 of torch's device properties."""
    shared = getattr(device, "shared_memory_per_block_optin", None)
    l2 = getattr(device, "L2_cache_size", None)
    return (
        getattr(device, "multi_processor_count", None),
        shared and round(shared / 2**10, 1),
        l2 and round(l2 / 2**20, 1),
    )


def show(versions: Versions, devices: list[Device], parts: list[Finding]) -> None:
    """Three tables: versions, devices, parts."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def print_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
        table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)

    console = Console()
    print_table(("what", "version"), [(k, v or "not found") for k, v in versions.items()])
    print_table(
        ("device", "model", "capability", "GiB", "multiprocessors", "shared KiB", "L2 MiB"),
        [
            (
                d.name,
                d.model,
                d.capability,
                *(
                    f"{size or ''}"
                    for size in (d.memory_gib, d.multiprocessors, d.shared_kib, d.l2_mib)
                ),
            )
            for d in devices
        ],
    )
    print_table(
        ("part", "runs", "why not, and what to do"),
        [(p.part, "yes" if p.runs else "no", "; ".join(filter(None, (p.reason, p.advice))))
         for p in parts],
    )  # fmt: skip
