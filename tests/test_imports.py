"""Which module may import which, read from the source; and imports in a new process."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import msa
from docs.hooks import arrows

PACKAGE = Path(__file__).parent.parent / "msa"
STAGES = ["reference", "torch_impl", "triton_impl"]
SHARED = {"autograd", "config", "ir"}
"""What a backend in torch may import of msa beside itself; the reference does not need torch."""
OWN = {  # modules directly under msa/, and what each of them may import of msa at its top level
    "autograd": set(),
    "config": {"checks"},
    "sequences": {"checks"},
    "selection": {"checks", "sequences"},
    "paged_kv": {"checks", "sequences"},
    "cache_checks": {"checks", "chips", "paged_kv", "selection", "sequences"},
    "chips": set(),
    "ir": {"checks", "paged_kv", "selection", "sequences"},
    "eight_bits": {"checks"},
    "page_book": {"paged_kv"},
    "page_checks": {"cache_checks", "checks", "page_book", "paged_kv"},
    "page_arrays": {"checks", "eight_bits", "page_book", "paged_kv"},
    "paging": {"cache_checks", "checks", "page_arrays", "page_book", "page_checks", "paged_kv"},
    "interface": {"config", "ir"},
    "pipeline": {"config", "interface", "ir"},
    "layout": {"checks", "ir", "sequences"},
    "loop_order": set(),
    "kernel_choice": {"checks", "config", "ir"},
    "dispatch": {"checks", "interface", "ir"},
    "entry": {
        "cache_checks",
        "checks",
        "chips",
        "config",
        "dispatch",
        "ir",
        "kernel_choice",
        "layout",
        "pipeline",
        "selection",
    },
    "api": {"checks", "config", "dispatch", "entry", "ir", "kernel_choice", "pipeline",
            "selection"},
    "quality": {"api", "checks", "config", "dispatch", "ir", "layout", "paging"},
    "recall": {"checks", "ir", "layout", "selection"},
    "files": set(),
    "moved": set(),
    "warming": {"api", "checks", "config", "ir"},
    "doctor": {"chips", "doctor_trials", "files"},
    "doctor_trials": {"chips"},
    "explain": {"api", "chips", "config", "dispatch", "ir", "kernel_choice", "loop_order", "moved",
                "pipeline", "reference"},
    "explain_print": {"dispatch", "explain", "kernel_choice", "loop_order"},
    "cli": set(),
    "__init__": {"api", "config", "dispatch", "ir", "moved", "page_arrays", "paging", "pipeline",
                 "quality", "warming"},
}  # fmt: skip
GRAPH = arrows.imports()
CIRCLES = arrows.circles(GRAPH)
ROOMS = sorted(arrows.rooms(GRAPH))


@pytest.mark.parametrize("room", ROOMS)
def test_no_circle(room):
    """Imports for types and inside functions count as well."""
    assert [c for c in CIRCLES if any(f"{name}.".startswith(f"msa.{room}.") for name in c)] == []


def test_a_circle_is_found():
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": {"e"}, "e": {"d"}, "f": {"a"}}
    assert sorted(arrows.circles(graph)) == [["a", "b", "c"], ["d", "e"]]


@pytest.mark.parametrize("statement", [
    "from msa import b", "import msa.b", "from msa.b import f", "def f():\n    import msa.b",
    "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from msa.b import C",
])  # fmt: skip
def test_every_import_is_an_arrow(statement, tmp_path):
    package = tmp_path / "msa"
    package.mkdir()
    (package / "a.py").write_text(statement)
    (package / "b.py").write_text("")
    assert arrows.imports(package) == {"msa.a": {"msa.b"}, "msa.b": set()}


def test_the_picture_of_the_house_is_that_of_the_source():
    """`python -m docs.hooks.arrows` draws it again."""
    assert arrows.PICTURE.read_text(encoding="utf-8") == arrows.picture()


def test_primitives_of_checks_import_nothing_of_msa():
    for path in (PACKAGE / "checks").glob("*.py"):
        assert inside_msa(imported(path)) <= {"checks"}, path


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
    known = SHARED - {"autograd"} if backend == "reference" else set(SHARED)
    rules = {"chips", "loop_order", "kernel_choice"} if backend == "triton_impl" else set()
    known |= {backend} | rules
    for path in (PACKAGE / backend).rglob("*.py"):
        speaks = ("places.py", "launch.py", "block_topk.py")  # of the limits of kernels
        own = {"checks"} if backend == "triton_impl" and path.name in speaks else set()
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
    at_the_top = {
        path.stem
        for path in PACKAGE.glob("*.py")
        if library in {name.split(".")[0] for name in imported(path, everywhere=False)}
    }
    assert at_the_top == ({"autograd"} if library == "torch" else set())


@pytest.mark.parametrize("name", ["conformance", "demo", "integrations"])
def test_only_the_command_line_knows_the_extras(name):
    """The conformance kit may import the layouts of other projects."""
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0]
        if path.name != "cli.py" and room != name:
            known = {n for n in imported(path) if n.startswith(f"msa.{name}")}
            layouts = {"arrays", "layouts"} if room == "conformance" else set()
            assert known <= {"msa.integrations"} | {f"msa.integrations.{n}" for n in layouts}, path
            names = {
                alias.name
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.ImportFrom) and node.module == f"msa.{name}"
                for alias in node.names
            }
            assert names <= layouts, path


def test_operators_know_the_functions_and_what_these_are_checked_by():
    known = {"api", "autograd", "config", "dispatch", "entry", "interface", "ir", "ops"}
    known |= {"cache_checks", "checks", "layout", "paged_kv", "selection"}
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
        own = (
            {"serving", "warming"} if path.name in ("vllm_layers.py", "sglang_layers.py") else set()
        )
        assert inside_msa(imported(path)) <= known | own, path


def test_serving_knows_the_triton_backend_and_the_forms():
    known = {"config", "ir", "kernel_choice", "serving", "triton_impl", "warming"}
    for path in (PACKAGE / "serving").glob("*.py"):
        assert inside_msa(imported(path)) <= known, path


def test_conformance_knows_the_public_interface_alone():
    """The kit tests any backend, so it loads backends only by load_backend."""
    libraries = {"__future__", "hypothesis", "numpy", "rich", "msa", "torch"}
    public = {"checks", "config", "conformance", "dispatch", "interface", "ir", "kernel_choice",
              "pipeline"}  # fmt: skip
    public |= {"integrations"}  # of these, two files that need no library: see above
    for path in (PACKAGE / "conformance").rglob("*.py"):
        roots = {name.split(".")[0] for name in imported(path)} - sys.stdlib_module_names
        assert roots <= libraries, path
        assert "torch" not in {n.split(".")[0] for n in imported(path, everywhere=False)}, path
        for name in inside_msa(imported(path)) - public:
            assert name in vars(msa), (path, name)


ROOMS = {  # folders of the conformance kit, and the other folders that each of them may import
    "bad_input": set(),
    "properties": {"bad_input"},
    "foreign": {"properties"},
}
GATHER = {"__init__", "results", "results_table", "verify_run"}
"""The files of the conformance kit that may import every folder of it."""


def module_of(path: Path) -> str:
    """The full name of the module that a file holds."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def arrows_inside(package: str) -> dict[str, set[str]]:
    """For each module below a package the modules below it that it imports, also in functions."""
    paths = {module_of(path): path for path in (PACKAGE / package).rglob("*.py")}
    arrows: dict[str, set[str]] = {}
    for module, path in paths.items():
        wanted: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:  # a module of the package, or a name in it
                    full = f"{node.module}.{alias.name}"
                    wanted.add(full if full in paths else str(node.module))
        arrows[module] = wanted & set(paths)
    return arrows


