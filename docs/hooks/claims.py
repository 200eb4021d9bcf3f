"""The paper's findings beside those of the small world: `benchmarks/results/findings_tiny.json`.

Rows of that file are ways of training, each with its command and a run for each seed. A claim names
two of them by their options, a measure, and how the paper says that they compare.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from html import escape
from statistics import mean
from typing import Any, Literal

from matplotlib import pyplot

from benchmarks.figures import BLUE, INK, MUTED, QUIET, STYLE
from docs.hooks import measured
from docs.hooks.curves import table as markdown

NAME = "findings_tiny"
COMMON = ("--preset", "--seed", "--out", "--steps", "--minutes")
"""Options that all rows share, or that tell one run of a row from another."""
Relation = Literal["lower", "equal", "higher"]
Options = dict[str, str]
Row = dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """What the paper says of one way of training beside another."""

    words: str
    where: str
    measure: str
    """A number of each run: answers, near and far are shares, prose is nats per byte."""
    options: Options
    """Of the row that the claim is about."""
    expected: tuple[Relation, ...]
    """How its measure should compare with the other row's: one of these."""
    beside: Options = field(default_factory=dict)
    """The other row; none is the preset itself."""


CLAIMS = (
    Claim("Without the KL the index does not find what is far", "B.2", "far", {"--kl": "0"}, ("lower",)),
    Claim("…while what is near is read as well", "B.2", "near", {"--kl": "0"}, ("equal",)),
    Claim("Without the stop-gradient the KL costs language", "B.3", "prose",
          {"--index-gradient": ""}, ("higher",)),
    Claim("…also where it weighs ten times as much", "B.3", "prose",
          {"--index-gradient": "", "--kl": "10"}, ("higher",), {"--kl": "10"}),
    Claim("Without a warm-up of the index less is found", "B.4", "answers", {"--warm-up": "0"}, ("lower",)),
    Claim("A fixed window of as many keys finds less", "B.6", "answers",
          {"--attention": "window"}, ("lower",)),
    Claim("Blocks half as large, twice as many: no difference", "C.1", "answers",
          {"--block-size": "8", "--top-k": "10"}, ("equal",)),
    Claim("Large blocks, as many keys: no difference", "C.1", "answers",
          {"--block-size": "40", "--top-k": "2"}, ("equal",)),
    Claim("Forcing the first block and a window is not needed", "C.2", "answers",
          {"--sink-blocks": "1", "--local-blocks": "2"}, ("equal", "lower")),
    Claim("MSA from scratch is not worse than dense attention", "table of results", "answers",
          {}, ("equal", "higher"), {"--attention": "dense"}),
    Claim("Nor is a dense model that was turned into MSA", "table of results", "answers",
          {"--warm-up": "0.3"}, ("equal", "higher"), {"--attention": "dense"}),
)  # fmt: skip


def rows() -> list[Row]:
    """What has been run; nothing while there is no file."""
    if not (measured.RESULTS / f"{NAME}.json").exists():
        return []
    return measured.read(NAME)["rows"]


def options_of(command: str) -> Options:
    """The options in which one row differs from others.

    >>> options_of("msa train --preset tiny --kl 0 --index-gradient --seed 1")
    {'--kl': '0', '--index-gradient': ''}
    """
    found: Options = {}
    last = ""
    for word in shlex.split(command)[2:]:
        if word.startswith("--"):
            last, found[word] = word, ""
        else:
            found[last] = word
    return {name: value for name, value in found.items() if name not in COMMON}


def values(row: Row, measure: str) -> list[float]:
    """One number for each seed in which there was something to measure."""
    return [run[measure] for run in row["runs"] if run[measure] is not None]


def relation(ours: list[float], others: list[float]) -> Relation:
    """Whether the ranges of two rows' seeds lie apart, and which of them is lower.

    >>> relation([0.1, 0.3], [0.4, 0.9]), relation([0.1, 0.5], [0.4, 0.9])
    ('lower', 'equal')
    """
    if max(ours) < min(others):
        return "lower"
    return "higher" if min(ours) > max(others) else "equal"


def told(numbers: list[float], measure: str) -> str:
    """The mean, and the lowest and highest.

    >>> told([0.5, 0.7], "far"), told([1.5, 1.75], "prose")
    ('60% (50–70%)', '1.62 (1.50–1.75)')
    """
    if measure == "prose":
        return f"{mean(numbers):.2f} ({min(numbers):.2f}–{max(numbers):.2f})"
    return f"{mean(numbers):.0%} ({min(numbers) * 100:.0f}–{max(numbers):.0%})"


def verdict(claim: Claim, found: list[Row]) -> tuple[str, str, str]:
    """The two rows' numbers, and whether they compare as the paper says."""
    by_options = [(options_of(row["command"]), row) for row in found]
    pair = [
        next((values(row, claim.measure) for o, row in by_options if o == wanted), [])
        for wanted in (claim.options, claim.beside)
    ]
    numbers = [told(own, claim.measure) if own else "not run" for own in pair]
    if any(len(own) < 2 for own in pair):
        return numbers[0], numbers[1], "not known"
    seen = relation(*pair)
    return numbers[0], numbers[1], f"{'yes' if seen in claim.expected else 'no'}: {seen}"


def table() -> str:
    """The claims, each with what the small world says to it."""
    found = rows()
    lines = [(claim.words, claim.where, claim.measure, *verdict(claim, found)) for claim in CLAIMS]
    columns = (
        "the paper",
        "appendix",
        "measure",
        "with it",
        "beside",
        "does the small world agree?",
    )
    return markdown(columns, lines)


def commands() -> str:
    """Every row that was run, by what it is called, with its command."""
    lines = [f"{row['command']}    # {row['name']}, {len(row['runs'])} seeds" for row in rows()]
    return "```console\n" + "\n".join(lines) + "\n```" if lines else ""


def figure() -> str:
    """A dot for each run: how many of the far pictures it finds."""
    found = [(row, values(row, "far")) for row in rows()]
    found = sorted(((r, far) for r, far in found if far), key=lambda pair: mean(pair[1]))
    if not found:
        return ""
    with pyplot.rc_context(STYLE | {"svg.fonttype": "none"}):
        size = (8, 0.7 + 0.26 * len(found))
        drawn, axis = pyplot.subplots(figsize=size)
        for y, (row, far) in enumerate(found):
            color = INK if options_of(row["command"]) == {} else BLUE
            axis.plot(far, [y] * len(far), "o", color=color, alpha=0.8)
        axis.axvline(0.1, color=MUTED, lw=0.8, ls=(0, (4, 3)))
        axis.set_yticks(range(len(found)), [row["name"] for row, _ in found])
        axis.set_xlim(-0.02, 1.02)
        axis.grid(axis="y", visible=False)
        axis.spines["left"].set_color(QUIET)
        axis.set_title("Far pictures found, a dot for each seed", loc="left", fontweight="bold")
        caption = "Dashed: guessing. Black: the preset as it is."
        alt = f"{len(found)} rows of dots, {escape(found[-1][0]['name'])} farthest to the right"
        return measured.inline(drawn, "findings", caption, alt) + measured.age(NAME)
