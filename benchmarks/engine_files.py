"""Files of serving engines, taken from their wheels, for tests and benchmarks around them.

They are never part of this project: a wheel, or what was unpacked from it, lies in a folder that
the caller names. Only the files of the attention are read. What they import besides is replaced by
stubs, so neither an engine nor its other libraries has to be installed.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
import types
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

VARIABLE = "MSA_ENGINE_WHEELS"
"""The environment variable that names the folder."""
VERSIONS = {"vllm": "0.33.0", "sglang": "0.5.23"}
"""The versions whose files are taken."""
M3 = "vllm/models/minimax_m3"
MINIMAX = "sglang/kernels/ops/attention/minimax_sparse"
FILES = {
    "vllm": (
        f"{M3}/common/indexer.py", f"{M3}/common/sparse_attention.py",
        f"{M3}/common/ops/index_topk.py", f"{M3}/common/ops/sparse_attn.py",
        "vllm/v1/attention/backends/utils.py", "vllm/plugins/__init__.py",
    ),
    "sglang": (
        *(f"{MINIMAX}/{name}.py" for name in (
            "common/index", "common/tile_ptr", "common/utils", "decode/flash_with_topk_idx",
            "decode/topk_sparse", "prefill/flash_with_topk_idx", "prefill/topk_sparse")),
        "sglang/srt/layers/attention/minimax_sparse_ops/minimax_sparse.py",
        "sglang/srt/plugins/__init__.py", "sglang/srt/plugins/hook_registry.py",
    ),
}  # fmt: skip


def missing(engine: str, folder: str | Path | None = None) -> str | None:
    """Why the files of an engine cannot be read; None if they can.

    Args:
        folder: where they are; None means the folder of the environment variable.
    """
    folder = folder or os.environ.get(VARIABLE)
    wanted = f"{engine}=={VERSIONS[engine]}"
    if not folder:
        return f"{VARIABLE} is not set: name a folder with the wheel of {wanted}"
    if wheel_of(engine, Path(folder)) is None and not (Path(folder) / FILES[engine][0]).exists():
        return f"{folder} has no wheel of {wanted}: pip download --no-deps {wanted} -d {folder}"
    return None


def wheel_of(engine: str, folder: Path) -> Path | None:
    """The wheel of an engine in a folder."""
    return next(iter(sorted(folder.glob(f"{engine}-{VERSIONS[engine]}-*.whl"))), None)


def unpack(engine: str, folder: str | Path, into: Path) -> Path:
    """The folder that has the files of an engine unpacked, which is `into` if there is a wheel."""
    wheel = wheel_of(engine, Path(folder))
    if wheel is None:
        return Path(folder)
    with zipfile.ZipFile(wheel) as opened:
        for name in FILES[engine]:
            opened.extract(name, into)
    return into


# -- modules --------------------------------------------------------------------------------------
@contextmanager
def modules_of(*roots: str) -> Iterator[None]:
    """Inside, modules below these names may be made; afterwards all is as before."""

    def own() -> dict[str, types.ModuleType]:
        return {
            name: module for name, module in sys.modules.items()
            if any(f"{name}.".startswith(f"{root}.") for root in roots)
        }  # fmt: skip

    before = own()
    for name in before:
        del sys.modules[name]
    try:
        yield
    finally:
        for name in own():
            del sys.modules[name]
        sys.modules.update(before)


def stub(name: str, **names: Any) -> types.ModuleType:
    """A module of these names, and empty packages above it where there are none."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        above = ".".join(parts[:i])
        if above not in sys.modules:
            package = types.ModuleType(above)
            package.__path__ = []
            sys.modules[above] = package
    made = sys.modules.get(name) or types.ModuleType(name)
    made.__path__ = getattr(made, "__path__", [])
    vars(made).update(names)
    sys.modules[name] = made
    if len(parts) > 1:
        setattr(sys.modules[".".join(parts[:-1])], parts[-1], made)
    return made


def load(folder: Path, name: str) -> types.ModuleType:
    """Import a file of an engine under its own name."""
    path = folder / (name.replace(".", "/") + ".py")
    if not path.exists():
        path = folder / name.replace(".", "/") / "__init__.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    above, _, last = name.rpartition(".")
    stub(above)
    sys.modules[name] = made
    spec.loader.exec_module(made)
    setattr(sys.modules[above], last, made)
    return made


def function_of(path: Path, name: str, **scope: Any) -> Any:
    """One function of a file, without importing the file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    node = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)
    for argument in (*node.args.args, *node.args.kwonlyargs):
        argument.annotation = None
    node.returns = None
    exec(compile(ast.Module([node], []), str(path), "exec"), scope)
    return scope[name]


def untuned(*modules: types.ModuleType) -> None:
    """Leave every autotuned kernel one configuration: Triton's interpreter has nothing to tune."""
    for module in modules:
        for kernel in vars(module).values():
            while hasattr(kernel, "fn"):
                if isinstance(getattr(kernel, "configs", None), list):
                    kernel.configs = kernel.configs[-1:]
                kernel = kernel.fn
