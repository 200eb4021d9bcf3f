"""Trying one property on one backend: the same search for pytest and for `msa verify`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import seed as seeded

from msa.conformance.backends import Subject
from msa.conformance.properties import Property
from msa.conformance.seeds import seeds_of
from msa.conformance.tolerances import AGREES, Measure, worst


@dataclass
class Tally:
    """What was seen while Hypothesis searched."""

    tried: int = 0
    measure: Measure = field(default=AGREES)
    """Of the case that came closest to its bound."""
    counterexample: Any = None
    """The last case that failed: the shrunk one, once the search is over."""
    error: Exception | None = None


def search(
    prop: Property,
    subject: Subject,
    options: settings,
    tally: Tally,
    on_example: Callable[[], None] = lambda: None,
    seed: int | None = None,
) -> None:
    """Look for a case in which the property does not hold.

    Args:
        seed: of the search, instead of what `options` say: other cases for every other number.

    Raises:
        AssertionError: for the smallest such case. The tally has it as well.
    """

    def check(case: Any) -> None:
        tally.tried += 1
        on_example()
        try:
            tally.measure = worst(tally.measure, prop.check(subject, case))
        except Exception as error:
            tally.counterexample, tally.error = case, error
            raise

    check.__name__ = prop.name
    test = given(prop.cases(subject.domain))(check)
    if seed is not None:
        test = seeded(seed)(test)
    for known in seeds_of(prop, subject.domain):
        test = example(known)(test)
    settings(
        options,
        max_examples=max(1, options.max_examples // subject.domain.cost),
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )(test)()
