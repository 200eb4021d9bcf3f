"""Every kernel's docstring lists its parameters. The source is read; no kernel runs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "msa" / "triton_impl"
HEADING = "    Parameters:\n"


def functions(path):
    return [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]


def is_jitted(function):
    names = ("triton.jit", "gluon.jit")
    return any(ast.unparse(d).startswith(names) for d in function.decorator_list)


def launched(path):
    """Names of the kernels that a file launches: name[grid](...)."""
    calls = (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call))
    targets = (n.func.value for n in calls if isinstance(n.func, ast.Subscript))
    return {target.id for target in targets if isinstance(target, ast.Name)}


KERNELS = {
    f.name: f for path in sorted(FOLDER.rglob("*.py")) for f in functions(path)
    if is_jitted(f) and f.name.endswith("_kernel")
}  # fmt: skip


def listed(docstring):
    """The list of parameters, name -> description. An entry may have several names."""
    text = docstring.split(HEADING.strip() + "\n")[1]
    entries = re.sub(r"\n {4,}(?![\w, ]+:)", " ", text)
    found = {}
    for line in filter(None, map(str.strip, entries.splitlines())):
        names, colon, said = line.partition(":")
        assert colon and said.strip(), line
        for name in names.split(", "):
            assert name not in found, f"{name} is listed twice"
            found[name] = said.strip()
    return found


def test_every_launched_function_is_a_kernel():
    names = set().union(*map(launched, FOLDER.rglob("*.py")))
    assert names == set(KERNELS)
    assert len(names) >= 29


@pytest.mark.parametrize("name", KERNELS)
def test_every_parameter_is_listed(name):
    """Each parameter is in the list once, and the list has no other names."""
    docstring = ast.get_docstring(KERNELS[name])
    assert docstring and HEADING.strip() in docstring
    parameters = [arg.arg for arg in KERNELS[name].args.args]
    assert set(listed(docstring)) == set(parameters)


@pytest.mark.parametrize("name", KERNELS)
def test_a_tensor_has_a_shape_and_a_dtype(name):
    """An argument is a tensor, a number or a stride; the others are compile-time constants."""
    constants = {a.arg for a in KERNELS[name].args.args if a.annotation is not None}
    for parameter, said in listed(ast.get_docstring(KERNELS[name])).items():
        if parameter in constants:
            continue
        if parameter.startswith("stride_"):
            assert said.startswith("elements from one "), parameter
        elif not said.startswith(("int", "float", "descriptors of ")):
            assert re.match(r"\[.+?\], (\w|-)", said), (parameter, said)
