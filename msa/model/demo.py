"""`msa demo`: a fresh document, its questions, and what a trained model read to answer them."""

from __future__ import annotations

from dataclasses import dataclass

from msa import checks
from msa.model import shown
from msa.model.shown import Question, ReadingOptions, Shown


@dataclass(frozen=True, kw_only=True)
class DemoOptions(ReadingOptions):
    """Hide pictures of digits in prose that the model has never seen, and ask for them.

    The shipped model (0.9M parameters) was trained on documents of at most 512 tokens.
    """

    tokens: int = 2048
    """Length of the document."""
    records: int = 8
    """Pictures hidden in it; all are asked for."""
    seed: int = 0
    """Draws prose, pictures and keys, all from what training never saw; from 0 up to 2**63 - 1."""


def run(options: DemoOptions) -> int:
    """Ask, print a table, write page and figure if asked."""
    from rich.console import Console

    shown.tell(compute(options), options, Console())
    return 0


def compute(options: DemoOptions) -> Shown:
    """Write the document and let the model read it twice.

    Raises:
        ValueError: no room for the records, too little prose for the tokens, a seed out of range; a
            model or a backend that is not there; a file that cannot be written.
    """
    from msa.model.evaluate import check_documents, unseen_documents

    checks.check_seed("seed", options.seed)
    check_documents(options.tokens, options.records, options.records, "tokens")
    shown.check_files(options)
    model = shown.load_model(options)
    (document,) = unseen_documents(
        options.tokens, options.records, options.records, 1, options.seed
    )
    questions = [
        Question(asked.key.decode(), document.tokens, asked.place, asked.record, asked.digit)
        for asked in document.questions
    ]
    return shown.read(model, document.images, questions)
