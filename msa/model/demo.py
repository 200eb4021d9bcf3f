"""`msa demo`: a fresh document, its questions, and what a trained model read to answer them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msa.dispatch import BackendName

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float

    from msa.model.answers import Answer
    from msa.model.model import Model
    from msa.model.records import Document


@dataclass(frozen=True)
class DemoOptions:
    """Hide pictures of digits in prose that the model has never seen, and ask for them.

    The shipped model (0.9M parameters) was trained on documents of at most 512 tokens.
    """

    backend: BackendName = "auto"
    """Who computes MSA: reference, torch or triton. auto: triton on a GPU, else torch."""
    tokens: int = 2048
    """Length of the document."""
    records: int = 8
    """Pictures hidden in it; all are asked for."""
    seed: int = 0
    """Draws prose, pictures and keys, all from what training never saw."""
    html: Path | None = None
    """Where to write a page that shows which blocks were opened."""
    model: Path | None = None
    """A folder that `msa train` wrote; None: the model that comes with the package."""
    device: str = "cpu"
    """cpu or cuda."""


@dataclass(frozen=True)
class Shown:
    """A document, and for each of its questions the answer by dense attention and by MSA."""

    document: Document
    dense: list[Answer]
    sparse: list[Answer]
    block_size: int
    seconds: tuple[float, float]

    def right(self, answers: list[Answer]) -> int:
        """How many of these answers are the digit asked for."""
        return sum(a.digit == q.digit for a, q in zip(answers, self.document.questions))

    def picture(self, question: int) -> Float[np.ndarray, "8 8"]:
        """The one that a question asks for."""
        return self.document.images[self.picture_number(question)]

    def picture_number(self, question: int) -> int:
        """Its place among the pictures of the document."""
        from msa.model.records import IMAGE_TOKEN

        record = self.document.questions[question].record
        return int((self.document.tokens[:record] == IMAGE_TOKEN).sum())


def run(options: DemoOptions) -> int:
    """Ask, print a table, write the page if asked."""
    from rich.console import Console

    console = Console()
    shown = compute(options)
    show(console, shown)
    if options.html is not None:
        from msa.model import page

        options.html.parent.mkdir(parents=True, exist_ok=True)
        options.html.write_text(page.draw(shown), encoding="utf-8")
        console.print(f"The blocks that were opened: [bold]{options.html}[/]")
    return 0


def compute(options: DemoOptions) -> Shown:
    """Write the document and let the model read it twice.

    Raises:
        ValueError: no room for the records; a model or a backend that is not there.
    """
    from msa.model.answers import answer
    from msa.model.evaluate import unseen_documents

    model = load_model(options.model, options.backend, options.device)
    (document,) = unseen_documents(
        options.tokens, options.records, options.records, 1, options.seed
    )
    places = [question.place for question in document.questions]
    started = time.perf_counter()
    dense = answer(model, document.tokens, document.images, places, "dense")
    halfway = time.perf_counter()
    sparse = answer(model, document.tokens, document.images, places)
    seconds = halfway - started, time.perf_counter() - halfway
    return Shown(document, dense, sparse, model.config.msa.block_size, seconds)


def load_model(folder: Path | None, backend: BackendName, device: str) -> Model:
    """The one in the folder, or the shipped one."""
    import torch

    from msa.model import checks
    from msa.model.checkpoint import load, load_trained

    checks.check_device(device, torch.cuda.is_available())
    if folder is None:
        return load_trained("tiny", device=device, backend=backend)
    return load(folder, device=device, backend=backend)


def show(console: Any, shown: Shown) -> None:
    """A table with a row for each question, and its sum in a sentence."""
    from rich import box
    from rich.table import Table

    document, asked = shown.document, len(shown.document.questions)
    table = Table(box=box.SIMPLE_HEAD, show_lines=True, padding=(0, 1))
    for name in ("asked", "picture"):
        table.add_column(name, vertical="middle", no_wrap=True, min_width=8)
    for name in ("tokens\nback", "\nright", "\ndense", "\nMSA", "keys of\ndense", "keys of\nMSA"):
        table.add_column(name, justify="right", vertical="middle", no_wrap=True)
    for i, question in enumerate(document.questions):
        dense, sparse = shown.dense[i], shown.sparse[i]
        marks = [
            f"[{'green' if a.digit == question.digit else 'red'}]{a.digit} "
            f"{'✓' if a.digit == question.digit else '✗'}[/]"
            for a in (dense, sparse)
        ]
        table.add_row(
            f"?{question.key.decode()}=", half_blocks(shown.picture(i)), f"{question.distance:,}",
            str(question.digit), *marks, f"{dense.keys:,.0f}", f"{sparse.keys:.0f}",
        )  # fmt: skip
    console.print(table)
    console.print(summary(shown, asked))


def summary(shown: Shown, asked: int) -> str:
    """What came of it, in two sentences."""
    of_dense = sum(a.keys for a in shown.sparse) / sum(a.keys for a in shown.dense)
    return (
        f"{len(shown.document.tokens):,} tokens, {asked} questions: dense attention is right for "
        f"{shown.right(shown.dense)}, MSA for {shown.right(shown.sparse)}, reading {of_dense:.1%} "
        f"of the keys for an answer. Both are the same weights; the whole document was read in "
        f"{shown.seconds[0]:.2f} s and {shown.seconds[1]:.2f} s."
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
