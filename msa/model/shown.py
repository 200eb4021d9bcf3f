"""Questions to a document with hidden pictures, their answers, and how both are told."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msa import files
from msa.dispatch import BackendName

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from jaxtyping import Float, Int

    from msa.model.answers import Answer
    from msa.model.model import Model


@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """What `msa demo` and `msa ask` have in common."""

    backend: BackendName = "auto"
    """Who computes MSA: reference, torch or triton. auto: triton on a GPU, else torch."""
    model: str = "tiny"
    """tiny or small, which come with the package, or a folder that `msa train` wrote."""
    device: str = "cpu"
    """cpu or cuda."""
    html: Path | None = None
    """Where to write a page that shows which blocks were opened, and what is in them."""
    png: Path | None = None
    """Where to draw which blocks were opened, as a PNG."""


@dataclass(frozen=True)
class Question:
    """What is asked of a document, and where its answer lies."""

    key: str
    tokens: Int[np.ndarray, " T"]
    """What is read, up to this question or beyond."""
    place: int
    """Of the "=": the token whose successor is the answer."""
    record: int
    """Of the picture that answers it."""
    right: int | None
    """The digit in the picture, where that is known."""

    @property
    def distance(self) -> int:
        """How many tokens back the picture stands."""
        return self.place - self.record

    @property
    def picture(self) -> int:
        """The number of the picture among those of the document."""
        from msa.model.records import IMAGE_TOKEN

        return int((self.tokens[: self.record] == IMAGE_TOKEN).sum())

    def mark(self, answer: Answer) -> str:
        """Whether an answer is right; nothing where that is not known."""
        return "" if self.right is None else "✓" if answer.digit == self.right else "✗"


@dataclass(frozen=True)
class Shown:
    """Questions, and for each of them the answer by dense attention and by MSA."""

    questions: tuple[Question, ...]
    images: Float[np.ndarray, "n 8 8"]
    """The pictures of the document, in their order."""
    dense: list[Answer]
    sparse: list[Answer]
    block_size: int
    seconds: tuple[float, float]

    @property
    def tokens(self) -> int:
        """The length of the document, or of the longest reading of it."""
        return max(len(question.tokens) for question in self.questions)

    @property
    def known(self) -> bool:
        """Whether the right answers are known."""
        return all(question.right is not None for question in self.questions)

    @property
    def keys(self) -> tuple[float, float]:
        """How many keys were read for an answer, the mean for dense attention and for MSA."""
        n = len(self.questions)
        return sum(a.keys for a in self.dense) / n, sum(a.keys for a in self.sparse) / n

    def right(self, answers: list[Answer]) -> int:
        """How many of these answers are the digit asked for."""
        return sum(a.digit == q.right for a, q in zip(answers, self.questions))


def read(model: Model, images: Float[np.ndarray, "n 8 8"], questions: Sequence[Question]) -> Shown:
    """Let a model read everything twice, by dense attention and by MSA.

    Questions to the same tokens are answered in one reading.
    """
    from msa.model.answers import answer

    readings: dict[int, list[Question]] = {}
    for question in questions:
        readings.setdefault(id(question.tokens), []).append(question)
    answers: dict[str, list[Answer]] = {}
    seconds: list[float] = []
    for mode in ("dense", "sparse"):
        started = time.perf_counter()
        answers[mode] = [
            said
            for asked in readings.values()
            for said in answer(model, asked[0].tokens, images, [q.place for q in asked], mode)
        ]
        seconds.append(time.perf_counter() - started)
    return Shown(
        tuple(question for asked in readings.values() for question in asked), images,
        answers["dense"], answers["sparse"], model.config.msa.block_size, (seconds[0], seconds[1]),
    )  # fmt: skip


def check_files(options: ReadingOptions, **read: Path) -> None:
    """Before any work: page and figure can be written, and are not what is to be `read`.

    Raises:
        ValueError: naming the option.
    """
    files.check_apart("png", options.png, html=options.html, **read)
    files.check_apart("html", options.html, **read)
    files.check_target("html", options.html)
    files.check_target("png", options.png)


def load_model(options: ReadingOptions) -> Model:
    """The shipped one of this name, or the one in the folder.

    Raises:
        ValueError: a model or a device that is not there, a model with weights that are not finite.
    """
    from msa.model import checks
    from msa.model.checkpoint import WEIGHTS, load, shipped

    checks.check_device(options.device)
    folder = shipped().get(options.model, Path(options.model))
    model = load(folder, device=options.device, backend=options.backend)
    checks.check_finite(str(folder / WEIGHTS), model.state_dict())
    return model


def tell(shown: Shown, options: ReadingOptions, console: Any) -> None:
    """Print a table, and write the page and the figure that are asked for."""
    import io

    from msa.model import figure, page

    console.print(table(shown))
    console.print(summary(shown))
    if options.html is not None:
        files.write(options.html, page.draw(shown).encode())
        console.print(f"The blocks that were opened: {options.html}", markup=False, soft_wrap=True)
    if options.png is not None:
        picture = io.BytesIO()
        figure.draw(shown).savefig(picture, format="png")
        files.write(options.png, picture.getvalue())
        console.print(f"The same as a picture: {options.png}", markup=False, soft_wrap=True)


def table(shown: Shown) -> Any:
    """A row for each question."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_lines=True, padding=(0, 1))
    for name in ("asked", "picture"):
        table.add_column(name, vertical="middle", no_wrap=True, min_width=8)
    right = ("\nright",) if shown.known else ()
    for name in ("tokens\nback", *right, "\ndense", "\nMSA", "keys of\ndense", "keys of\nMSA"):
        table.add_column(name, justify="right", vertical="middle", no_wrap=True)
    for question, dense, sparse in zip(shown.questions, shown.dense, shown.sparse):
        told = [tell_answer(question, answer) for answer in (dense, sparse)]
        table.add_row(
            f"?{question.key}=", half_blocks(shown.images[question.picture]),
            f"{question.distance:,}", *([str(question.right)] if shown.known else []), *told,
            f"{dense.keys:,.0f}", f"{sparse.keys:.0f}",
        )  # fmt: skip
    return table


