"""The help of every `msa` command, as the command prints it."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from msa.cli import HELP


def ask(*words: str) -> str:
    """What `msa WORDS --help` prints.

    Raises:
        subprocess.CalledProcessError: if the command fails.
    """
    done = subprocess.run(
        [sys.executable, "-m", "msa.cli", *words, "--help"], capture_output=True, text=True,
        check=True, env=os.environ | {"COLUMNS": "88", "NO_COLOR": "1"},
    )  # fmt: skip
    return done.stdout.strip()


def helps() -> str:
    """A heading and a listing for `msa` and each of its commands."""
    names = re.findall(r"^  (\w+(?: \w+)?)   ", HELP, re.M)
    parts = [f"```text\n{ask()}\n```"]
    parts += [f"## msa {name}\n\n```text\n{ask(*name.split())}\n```" for name in names]
    return "\n\n".join(parts)
