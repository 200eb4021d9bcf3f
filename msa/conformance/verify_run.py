"""`msa verify`: tries the rules on this machine and prints what was found."""

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
    """What to try, how often: the backends here, or a function of yours (--target)."""

    target: str = ""
    """Your own function in place of the backends, package.module:function."""
    backend: tuple[str, ...] = ()
    """Backends to try: reference, torch, triton. All that run here by default."""
    rule: tuple[str, ...] = ()
    """Rules to try, such as R7 R16. All by default."""
    examples: int = 25
    """Cases that Hypothesis draws for each property and backend."""
    seed: int | None = None
    """Which cases: other ones for every number. The same ones every time by default."""


def run(options: VerifyOptions) -> int:
    """Try, print the table, and say by the exit code whether everything held (0) or not (1).

    Raises:
        ValueError: it cannot be tried at all.
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
    """Let Hypothesis keep its notes out of the user's folder, and only for so long."""
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
    """The function that the options name; None: the backends.

    Raises:
        BadTarget: it cannot be tried, or options of a target without one, or with backends.
    """
    how = TargetOptions(*(getattr(options, field.name) for field in fields(TargetOptions)))
    if not options.target:
        for field in fields(TargetOptions):
            if getattr(how, field.name) != field.default:
                raise BadTarget(f"{field.name} must come with --target, got no target")
        return None
    if options.backend:
        raise BadTarget("backend must not come with --target: either these or that is tried")
    return make_target(find_target(options.target), how, options.target.rpartition(":")[2])