def tell_answer(question: Question, answer: Answer) -> str:
    """In colour and with a mark where it is known to be right or wrong, else with its chance."""
    if question.right is None:
        return f"{answer.digit} [dim]{answer.chance:.0%}[/]"
    colour = "green" if answer.digit == question.right else "red"
    return f"[{colour}]{answer.digit} {question.mark(answer)}[/]"


def summary(shown: Shown) -> str:
    """What came of it, in two sentences."""
    dense_keys, sparse_keys = shown.keys
    asked = f"{len(shown.questions)} question{'s' if len(shown.questions) > 1 else ''}"
    same = sum(a.digit == b.digit for a, b in zip(shown.dense, shown.sparse))
    came = (
        f"dense attention is right for {shown.right(shown.dense)}, MSA for "
        f"{shown.right(shown.sparse)}, reading"
        if shown.known
        else f"MSA answers as dense attention does to {same}, reading"
    )
    return (
        f"{shown.tokens:,} tokens, {asked}: {came} {sparse_keys / dense_keys:.1%} of the keys for "
        f"an answer. Both are the same weights; reading took {shown.seconds[0]:.2f} s and "
        f"{shown.seconds[1]:.2f} s."
    )


def half_blocks(picture: Float[np.ndarray, "8 8"]) -> str:
    """Ink as characters, each two pixels high.

    >>> import numpy as np
    >>> half_blocks(np.array([[1.0, -1.0, 1.0], [-1.0, 1.0, 1.0]]))
    '▀▄█'
    """
    ink = picture > 0
    rows = zip(ink[::2].tolist(), ink[1::2].tolist())
    return "\n".join("".join(" ▄▀█"[2 * a + b] for a, b in zip(*row)) for row in rows)
