"""The search for a counterexample to one property on one backend.

pytest and `msa verify` use the same search.
"""

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
    """What the search has found so far."""

    tried: int = 0
    measure: Measure = field(default=AGREES)
    """The measure of the case that came closest to its bound."""
    counterexample: Any = None
    """The last case that failed. After the search it is the shrunk one."""
    error: Exception | None = None


def search(
    prop: Property, subject: Subject, options: settings, tally: Tally,
    on_example: Callable[[], None] = lambda: None, seed: int | None = None,
) -> None:  # fmt: skip
    """Search for a case in which the property does not hold.

    Args:
        on_example: called before each case.
        seed: the seed of the search, in place of the one in `options`. Each seed draws other cases.

    Raises:
        AssertionError: a case was found; it is shrunk, and the tally holds it too.
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
        max_examples=max(1, options.max_examples // (subject.domain.cost * prop.cost)),
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )(test)
    with same_cases_in_every_process():
        settled()


@contextmanager
def same_cases_in_every_process() -> Iterator[None]:
    """Let Hypothesis draw the same cases in every process.

    From 6.131.9 on, Hypothesis takes some of the numbers that it draws from the source of imported
    modules. Then the same seed finds a bug in one process and misses it in another, where other
    modules are imported. Inside this context it takes no number from there.
    """
    if not hasattr(providers, "_get_local_constants"):
        yield
        return
    with mock.patch.object(providers, "_get_local_constants", providers.Constants):
        providers.CONSTANTS_CACHE.cache.clear()  # the cache may hold numbers from imported modules
        try:
            yield
        finally:
            providers.CONSTANTS_CACHE.cache.clear()
