"""The help of every `msa` command, as the command prints it."""

from __future__ import annotations

import contextlib
import io
import os
import re
from unittest import mock

from msa import cli

PAGE = {"COLUMNS": "88", "NO_COLOR": "1"}


def ask(*words: str) -> str:
    """What `msa WORDS --help` prints.

    Raises:
        ValueError: if the command fails.
    """
    printed = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # frames need its letters
    with mock.patch.dict(os.environ, PAGE), contextlib.redirect_stdout(printed):
        try:
            code = cli.main([*words, "--help"])
        except SystemExit as end:
            code = end.code
    if code:
        raise ValueError(f"msa {' '.join(words)} --help must end with 0, got {code}")
    printed.flush()
    return printed.buffer.getvalue().decode().strip()


def helps() -> str:
    """A heading and a listing for `msa` and each of its commands."""
    names = re.findall(r"^  (\w+(?: \w+)?)   ", cli.HELP, re.M)
    parts = [f"```text\n{ask()}\n```"]
    parts += [f"## msa {name}\n\n```text\n{ask(*name.split())}\n```" for name in names]
    return "\n\n".join(parts)
