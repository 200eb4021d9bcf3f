"""Who may know whom: the arrows of the house, read from the source, and cold imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import msa

PACKAGE = Path(__file__).parent.parent / "msa"
STAGES = ["reference", "torch_impl", "triton_impl"]
OWN = {  # modules directly under msa/, and what each of them may import of msa at its top level
    "checks": set(),
    "checks_cache": {"checks"},
    "config": {"checks"},
    "ir": {"checks", "checks_cache"},
    "eight_bits": {"ir"},
    "page_book": {"checks_cache"},
    "page_arrays": {"checks", "eight_bits", "ir", "page_book"},
    "paging": {"checks", "checks_cache", "ir", "page_arrays", "page_book"},
    "interface": {"config", "ir"},
    "pipeline": {"config", "interface", "ir"},
    "layout": {"checks", "ir"},
    "loop_order": set(),
    "dispatch": {"checks", "interface", "ir"},
    "api": {"checks", "checks_cache", "config", "dispatch", "ir", "layout", "pipeline"},
    "quality": {"api", "checks", "config", "dispatch", "ir", "paging"},
    "recall": {"checks", "ir", "layout"},
    "files": set(),
    "doctor": {"doctor_trials"},
    "doctor_trials": set(),
    "explain": {"api", "config", "dispatch", "ir", "loop_order", "pipeline", "reference"},
    "explain_print": {"explain", "loop_order"},
    "cli": set(),
    "__init__": {"api", "config", "dispatch", "ir", "page_arrays", "paging", "pipeline", "quality"},
}


def imported(path: Path, everywhere: bool = True) -> set[str]:
    """Full names of the modules that a file imports; with everywhere=False not inside functions."""
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree)) if everywhere else list(tree.body)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{a.name}" if node.module == "msa" else node.module
                      for a in node.names}  # fmt: skip
    return names


def inside_msa(names: set[str]) -> set[str]:
    """The first part below msa of every import from msa."""
    return {name.split(".")[1] for name in names if name.startswith("msa.")}


@pytest.mark.parametrize("module", OWN)
def test_top_level_arrows(module):
    assert inside_msa(imported(PACKAGE / f"{module}.py", everywhere=False)) <= OWN[module]


def test_no_module_is_left_out():
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(OWN)


@pytest.mark.parametrize("backend", STAGES)
def test_a_backend_knows_the_forms_the_configuration_and_itself(backend):
    known = {"ir", "config", backend} | ({"loop_order"} if backend == "triton_impl" else set())
    for path in (PACKAGE / backend).glob("*.py"):
        speaks = path.parent.name == "triton_impl" and path.name in ("places.py", "tiles.py")
        own = {"checks"} if speaks else set()
        assert inside_msa(imported(path)) <= known | own, path


def test_the_oracle_knows_numpy_alone():
    for path in (PACKAGE / "reference").glob("*.py"):
        roots = {name.split(".")[0] for name in imported(path)}
        assert roots <= {"__future__", "collections", "numpy", "jaxtyping", "typing", "msa"}, path


@pytest.mark.parametrize("library", ["torch", "triton"])
def test_backends_are_imported_in_one_place(library):
    users = {
        path.name
        for path in PACKAGE.glob("*.py")
        if inside_msa(imported(path)) & {"torch_impl", "triton_impl"}
    }
    assert users == {"dispatch.py"}
    assert all(
        library not in {name.split(".")[0] for name in imported(path, everywhere=False)}
        for path in PACKAGE.glob("*.py")
    )


@pytest.mark.parametrize("name", ["conformance", "demo", "integrations"])
def test_only_the_command_line_knows_the_extras(name):
    """And the conformance kit: how others lay out what it is to try."""
    for path in PACKAGE.rglob("*.py"):
        if path.name != "cli.py" and path.parent.name != name:
            known = {n for n in imported(path) if n.startswith(f"msa.{name}")}
            layouts = {"arrays", "layouts"} if path.parent.name == "conformance" else set()
            assert known <= {"msa.integrations"} | {f"msa.integrations.{n}" for n in layouts}, path
            names = {
                alias.name
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.ImportFrom) and node.module == f"msa.{name}"
                for alias in node.names
            }
            assert names <= layouts, path


def test_operators_know_the_functions_and_what_these_are_checked_by():
    known = {"api", "checks", "config", "dispatch", "ir", "layout", "ops"}
    for path in (PACKAGE / "ops").glob("*.py"):
        assert inside_msa(imported(path)) <= known, path


@pytest.mark.parametrize("name", ["layouts", "page_layouts", "arrays", "messages"])
def test_layouts_need_no_library(name):
    path = PACKAGE / "integrations" / f"{name}.py"
    roots = {n.split(".")[0] for n in imported(path, everywhere=False)} - sys.stdlib_module_names
    assert roots <= {"__future__", "jaxtyping", "msa", "numpy"}
    assert inside_msa(imported(path)) <= {"checks", "integrations", "ir"}


def test_integrations_know_the_public_interface_and_the_operators():
    known = {"checks", "config", "dispatch", "files", "integrations", "ir", "ops", "recall"}
    for path in (PACKAGE / "integrations").glob("*.py"):
        assert inside_msa(imported(path)) <= known, path


def test_conformance_knows_the_public_interface_alone():
    """It must be able to judge any backend, so it knows none but through load_backend."""
    libraries = {"__future__", "hypothesis", "numpy", "rich", "msa", "torch"}
    public = {"checks", "config", "conformance", "dispatch", "interface", "ir", "pipeline"}
    public |= {"integrations"}  # of these, two files that need no library: see above
    for path in (PACKAGE / "conformance").glob("*.py"):
        roots = {name.split(".")[0] for name in imported(path)} - sys.stdlib_module_names
        assert roots <= libraries, path
        assert "torch" not in {n.split(".")[0] for n in imported(path, everywhere=False)}, path
        for name in inside_msa(imported(path)) - public:
            assert name in vars(msa), (path, name)


def test_import_msa_is_light():
    code = (
        "import sys, msa; heavy = {'torch', 'triton', 'hypothesis', 'rich', 'tyro', 'sklearn', "
        "'matplotlib', 'scipy'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
