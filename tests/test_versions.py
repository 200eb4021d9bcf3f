"""The pinned versions can be installed on every Python that the metadata allows."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import msa

ROOT = Path(__file__).parent.parent
PYTHONS = ("3.10.0", "3.10.13", "3.11.0", "3.11.2", "3.11.7", "3.12.1", "3.13.0")
PINS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
]


def holds_on(requirement, python):
    """Whether a pin is for this release of Python."""
    environment = {"python_version": python.rpartition(".")[0], "python_full_version": python}
    return requirement.marker is None or requirement.marker.evaluate(environment)


@pytest.mark.parametrize("python", PYTHONS)
def test_a_pin_is_for_pythons_that_the_release_takes(python):
    """The metadata of installed libraries says so, if the pinned release is installed."""
    looked_at = 0
    for pin in PINS:
        try:
            found = importlib.metadata.distribution(pin.name)
        except importlib.metadata.PackageNotFoundError:  # of an extra that is not here
            continue
        if found.version.partition("+")[0] in pin.specifier and holds_on(pin, python):
            wanted = found.metadata.get("Requires-Python") or ">=3"
            assert python in SpecifierSet(wanted), f"{pin} wants Python {wanted}, not {python}"
            looked_at += 1
    assert looked_at >= 8


def test_the_site_is_asked_for_only_where_its_tools_are():
    """On Python 3.10 the extras `docs` and `all` do not contain it, and can be installed."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in project["optional-dependencies"]["docs"]:
        needed = Requirement(line)
        assert not holds_on(needed, "3.10.13") and holds_on(needed, "3.11.2"), line


def test_the_version_stands_in_one_place():
    """The build reads it from msa/__init__.py."""
    project = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in project and f'"{msa.__version__}"' not in project
    assert '[tool.hatch.version]\npath = "msa/__init__.py"' in project
