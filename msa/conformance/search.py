"""Trying one property on one backend: the same search for pytest and for `msa verify`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from hypothesis import HealthCheck, example, given, settings
from hypothesis import seed as seeded
from hypothesis.internal.conjecture import providers

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
    settled = settings(
        options,
        max_examples=max(1, options.max_examples // subject.domain.cost),
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )(test)
    with whatever_is_imported():
        settled()


@contextmanager
def whatever_is_imported() -> Iterator[None]:
    """Draw the same cases in every process.

    Hypothesis takes some of the numbers that it draws from the source of modules that happen to be
    imported, so the same seed finds a bug in one process and misses it in another. Here it takes
    none from there. Releases that never did (before 6.131.9) are left alone.
    """
    if not hasattr(providers, "_get_local_constants"):
        yield
        return
    with mock.patch.object(providers, "_get_local_constants", providers.Constants):
        providers.CONSTANTS_CACHE.cache.clear()  # it holds some of both kinds
        try:
            yield
        finally:
            providers.CONSTANTS_CACHE.cache.clear()
