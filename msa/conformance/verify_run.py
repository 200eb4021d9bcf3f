"""The command `msa verify`: test the rules on this machine and print the results."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

from hypothesis.configuration import set_hypothesis_home_dir
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from msa.checks import check_count
from msa.conformance.backends import subjects
from msa.conformance.foreign.bad_target import BadTarget, find_target
from msa.conformance.foreign.target import Target, TargetOptions, make_target
from msa.conformance.results import chosen_properties, verify, verify_target
from msa.conformance.results_table import print_results, print_verdicts


@dataclass(frozen=True)
class VerifyOptions(TargetOptions):
    """Test the rules R1-R21 on the backends of this machine, or on your own function (--target)."""

    target: str = ""
    """Your own function to test in place of the backends, as package.module:function."""
    backend: tuple[str, ...] = ()
    """Backends to test: reference, torch, triton, triton-hopper (the triton backend with its
    kernels for Hopper; the walk is shown as triton-hopper-walk, decoding as
    triton-hopper-pages). By default all that run on this machine."""
    rule: tuple[str, ...] = ()
    """Rules to test, such as R7 R16. By default all rules."""
    examples: int = 25
    """Number of cases that are drawn for each property and backend."""
    seed: int | None = None
    """Seed for drawing cases. By default every run draws the same cases."""


def run(options: VerifyOptions) -> int:
    """Test, and print the table. The exit code is 0 if every property holds, else 1.

    Raises:
        ValueError: the options are wrong, or the target cannot be tested.
    """
    console = Console()
    check_count("examples", options.examples, 1)
    chosen = chosen_properties(options.rule)
    target = target_of(options)
    names = () if target else subjects(options.backend)
    pairs = [(p, s) for p in chosen for s in names if s.domain.has(*p.needs)]
    if target:
        console.print(
            f"{escape(options.target)}, convention {options.convention}, {options.kind}\n"
        )
        pairs = [(p, target.subject) for p in target.asked(chosen)]
    total = sum(max(1, options.examples // s.domain.cost) for _, s in pairs)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("", total=total)

        def advance(label: str) -> None:
            progress.update(task, advance=1, description=label)

        with home_elsewhere():
            asked = options.rule, options.examples, advance, options.seed
            if target:
                results = verify_target(target, *asked)
            else:
                results = verify(options.backend, *asked)
    print_results(console, results, "not asked" if target else "not claimed")
    if target:
        print_verdicts(console, results)
    return 0 if all(result.passed for result in results) else 1


@contextmanager
def home_elsewhere() -> Iterator[None]:
    """Keep the files of Hypothesis in a temporary folder, not in the user's folder."""
    if os.environ.get("HYPOTHESIS_STORAGE_DIRECTORY"):
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        set_hypothesis_home_dir(folder)
        try:
            yield
        finally:
            set_hypothesis_home_dir(None)


def target_of(options: VerifyOptions) -> Target | None:
    """The target that the options name, or None if the backends are tested.

    Raises:
        BadTarget: the target cannot be tested; options for targets are given without a target; or
            backends are given with one.
    """
    how = TargetOptions(*(getattr(options, field.name) for field in fields(TargetOptions)))
    if not options.target:
        for field in fields(TargetOptions):
            if getattr(how, field.name) != field.default:
                raise BadTarget(f"{field.name} must come with --target, got no target")
        return None
    if options.backend:
        raise BadTarget("backend must not come with --target: one of the two is tested")
    return make_target(find_target(options.target), how, options.target.rpartition(":")[2])
