"""Every example in a docstring of msa or benchmarks runs and gives the printed result.

Each file has one namespace, so examples can use names from the docstring of the module.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from sybil import Sybil
from sybil.document import PythonDocStringDocument
from sybil.parsers.rest import DocTestParser

ROOT = Path(__file__).parent.parent
SYBIL = Sybil(parsers=[DocTestParser()], document_types={".py": PythonDocStringDocument})
SOURCES = [p for folder in ("msa", "benchmarks") for p in sorted((ROOT / folder).rglob("*.py"))]
FILES = [p for p in SOURCES if ">>> " in p.read_text()]


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(ROOT)) for p in FILES])
def test_examples_run(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    document = SYBIL.parse(path)
    document.namespace.update(vars(importlib.import_module(module)))
    torch.manual_seed(0)
    examples = list(document.examples())
    assert len(examples) >= path.read_text().count(">>> ") > 0
    for example in examples:
        example.evaluate()


def test_a_wrong_example_fails(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "wrong.py"
    path.write_text('"""\n>>> 1 + 1\n3\n"""\n')
    with pytest.raises(Exception, match="Expected"):
        for example in SYBIL.parse(path).examples():
            example.evaluate()
