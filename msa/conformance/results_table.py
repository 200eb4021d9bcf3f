"""Print results as a table, with the counterexamples below it."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from msa.conformance.results import Result


def print_results(console: Console, results: list[Result], unclaimed: str = "not claimed") -> None:
    """Print one row per property and one column per backend, then the counterexamples."""
    labels = list(dict.fromkeys(r.backend for r in results))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("rule")
    table.add_column("what holds")
    for label in labels:
        table.add_column(label, justify="right", no_wrap=True)
    cells = {(r.name, r.backend): cell(r, unclaimed) for r in results}
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
    """Print the rules in three lines: those that hold, that fail, and that were not asked."""
    asked = {r.rule for r in results if r.claimed}
    failing = {r.rule for r in results if not r.passed}
    rules = list(dict.fromkeys(r.rule for r in results))
    for word, among in (
        ("hold", asked - failing),
        ("fail", failing),
        ("not asked", {*rules} - asked),
    ):
        console.print(f"{word + ':':10} {' '.join(r for r in rules if r in among) or 'none'}")


def cell(result: Result, unclaimed: str = "not claimed") -> str:
    """One cell of the table: the number of cases, and the worst error or "fails"."""
    if not result.claimed:
        return f"[dim]{unclaimed}[/]"
    if not result.passed:
        return f"{result.tried} [red]fails[/]"
    exact = result.measure.error == 0
    return f"{result.tried} [green]{'exact' if exact else f'{result.measure.ratio:.1%}'}[/]"
