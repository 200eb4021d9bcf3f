"""Options from the command line where tyro is not installed: the same words, plainer help."""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

KINDS: dict[str, Any] = {"int": int, "float": float, "Path": Path}
Options = TypeVar("Options")


def read(cls: type[Options], prog: str, arguments: list[str] | None = None) -> Options:
    """An options dataclass; None reads the words that the program was called with.

    Raises:
        ValueError: an option of several values that is given twice, or without one.

    >>> from msa.model.train import TrainOptions
    >>> words = ["--block-size", "8", "--index-gradient", "--start", "here"]
    >>> options = read(TrainOptions, "train", words)
    >>> options.block_size, options.index_gradient, options.start.name, options.steps
    (8, True, 'here', None)
    """
    from msa.cli import check_words

    parser = argparse.ArgumentParser(prog=prog, description=cls.__doc__)
    for field in fields(cls):  # pyrefly: ignore[bad-argument-type]
        several, kind = re.findall(r"(tuple\[)?(\w+)", str(field.type))[0]
        how: dict[str, Any] = {"type": KINDS.get(kind, str)}
        if kind == "bool":
            how = {"action": argparse.BooleanOptionalAction}
        elif several:
            how["nargs"] = "+"
        if field.default is MISSING:
            how["required"] = True
        else:
            how["default"] = field.default
        parser.add_argument(f"--{field.name.replace('_', '-')}", **how)
    words = sys.argv[1:] if arguments is None else arguments
    check_words(words, cls)
    found = vars(parser.parse_args(words))
    return cls(**{n: tuple(v) if isinstance(v, list) else v for n, v in found.items()})


def given(options: Any, *names: str) -> dict[str, Any]:
    """Those of the named options that were set.

    >>> from msa.model.train import TrainOptions
    >>> given(TrainOptions(steps=5), "steps", "kl")
    {'steps': 5}
    """
    told = {name: getattr(options, name) for name in names}
    return {name: value for name, value in told.items() if value is not None}
