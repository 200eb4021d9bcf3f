"""What a property is, and the names of the rules. `collect` gathers the properties of all files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis.strategies import SearchStrategy

from msa import moved
from msa.conformance.backends import Domain, Subject
from msa.conformance.tolerances import Measure

Check = Callable[[Subject, Any], Measure]
Cases = Callable[[Domain], SearchStrategy[Any]]

RULES = {
    "R1": "Packing", "R2": "Alignment", "R3": "Blocks", "R4": "Token scores", "R5": "Block scores",
    "R6": "Forced blocks", "R7": "Top-k", "R8": "Canonical form", "R9": "Attention", "R10": "LSE",
    "R11": "Dense limit", "R12": "Dtypes", "R13": "Reverse index", "R14": "Schedule",
    "R15": "Partials", "R16": "Combine", "R17": "KL alignment", "R18": "Gradients",
    "R19": "Determinism", "R20": "Bad input", "R21": "Places",
}  # fmt: skip
"""The name of each rule in docs/spec.md."""


@dataclass(frozen=True)
class Property:
    """A statement about a backend that must hold in every case of its domain."""

    check: Check
    """Returns how close a case came to its error bound, or raises Disagreement."""
    cases: Cases
    needs: tuple[str, ...]
    """What a backend must have: functions of the contract, abilities, options and dtypes."""
    seeds: tuple[Any, ...]
    """Cases that every search tries first."""
    cost: int = 1
    """A search tries this many times fewer cases, because each takes long."""

    @property
    def name(self) -> str:
        """The name of the function. It starts with the rule: r7_ties_go_to_the_lower_id."""
        return self.check.__name__

    @property
    def rule(self) -> str:
        """The rule, R1 to R21."""
        return self.name.partition("_")[0].upper()

    @property
    def statement(self) -> str:
        """The first line of the function's docstring."""
        return (self.check.__doc__ or "").partition("\n")[0].removesuffix(".")


def holds_for(
    cases: Cases, *, needs: tuple[str, ...], seeds: tuple[Any, ...] = (), cost: int = 1
) -> Callable[[Check], Property]:
    """Turn a function of (subject, case) into a Property."""
    return lambda check: Property(check, cases, needs, seeds, cost)


__getattr__ = moved.names_of(__name__)
