"""Compile the kernels for one family of GPUs that need not be here; one line of JSON for each.

    python -m benchmarks.compile_target FAMILY [--shapes ...] [--portion I/N] [--hopper]

No kernel is launched. The functions of the backend are called with tensors on the CPU, so every
argument, stride and constant is the one that a GPU would get. Each launch becomes a compilation in
a forked child, so an error of the compiler is a result and not the end.

What differs from a run on the GPU: tensors on the CPU are taken for tensors on it, `chips.current`
is the family's chip, and integers that no kernel has written are 0.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from msa import chips, kernel_choice

LONGEST = 300
"""Seconds that one compilation may take."""
SHOWN = ("FOLD", "TMA", "SPLIT", "SPLITS", "EIGHT", "EIGHT_INDEX", "PARTS", "GRADIENT", "INDEX",
         "LONG", "N", "R", "W", "BM", "BN", "num_warps", "num_stages")  # fmt: skip
"""The constants of a kernel that a row of the results shows."""


class Driver:
    """A driver that names a target and has no device."""

    def __init__(self, family: chips.Family) -> None:
        amd = family.is_amd
        arch: Any = family.name if amd else int(family.name.replace(".", ""))
        self.target = GPUTarget("hip" if amd else "cuda", arch, family.warp)

    def get_current_target(self) -> GPUTarget:
        """The family."""
        return self.target

    def get_current_device(self) -> int:
        """Any number."""
        return 0

    def get_current_stream(self, device: object = None) -> int:
        """Any number."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """The tensors are on the CPU."""
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name: str) -> str:
        """A type of a launcher that is never built."""
        return "int"


def pretend(family: chips.Family, hopper: bool) -> None:
    """Let the backend take tensors on the CPU for tensors on a GPU of this family."""
    from msa.triton_impl import append, launch, page_scores, tile_verbs  # noqa: F401

    torch.set_num_threads(1)
    fake: Any = Driver(family)
    driver.set_active(fake)
    chip = chips.Chip(family, family.examples, 132, family.shared, chips.MEASURED.l2)
    chips.current = lambda: chip

    def can_describe(tensor: torch.Tensor, dim: int) -> bool:
        return family.descriptors and describable(tensor, dim)

    def page_matrix(pages: torch.Tensor) -> torch.Tensor | None:
        """For contiguous pages, wherever they are."""
        return pages.reshape(-1, pages.stride(1)) if family.descriptors else None

    def can_overlap(device: torch.device) -> bool:
        return family.dependent_launch

    def dependent_launch(device: torch.device) -> dict[str, bool]:
        return {"PDL": True, "launch_pdl": True} if can_overlap(device) else {"PDL": False}

    def check_triton_device(*arguments: object) -> None:
        return

    others = (can_describe, page_matrix, can_overlap, dependent_launch, check_triton_device)
    for module in [m for name, m in sys.modules.items() if name.startswith("msa.triton_impl")]:
        for other in others:
            if hasattr(module, other.__name__):
                setattr(module, other.__name__, other)
    tile_verbs.FAST = triton.language.constexpr(not family.is_amd)
    kernel_choice.machine_of = lambda array: {
        "device": "a GPU", "capability": (9, 0) if hopper else None,
        "triton": triton.__version__, "interpreted": False,
    }  # fmt: skip
    empty = torch.empty

    def known(*size: Any, **options: Any) -> torch.Tensor:
        made = empty(*size, **options)
        return made if made.is_floating_point() else made.zero_()

    torch.empty = known


def describable(tensor: torch.Tensor, dim: int) -> bool:
    """`launch.can_describe` without the question where the tensor is."""
    step = tensor.stride(0) * tensor.element_size()
    return dim & (dim - 1) == 0 and step % 16 == 0 and (
        tensor.dim() == 2 or tensor.stride(1) == dim
    )  # fmt: skip


# -- one compilation ------------------------------------------------------------------------------
def facts(kernel: Any, family: chips.Family) -> dict[str, Any]:
    """Shared memory, registers, spilled bytes and threads of a compiled kernel."""
    found = {"shared": kernel.metadata.shared, "threads": family.warp * kernel.metadata.num_warps}
    if family.is_amd:
        said = {
            name: int(number)
            for name, number in re.findall(r"\.(\w+):\s+(\d+)", kernel.asm["amdgcn"])
        }
        # a register that does not fit is kept in scratch memory, four bytes for each thread
        return found | {"registers": said["vgpr_count"], "spilled": 4 * said["vgpr_spill_count"]}
    ptx = kernel.asm["ptx"]
    found["threads"] = int(first(r"\.reqntid (\d+)", ptx))
    said = assembled(ptx)
    found["registers"] = int(first(r"Used (\d+) registers", said))
    found["spilled"] = sum(map(int, re.findall(r"(\d+) bytes spill stores", said)))
    if "C75" in said:
        found["serialised"] = True  # products that wait for one another
    return found


def assembled(ptx: str) -> str:
    """What the assembler says about PTX."""
    target, errors = first(r"\.target (sm_\w+)", ptx), ""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    new = int(first(r"(\d+)", target)) >= 100
    tools = [t for t in ("ptxas-blackwell", "ptxas") if (folder / t).exists()]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        for tool in tools if new else tools[::-1]:
            done = subprocess.run(
                [folder / tool, "-v", f"--gpu-name={target}", file.name, "-o", "/dev/null"],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode == 0:
                return done.stdout + done.stderr
            errors = done.stderr
    raise RuntimeError(errors[-300:])


def first(pattern: str, text: str) -> str:
    """The first group of the first place where a text has a pattern."""
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern} in {text[-200:]!r}")
    return found[1]


def in_child(compile_it: Any) -> dict[str, Any]:
    """What a function returns that runs in a child process, or the error that it raised."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(LONGEST)
        try:
            found = compile_it()
        except BaseException as error:
            found = {"error": f"{type(error).__name__}: {(str(error) or '-').splitlines()[0]}"}
        os.write(write, json.dumps(found).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    return json.loads(said) if said else {"error": f"the compiler ended with status {status}"}


class Compiler:
    """Takes the place of `JITFunction.run`: compiles each variant of a kernel once."""

    def __init__(self, family: chips.Family, portion: tuple[int, int], hopper: bool) -> None:
        self.family, self.portion, self.hopper = family, portion, hopper
        self.run, self.seen, self.shape, self.case = JITFunction.run, set(), "", ""

    def __call__(self, kernel: Any, *values: Any, grid: Any, warmup: bool, **options: Any) -> None:
        """Compile a kernel as a launch with these arguments would."""
        plain = {k: v for k, v in options.items() if isinstance(v, int | bool | str)}
        dtypes = [str(value.dtype) for value in values if hasattr(value, "dtype")][:3]
        key = json.dumps([kernel.__name__, plain, dtypes], sort_keys=True)
        if key in self.seen:
            return
        self.seen.add(key)
        mine, portions = self.portion
        is_hopper = "hopper" in kernel.fn.__module__
        if is_hopper != self.hopper or len(self.seen) % portions != mine:
            return
        start = time.time()
        made = in_child(lambda: facts(
            self.run(kernel, *values, grid=grid, warmup=True, **options), self.family
        ))  # fmt: skip
        row = {
            "kernel": kernel.__name__, "shape": self.shape, "case": self.case,
            "options": {name: plain[name] for name in SHOWN if name in plain}, **made,
            "seconds": round(time.time() - start, 1),
        }  # fmt: skip
        print(json.dumps(row), flush=True)


def main() -> None:
    """Make every call of `compile_cases` that the family has the numbers for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=chips.FAMILIES)
    parser.add_argument("--shapes", nargs="*")
    parser.add_argument("--cases", nargs="*")
    parser.add_argument("--portion", default="0/1")
    parser.add_argument("--hopper", action="store_true")
    options = parser.parse_args()
    family = chips.FAMILIES[options.family]
    from benchmarks.compile_cases import CASES, SHAPES

    pretend(family, options.hopper)
    mine, portions = map(int, options.portion.split("/"))
    compiler = Compiler(family, (mine, portions), options.hopper)

    def launch(self: Any, *values: Any, **options: Any) -> None:
        compiler(self, *values, **options)

    JITFunction.run = launch  # pyrefly: ignore[method-assign]
    for shape in options.shapes or SHAPES:
        for case in CASES:
            skipped = case.eight and not family.e4m3
            skipped |= case.name not in (options.cases or [case.name])
            if skipped or (case.once and shape != next(iter(SHAPES))):
                continue
            compiler.shape, compiler.case = shape, case.name
            try:
                case.call(SHAPES[shape])
            except Exception as error:  # an error of the host code is a result, too
                said = f"{type(error).__name__}: {error}"[:300]
                print(json.dumps({"kernel": "(host)", "shape": shape, "case": case.name,
                                  "error": said}), flush=True)  # fmt: skip


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        main()
