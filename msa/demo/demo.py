"""`msa demo`: a new document, its questions, and the blocks that a trained model reads for them."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

from msa.checks import check_seed
from msa.demo.options import ReadingOptions, check_files, load_model
from msa.demo.present import present
from msa.demo.questions import Comparison, DemoQuestion, compare
from msa.training.evaluate import check_documents, unseen_documents


@dataclass(frozen=True, kw_only=True)
class DemoOptions(ReadingOptions):
    """Hide pictures of digits in unseen prose, and ask a trained model for them.

    The tiny model (0.9M parameters) was trained on documents of at most 512 tokens.
    """

    tokens: int = 2048
    """Length of the document."""
    records: int = 8
    """The number of pictures hidden in it. All of them are asked for."""
    seed: int = 0
    """Draws prose, pictures and keys that were not in training; from 0 up to 2**63 - 1."""


def run(options: DemoOptions) -> int:
    """Ask all questions, print a table, and write the page and the figure of the options."""
    present(compute(options), options, Console())
    return 0


def compute(options: DemoOptions) -> Comparison:
    """Make the document and let the model read it twice: by dense attention and by MSA.

    Raises:
        ValueError: too many records for the tokens, too little prose, a seed out of range; a model
            or a backend that does not exist; a file that cannot be written.
    """
    check_seed("seed", options.seed)
    check_documents(options.tokens, options.records, options.records, "tokens")
    check_files(options)
    model = load_model(options)
    (document,) = unseen_documents(
        options.tokens, options.records, options.records, 1, options.seed
    )
    questions = [
        DemoQuestion(asked.key.decode(), document.tokens, asked.place, asked.record, asked.digit)
        for asked in document.questions
    ]
    return compare(model, document.images, questions)
