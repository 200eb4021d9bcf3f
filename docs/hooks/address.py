"""Where the repository is: lines of `mkdocs.yml` that whoever hosts it fills in."""

from __future__ import annotations

import re
from pathlib import Path

CONFIGURATION = Path(__file__).parents[2] / "mkdocs.yml"
UNKNOWN = "ADDRESS"


def setting(name: str) -> str:
    """A line under `extra` of the configuration, such as `clone`; empty if it is not filled in.

    >>> setting("no such line")
    ''
    """
    found = re.search(rf'(?m)^  {name}: "([^"]*)"', CONFIGURATION.read_text())
    return found[1] if found else ""


def clone() -> str:
    """The address to clone, or a word in its place."""
    return setting("clone") or UNKNOWN


def install() -> str:
    """The commands that set up a checkout, as Markdown."""
    hint = "" if setting("clone") else f"`{UNKNOWN}` is that of the repository. "
    return (
        f"```console\ngit clone {clone()} msa-stack && cd msa-stack\n"
        "make install                 # .venv with everything; takes a few minutes\n"
        f"source .venv/bin/activate\n```\n\n{hint}You need Python 3.10 or newer (3.11 for transformers) and "
        "`make`; a GPU is not needed."
    )


def colab(notebook: str) -> str:
    """The address at which Colab opens a notebook, or an empty string if none is configured."""
    base = setting("colab")
    return f"{base.rstrip('/')}/{notebook}" if base else ""
