"""The results of one run of the tests, written to a file: `pytest -m gpu --record FILE`."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import subprocess
from datetime import date
from pathlib import Path

import torch


def record(path: Path, counts: dict[str, int], seconds: float, commit: str) -> None:
    """Write the counts, and the versions and devices of the run; make the folder if it is missing.

    Args:
        counts: passed, failed, errors and skipped.
        seconds: how long the run took.
        commit: the commit of the sources, if there is no Git history; "" reads the history.
    """
    found = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "driver": driver(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "commit": commit or commit_of(Path(__file__).parent),
        "date": date.today().isoformat(),
        "seconds": round(seconds, 1),
        **counts,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


def driver() -> str:
    """The version of NVIDIA's driver; "none" without one."""
    if not shutil.which("nvidia-smi"):
        return "none"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0]


def commit_of(folder: Path) -> str:
    """Twelve digits, then "dirty" if a tracked file was changed; "unknown" without Git."""
    command = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty= dirty"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"