def first_circle(arrows: dict[str, set[str]]) -> set[str]:
    """The modules in circles, and those that import one of them; empty if there is no circle.

    Modules that import no remaining module are removed, until no such module is left.
    """
    left = dict(arrows)
    while free := [module for module, wanted in left.items() if not wanted & set(left)]:
        for module in free:
            del left[module]
    return set(left)


def test_a_circle_would_be_seen():
    assert first_circle({"a": {"b"}, "b": {"a"}, "c": {"d"}, "d": set()}) == {"a", "b"}


def test_conformance_has_no_circle():
    """Imports for types (TYPE_CHECKING) and inside functions count as well."""
    arrows = arrows_inside("conformance")
    assert len(arrows) > 40
    assert first_circle(arrows) == set()


def test_the_folders_of_conformance_import_downwards():
    folders = {path.parent.name for path in (PACKAGE / "conformance").glob("*/__init__.py")}
    assert folders == set(ROOMS)
    for module, wanted in arrows_inside("conformance").items():
        room = (module + "..").split(".")[2]
        found = {(name + "..").split(".")[2] for name in wanted}
        assert "" not in found, f"{module} imports the whole package"
        if room in folders:
            assert found & folders <= ROOMS[room] | {room}, module
            assert not found & GATHER, module
        elif room and room not in GATHER:
            assert found & folders <= {"properties"}, module


def test_import_msa_is_light():
    code = (
        "import sys, msa; heavy = {'torch', 'triton', 'hypothesis', 'rich', 'tyro', 'sklearn', "
        "'matplotlib', 'scipy'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
