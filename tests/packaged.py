"""Tests of the distributions, in an environment with only the wheel installed.

`make package` builds both and runs this file. It needs no test library.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

HEAVY = ("torch", "triton", "transformers", "hypothesis", "pytest", "matplotlib")
WHEEL = ("msa/py.typed", "msa/model/trained/tiny/model.safetensors",
         "msa/model/trained/tiny/config.json", "msa/conformance/own_targets.py",
         "msa/triton_impl/attention.py", "msa/ablations/findings_tiny.json")  # fmt: skip
SMALL = "trained/small/model.safetensors"  # in the source, not in the wheel
SOURCES = ("LICENSE", "README.md", "CITATION.cff", "pyproject.toml", "constraints.txt", "Makefile",
           "tests/conftest.py", "docs/spec.md", "mkdocs.yml", "examples/generate_loop.py",
           "exercises/run.py",
           "benchmarks/results/crossing_cpu.json", SMALL, *WHEEL)  # fmt: skip


def msa(*words: str) -> str:
    """Return what the installed command prints; it must succeed."""
    command = Path(sysconfig.get_path("scripts")) / "msa"
    done = subprocess.run([command, *words], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, (words, done.stdout + done.stderr)
    return done.stdout


def check_contents(dist: Path) -> None:
    """Check what is in the two files, and what is not."""
    (wheel,), (source,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert names >= set(WHEEL), set(WHEEL) - names
    assert not [
        name for name in names if name.endswith(SMALL.rpartition("/")[2]) and "tiny" not in name
    ]
    assert all(name.startswith(("msa/", "msa_stack-")) for name in names), names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    with tarfile.open(source) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert inside >= set(SOURCES), set(SOURCES) - inside
    for name in names | inside:
        assert not {"__pycache__", ".venv", "site"} & set(Path(name).parts), name


def check_metadata() -> None:
    """Check the metadata that an index shows, and that it has no relative links."""
    told = importlib.metadata.metadata("msa-stack")
    for field in ("Summary", "Author", "License-Expression", "Keywords", "Requires-Python"):
        assert told[field], field
    assert "Typing :: Typed" in told.get_all("Classifier", [])
    assert not told.get_all("Project-URL", [])
    base = [r.partition(">")[0] for r in told.get_all("Requires-Dist", []) if "extra ==" not in r]
    assert sorted(base) == ["jaxtyping", "numpy", "rich", "tyro"], base


def check_commands() -> None:
    """Test the command without torch, and its messages about missing libraries."""
    assert not [name for name in HEAVY if importlib.util.find_spec(name)]
    assert "verify" in msa("--help")
    assert "mask unchanged" in msa("explain")
    assert '"backend": "reference"' in msa("explain", "--json")
    assert "MSA from scratch" in msa("findings")
    command = Path(sysconfig.get_path("scripts")) / "msa"
    done = subprocess.run([command, "verify"], capture_output=True, text=True, cwd="/")
    assert done.returncode == 2 and "needs hypothesis; pip install 'msa-stack[verify]'" in (
        done.stderr
    ), done.stderr
    assert msa("--version") == f"msa-stack {importlib.metadata.version('msa-stack')}\n"


def main(dist: str) -> None:
    """Run all checks."""
    spec = importlib.util.find_spec("msa")
    assert spec is not None and spec.origin is not None
    assert Path(spec.origin).is_relative_to(sysconfig.get_path("purelib")), spec.origin
    check_contents(Path(dist))
    check_metadata()
    check_commands()
    print("the distributions hold what they should, and the bare wheel explains itself")


if __name__ == "__main__":
    main(sys.argv[1])
