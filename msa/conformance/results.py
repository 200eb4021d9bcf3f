"""Try every property on every backend, or on a function of the caller."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from hypothesis import Phase, settings

from msa.conformance.backends import Subject, subjects
from msa.conformance.foreign.target import Target
from msa.conformance.properties import RULES, Property
from msa.conformance.properties.collect import all_properties
from msa.conformance.search import Tally, search
from msa.conformance.seeds import bug_of
from msa.conformance.tolerances import AGREES, Measure

PHASES = (Phase.explicit, Phase.generate, Phase.shrink)
"""The phases of a search. Phase.explain is left out because it takes long."""


@dataclass(frozen=True)
class Result:
    """The result of one property on one backend."""

    rule: str
    name: str
    statement: str
    backend: str
    claimed: bool
    """False if the backend lacks a function, option or dtype that the property needs."""
    tried: int = 0
    measure: Measure = AGREES
    counterexample: str = ""
    error: str = ""
    bug: str = ""
    """The kind of bug, if the counterexample is a seed for one."""

    @property
    def passed(self) -> bool:
        """Whether no counterexample was found."""
        return not self.error


def chosen_properties(rules: tuple[str, ...]) -> list[Property]:
    """The properties of the given rules, or all properties, in the order of the rules.

    Raises:
        ValueError: a rule has no property.
    """
    everything = all_properties()
    wanted = {rule.upper() for rule in rules}
    unknown = wanted - {p.rule for p in everything}
    if unknown:
        raise ValueError(f"rule must be one of R1 to R21, got {', '.join(sorted(unknown))}")
    chosen = [p for p in everything if not wanted or p.rule in wanted]
    return sorted(chosen, key=lambda p: int(p.rule[1:]))


def verify(
    backends: tuple[str, ...] = (), rules: tuple[str, ...] = (), examples: int = 25,
    on_example: Callable[[str], None] = lambda label: None, seed: int | None = None,
) -> list[Result]:  # fmt: skip
    """Search for counterexamples to every property, on every backend of this machine.

    Args:
        backends, rules: see VerifyOptions; empty means all.
        examples: how many cases are drawn for each property and backend.
        on_example: called with "R7 torch" or the like before each case.
        seed: see VerifyOptions.
    """
    pairs = [(p, s) for p in chosen_properties(rules) for s in subjects(backends)]
    return [try_one(p, s, examples, on_example, seed) for p, s in pairs]


def verify_target(
    target: Target, rules: tuple[str, ...] = (), examples: int = 25,
    on_example: Callable[[str], None] = lambda label: None, seed: int | None = None,
) -> list[Result]:  # fmt: skip
    """Search for counterexamples to the properties that apply to a target.

    A rule without such a property gets one Result with claimed=False.
    """
    results: list[Result] = []
    for rule in dict.fromkeys(p.rule for p in chosen_properties(rules)):
        asked = target.asked(chosen_properties((rule,)))
        subject = target.tried_for(rule)
        with np.errstate(all="ignore"):  # the properties check how the target treats NaN
            results += [try_one(p, subject, examples, on_example, seed) for p in asked]
        if not asked:
            results.append(Result(rule, rule, RULES[rule], subject.label, claimed=False))
    return results


def try_one(
    prop: Property, subject: Subject, examples: int, on_example: Callable[[str], None],
    seed: int | None = None,
) -> Result:  # fmt: skip
    """Search for a counterexample to one property on one backend.

    The same seed always draws the same cases.
    """
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
