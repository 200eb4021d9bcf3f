"""What `msa demo` and `msa ask` print and write: a table, a page and a figure."""

from __future__ import annotations

import io

import numpy as np
from jaxtyping import Float
from rich import box
from rich.console import Console
from rich.table import Table

from msa import files
from msa.demo import control, demo_html
from msa.demo.answers import Answer
from msa.demo.options import ReadingOptions
from msa.demo.questions import Comparison, DemoQuestion


def present(comparison: Comparison, options: ReadingOptions, console: Console) -> None:
    """Print a table. Write the page and the figure, if the options name files for them."""
    console.print(table_of(comparison))
    console.print(summary(comparison))
    if comparison.known and options.model == "tiny":
        console.print(control.table())
    if options.html is not None:
        files.write(options.html, demo_html.draw(comparison).encode())
        console.print(f"The blocks that were opened: {options.html}", markup=False, soft_wrap=True)
    if options.png is not None:
        from msa.demo import figure  # needs matplotlib

        picture = io.BytesIO()
        figure.draw(comparison).savefig(picture, format="png")
        files.write(options.png, picture.getvalue())
        console.print(f"The same as a picture: {options.png}", markup=False, soft_wrap=True)


def table_of(comparison: Comparison) -> Table:
    """A table with a row for each question."""
    table = Table(box=box.SIMPLE_HEAD, show_lines=True, padding=(0, 1))
    for name in ("asked", "picture"):
        table.add_column(name, vertical="middle", no_wrap=True, min_width=8)
    right = ("\nright",) if comparison.known else ()
    for name in ("tokens\nback", *right, "\ndense", "\nMSA", "keys of\ndense", "keys of\nMSA"):
        table.add_column(name, justify="right", vertical="middle", no_wrap=True)
    for question, dense, sparse in zip(comparison.questions, comparison.dense, comparison.sparse):
        answers = [format_answer(question, answer) for answer in (dense, sparse)]
        table.add_row(
            f"?{question.key}=", half_blocks(comparison.images[question.picture]),
            f"{question.distance:,}", *([str(question.right)] if comparison.known else []),
            *answers,
            f"{dense.keys:,.0f}", f"{sparse.keys:.0f}",
        )  # fmt: skip
    return table


def format_answer(question: DemoQuestion, answer: Answer) -> str:
    """The digit: with a colour and a mark if the right one is known, else with its probability."""
    if question.right is None:
        return f"{answer.digit} [dim]{answer.chance:.0%}[/]"
    colour = "green" if answer.digit == question.right else "red"
    return f"[{colour}]{answer.digit} {question.mark(answer)}[/]"


def summary(comparison: Comparison) -> str:
    """The results in two sentences."""
    dense_keys, sparse_keys = comparison.keys
    asked = f"{len(comparison.questions)} question{'s' if len(comparison.questions) > 1 else ''}"
    same = sum(a.digit == b.digit for a, b in zip(comparison.dense, comparison.sparse))
    result = (
        f"read densely, these weights are right for {comparison.right(comparison.dense)}; read "
        f"with MSA, as they were trained, for {comparison.right(comparison.sparse)}, with"
        if comparison.known
        else f"MSA answers as dense attention does to {same}, with"
    )
    return (
        f"{comparison.tokens:,} tokens, {asked}: {result} {sparse_keys / dense_keys:.1%} of the "
        f"keys for an answer. Both use the same weights; reading took "
        f"{comparison.seconds[0]:.2f} s and {comparison.seconds[1]:.2f} s."
    )


def half_blocks(picture: Float[np.ndarray, "height width"]) -> str:
    """The picture as text. A character is two pixels high.

    >>> half_blocks(np.array([[1.0, -1.0, 1.0], [-1.0, 1.0, 1.0]]))
    '▀▄█'
    """
    ink = picture > 0
    rows = zip(ink[::2].tolist(), ink[1::2].tolist())
    return "\n".join("".join(" ▄▀█"[2 * a + b] for a, b in zip(*row)) for row in rows)
