"""The site's generator. The kernels on its pages run in the interpreter as fast as in the tests.

    python -m docs.hooks.build build --strict

The words are those of `mkdocs`.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

TESTS = Path(__file__).parents[2] / "tests"


def quicken() -> None:
    """Run kernels on the CPU: read when Triton is first imported."""
    os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    sys.path.insert(0, str(TESTS))
    try:
        importlib.import_module("quick_interpreter").quicken()
    finally:
        sys.path.remove(str(TESTS))


if __name__ == "__main__":
    quicken()
    from mkdocs.__main__ import cli

    cli(prog_name="mkdocs")
