"""The page of older results: for each file in benchmarks/results/history its figures and tables."""

from __future__ import annotations

from benchmarks.figures import decode, integrations, prefill
from docs.hooks import standing, standing_steps
from docs.hooks.measured import device, kind_of, older, show


def words_of(name: str) -> str:
    """The heading of a file.

    >>> words_of("history/prefill_h200")
    'Prefill on an H200'
    """
    return f"{kind_of(name).capitalize()} on an {device(name)}"


def figure_of(name: str) -> str:
    """The main figure of a file; empty for a benchmark without one."""
    match kind_of(name):
        case "prefill":
            draw, alt = prefill.latency_and_gain, "time against prompt length, dense and MSA"
        case "decode":
            draw, alt = decode.steps, "bars of a decode step, dense and MSA"
        case "integrations":
            draw, alt = integrations.lengths, "time and memory of a forward pass by length"
        case _:
            return ""
    return show(name, draw, f"{words_of(name)}.", alt)


def figures() -> str:
    """The figures of all files."""
    return "\n".join(figure_of(name) for name in older())


def tables_of(name: str) -> list[str]:
    """The tables and sentences of a file."""
    match kind_of(name):
        case "prefill":
            sentences = (standing.million, standing.production, standing.eight_bits)
            return [standing.prefill(name), " ".join(say(name) for say in sentences)]
        case "train":
            return [standing_steps.training(name), standing_steps.warm_up(name)]
        case "decode":
            return [standing_steps.decoding(name)]
        case "integrations":
            return [standing_steps.operators(name)]
        case _:
            return []


def tables() -> str:
    """The tables of all files, each below its heading."""
    return "\n\n".join("\n\n".join([f"## {words_of(name)}", *tables_of(name)]) for name in older())
