"""`msa verify`: the equivalence proofs on the user's own machine, and a table of the findings."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import numpy as np
from hypothesis import Phase, settings
from hypothesis.configuration import set_hypothesis_home_dir
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from msa.checks import check_count
from msa.conformance.backends import Subject, subjects
from msa.conformance.messages import BadTarget, find
from msa.conformance.properties import RULES, Property, all_properties
from msa.conformance.seeds import bug_of
from msa.conformance.target import Target, TargetOptions, make_target
from msa.conformance.tolerances import AGREES, Measure
from msa.conformance.trial import Tally, search

PHASES = (Phase.explicit, Phase.generate, Phase.shrink)
"""All but Phase.explain, which takes long to say which parts of a counterexample matter."""


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


@dataclass(frozen=True)
class Result:
    """One property on one backend."""

    rule: str
    name: str
    statement: str
    backend: str
    claimed: bool
    """False if the backend does not have the functions that the property calls."""
    tried: int = 0
    measure: Measure = AGREES
    counterexample: str = ""
    error: str = ""
    bug: str = ""
    """The kind of bug that the counterexample is the seed of, if it is one."""

    @property
    def passed(self) -> bool:
        """Whether no counterexample was found."""
        return not self.error


def chosen_properties(rules: tuple[str, ...]) -> list[Property]:
    """Those of the given rules, or all.

    Raises:
        ValueError: for a rule that has no property.
    """
    everything = all_properties()
    wanted = {rule.upper() for rule in rules}
    unknown = wanted - {p.rule for p in everything}
    if unknown:
        raise ValueError(f"rule must be one of R1 to R21, got {', '.join(sorted(unknown))}")
    chosen = [p for p in everything if not wanted or p.rule in wanted]
    return sorted(chosen, key=lambda p: int(p.rule[1:]))


def verify(
    backends: tuple[str, ...] = (),
    rules: tuple[str, ...] = (),
    examples: int = 25,
    on_example: Callable[[str], None] = lambda label: None,
    seed: int | None = None,
) -> list[Result]:
    """Search for counterexamples to every property, on every backend that runs here.

    Args:
        backends, rules: see VerifyOptions; empty means all.
        examples: how many cases are drawn for each property and backend.
        on_example: called with "R7 torch" or the like before each case.
        seed: see VerifyOptions.
    """
    pairs = [(p, s) for p in chosen_properties(rules) for s in subjects(backends)]
    return [try_one(p, s, examples, on_example, seed) for p, s in pairs]


def verify_target(
    target: Target,
    rules: tuple[str, ...] = (),
    examples: int = 25,
    on_example: Callable[[str], None] = lambda label: None,
    seed: int | None = None,
) -> list[Result]:
    """The same for a function of one's own: every rule, and of each what speaks of the function.

    A rule of which nothing does has one Result that is not claimed.
    """
    results: list[Result] = []
    for rule in dict.fromkeys(p.rule for p in chosen_properties(rules)):
        asked = target.asked(chosen_properties((rule,)))
        subject = target.tried_for(rule)
        with np.errstate(all="ignore"):  # what it makes of NaN is judged, not warned of
            results += [try_one(p, subject, examples, on_example, seed) for p in asked]
        if not asked:
            results.append(Result(rule, rule, RULES[rule], subject.label, claimed=False))
    return results


def try_one(
    prop: Property,
    subject: Subject,
    examples: int,
    on_example: Callable[[str], None],
    seed: int | None = None,
) -> Result:
    """One property on one backend; the same cases every time, for each seed."""
    about = (prop.rule, prop.name, prop.statement, subject.label)
    if not subject.domain.has(*prop.needs):
        return Result(*about, claimed=False)
    tally = Tally()
    options = settings(max_examples=examples, database=None, derandomize=True, phases=PHASES)
    label = f"{prop.rule} {subject.label}"
    try:
        search(prop, subject, options, tally, lambda: on_example(label), seed)
    except Exception as error:
        found = tally.error or error
        message = f"{type(found).__name__}: {found}"
        found = repr(tally.counterexample), message, bug_of(tally.counterexample, subject.domain)
        return Result(*about, True, tally.tried, tally.measure, *found)
    return Result(*about, True, tally.tried, tally.measure)


# -- printing -------------------------------------------------------------------------------------
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
    return make_target(find(options.target), how, options.target.rpartition(":")[2])


def print_results(console: Console, results: list[Result], unclaimed: str = "not claimed") -> None:
    """One row for each property, one column for each backend; then the counterexamples."""
    labels = list(dict.fromkeys(r.backend for r in results))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("rule")
    table.add_column("what holds")
    for label in labels:
        table.add_column(label, justify="right", no_wrap=True)
    cells = {(r.name, r.backend): show(r, unclaimed) for r in results}
    for name, rule, statement in dict.fromkeys((r.name, r.rule, r.statement) for r in results):
        table.add_row(rule, escape(statement), *(cells[name, label] for label in labels))
    console.print(table)
    console.print(
        "[dim]Cases tried, then the worst error as a share of its bound; exact: no difference is "
        "allowed, and none was seen.[/]"
    )
    for r in results:
        if not r.passed:
            known = f" (known kind of bug: {r.bug})" if r.bug else ""
            console.print(f"\n[red]{r.name}[/] fails on {r.backend}{known}: {escape(r.error)}")
            console.print(f"  {escape(r.counterexample)}", soft_wrap=True)
    claimed, failed = sum(r.claimed for r in results), sum(not r.passed for r in results)
    tried = sum(r.tried for r in results)
    console.print(f"\n{claimed - failed} of {claimed} properties hold in {tried} cases.")


def print_verdicts(console: Console, results: list[Result]) -> None:
    """The rules in three lines: those that hold, that fail, and that were not asked."""
    asked = {r.rule for r in results if r.claimed}
    failing = {r.rule for r in results if not r.passed}
    rules = list(dict.fromkeys(r.rule for r in results))
    for word, among in (
        ("hold", asked - failing),
        ("fail", failing),
        ("not asked", {*rules} - asked),
    ):
        console.print(f"{word + ':':10} {' '.join(r for r in rules if r in among) or 'none'}")


def show(result: Result, unclaimed: str = "not claimed") -> str:
    """A cell of the table."""
    if not result.claimed:
        return f"[dim]{unclaimed}[/]"
    if not result.passed:
        return f"{result.tried} [red]fails[/]"
    exact = result.measure.error == 0
    return f"{result.tried} [green]{'exact' if exact else f'{result.measure.ratio:.1%}'}[/]"
