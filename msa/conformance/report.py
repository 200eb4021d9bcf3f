"""`msa verify`: the equivalence proofs on the user's own machine, and a table of the findings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hypothesis import Phase, settings
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from msa.conformance.backends import Subject, subjects
from msa.conformance.properties import Property, all_properties
from msa.conformance.tolerances import AGREES, Measure
from msa.conformance.trial import Tally, search

PHASES = (Phase.explicit, Phase.generate, Phase.shrink)
"""All but Phase.explain, which takes long to say which parts of a counterexample matter."""


@dataclass(frozen=True)
class VerifyOptions:
    """What to try, on which backends, how often."""

    backend: tuple[str, ...] = ()
    """Backends to try: reference, torch, triton. All that run here by default."""
    rule: tuple[str, ...] = ()
    """Rules to try, such as R7 R16. All twenty by default."""
    examples: int = 25
    """Cases that Hypothesis draws for each property and backend."""


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
        raise ValueError(f"rule must be one of R1 to R20, got {', '.join(sorted(unknown))}")
    chosen = [p for p in everything if not wanted or p.rule in wanted]
    return sorted(chosen, key=lambda p: int(p.rule[1:]))


def verify(
    backends: tuple[str, ...] = (),
    rules: tuple[str, ...] = (),
    examples: int = 25,
    on_example: Callable[[str], None] = lambda label: None,
) -> list[Result]:
    """Search for counterexamples to every property, on every backend that runs here.

    Args:
        backends, rules: see VerifyOptions; empty means all.
        examples: how many cases are drawn for each property and backend.
        on_example: called with "R7 torch" or the like before each case.
    """
    pairs = [(p, s) for p in chosen_properties(rules) for s in subjects(backends)]
    return [try_one(p, s, examples, on_example) for p, s in pairs]


def try_one(
    prop: Property, subject: Subject, examples: int, on_example: Callable[[str], None]
) -> Result:
    """One property on one backend; the same cases every time."""
    about = (prop.rule, prop.name, prop.statement, subject.label)
    if not subject.domain.has(*prop.needs):
        return Result(*about, claimed=False)
    tally = Tally()
    options = settings(max_examples=examples, database=None, derandomize=True, phases=PHASES)
    try:
        search(prop, subject, options, tally, lambda: on_example(f"{prop.rule} {subject.label}"))
    except Exception as error:
        found = tally.error or error
        message = f"{type(found).__name__}: {found}"
        return Result(*about, True, tally.tried, tally.measure, repr(tally.counterexample), message)
    return Result(*about, True, tally.tried, tally.measure)


# -- printing -------------------------------------------------------------------------------------
def run(options: VerifyOptions) -> int:
    """Try, print the table, and say by the exit code whether everything held (0) or not (1)."""
    console = Console()
    try:
        names, chosen = subjects(options.backend), chosen_properties(options.rule)
    except ValueError as error:
        console.print(f"[red]{escape(str(error))}[/]")
        return 2
    total = sum(
        max(1, options.examples // s.domain.cost)
        for p in chosen
        for s in names
        if s.domain.has(*p.needs)
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        results = verify(
            options.backend,
            options.rule,
            options.examples,
            lambda label: progress.update(task, advance=1, description=label),
        )
    print_results(console, results)
    return 0 if all(result.passed for result in results) else 1


def print_results(console: Console, results: list[Result]) -> None:
    """One row for each property, one column for each backend; then the counterexamples."""
    labels = list(dict.fromkeys(r.backend for r in results))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("rule")
    table.add_column("what holds")
    for label in labels:
        table.add_column(label, justify="right", no_wrap=True)
    cells = {(r.name, r.backend): show(r) for r in results}
    for name, rule, statement in dict.fromkeys((r.name, r.rule, r.statement) for r in results):
        table.add_row(rule, escape(statement), *(cells[name, label] for label in labels))
    console.print(table)
    console.print(
        "[dim]Cases tried, then the worst error as a share of its bound; exact: no difference is "
        "allowed, and none was seen.[/]"
    )
    for r in results:
        if not r.passed:
            console.print(f"\n[red]{r.name}[/] fails on {r.backend}: {escape(r.error)}")
            console.print(f"  {escape(r.counterexample)}", soft_wrap=True)
    claimed, failed = sum(r.claimed for r in results), sum(not r.passed for r in results)
    tried = sum(r.tried for r in results)
    console.print(f"\n{claimed - failed} of {claimed} properties hold in {tried} cases.")


def show(result: Result) -> str:
    """A cell of the table."""
    if not result.claimed:
        return "[dim]not claimed[/]"
    if not result.passed:
        return f"{result.tried} [red]fails[/]"
    exact = result.measure.error == 0
    return f"{result.tried} [green]{'exact' if exact else f'{result.measure.ratio:.1%}'}[/]"
