"""The paper's findings and those of the tiny models: `msa/ablations/findings_tiny.json`.

That file holds runs. Each has the name of its row (a way of training), its seed and its command. A
claim names two rows and a measure, and says how the paper compares the rows in this measure.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean
from typing import Any, Literal

from docs.hooks import measured
from docs.hooks.curves import table as markdown
from msa.ablations.rows import ROWS
from msa.demo.control import shares

NAME, PRESET = "findings_tiny", "base"
Relation = Literal["lower", "equal", "higher"]
TELL = "cannot tell"
"""What overlapping ranges of a few seeds say: neither that rows are equal nor that they differ."""
Run = dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """How the paper compares one way of training with another."""

    words: str
    where: str
    """Where the paper says it: in an appendix, or in its table of results."""
    row: str
    measure: str
    """A number of each run: answers, near and far are shares, prose is nats per byte."""
    expected: tuple[Relation, ...]
    """How the row's measure should compare with the other row's: one of these."""
    beside: str = PRESET
    """The other row; by default the preset as it is."""


CLAIMS = (
    Claim("Without the KL the index does not find far pictures", "B.2", "no-kl", "far", ("lower",)),
    Claim("…but near pictures are found equally often", "B.2", "no-kl", "near", ("equal",)),
    Claim("…and prose is predicted equally well", "B.2", "no-kl", "prose", ("equal",)),
    Claim("Without the stop-gradient prose is predicted worse", "B.3", "gradient", "prose", ("higher",)),
    Claim("…also with ten times the weight of the KL", "B.3", "gradient-10", "prose", ("higher",), "kl-10"),
    Claim("Without a warm-up of the index fewer answers are right", "B.4", "no-warm-up", "answers", ("lower",)),
    Claim("With a window of as many keys fewer answers are right", "B.6", "window", "answers", ("lower",)),
    Claim("Blocks half as large, twice as many: no difference", "C.1", "blocks-8", "answers", ("equal",)),
    Claim("Large blocks, as many keys: no difference", "C.1", "blocks-40", "answers", ("equal",)),
    Claim("Forcing the first block and a window is not needed", "C.2", "forced", "answers",
          ("equal", "lower")),
    Claim("MSA from scratch is not worse than dense attention", "results", PRESET, "answers",
          ("equal", "higher"), "dense"),
    Claim("A dense model converted to MSA is not worse either", "results", "cpt", "answers",
          ("equal", "higher"), "dense"),
)  # fmt: skip


def rows() -> dict[str, list[Run]]:
    """The runs of each row that was run, in the order in which `msa findings` shows them."""
    runs = measured.read(NAME)["runs"]
    found = {row: [run for run in runs if run["row"] == row] for row in ROWS}
    return {row: own for row, own in found.items() if own}


def values(runs: list[Run], measure: str) -> list[float]:
    """One number for each seed in which there was something to measure."""
    return [run[measure] for run in runs if run[measure] is not None]


class NotSo(Exception):
    """A page claims what the data do not show; the build fails."""


def hold(words: str, true: bool) -> None:
    """State a claim of a page beside the data that show it.

    Raises:
        NotSo: the claim does not hold, so the sentence on the page has to change.

    >>> hold("one is less than two", 1 < 2)
    """
    if not true:
        raise NotSo(f"a page says that {words}; this is not so")


def relation(ours: list[float], others: list[float]) -> str:
    """Whether the ranges of two rows' seeds lie apart, and which of them is lower.

    >>> relation([0.1, 0.3], [0.4, 0.9]), relation([0.1, 0.5], [0.4, 0.9])
    ('lower', 'cannot tell')
    """
    if max(ours) < min(others):
        return "lower"
    return "higher" if min(ours) > max(others) else TELL


def told(numbers: list[float], measure: str) -> str:
    """The mean, and the lowest and highest.

    >>> told([0.5, 0.7], "far"), told([1.5, 1.75], "prose")
    ('60% (50–70%)', '1.62 (1.50–1.75)')
    """
    if measure == "prose":
        return f"{mean(numbers):.2f} ({min(numbers):.2f}–{max(numbers):.2f})"
    return f"{mean(numbers):.0%} ({min(numbers) * 100:.0f}–{max(numbers):.0%})"


def verdict(claim: Claim, found: dict[str, list[Run]]) -> tuple[str, str, str]:
    """The two rows' numbers, and whether they compare as the paper says."""
    ours, others = (values(found.get(r, []), claim.measure) for r in (claim.row, claim.beside))
    numbers = [
        f"{row}: {told(own, claim.measure) if own else 'not run'}"
        for row, own in ((claim.row, ours), (claim.beside, others))
    ]
    if min(len(ours), len(others)) < 2:
        return numbers[0], numbers[1], "not known"
    seen = relation(ours, others)
    if seen == TELL:
        return numbers[0], numbers[1], TELL
    return numbers[0], numbers[1], f"{'yes' if seen in claim.expected else 'no'}: {seen}"


def twins() -> str:
    """Right answers by length: the same weights read densely, the dense twin, and MSA.

    The dense twin was trained with dense attention and the same budget. One of its seeds had not
    learned the task at the end, so its columns hold the lowest and the highest seed, too.
    """
    columns = {
        "trained with MSA, read densely": shares("base", "dense"),
        "trained and read densely (the dense twin)": shares("dense", "dense"),
        "trained and read with MSA": shares("base", "msa"),
    }
    lengths = sorted(set.intersection(*(set(column) for column in columns.values())))
    rows = [
        (f"{n:,}", *(told(column[n], "answers") for column in columns.values())) for n in lengths
    ]
    return markdown(("tokens", *columns), rows)


def learned(answers: list[float]) -> list[float]:
    """The seeds that answer better than at chance, which is 10 %, by a wide margin."""
    return [share for share in answers if share > 0.2]


def table() -> str:
    """The claims, each with the results of the tiny models."""
    found = rows()
    lines = [(claim.words, claim.where, claim.measure, *verdict(claim, found)) for claim in CLAIMS]
    columns = "the paper", "where", "measure", "row", "compared with", "do the tiny models agree?"
    return markdown(columns, lines)
