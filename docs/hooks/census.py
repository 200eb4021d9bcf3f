"""Counts of what the site holds, from its pages."""

from __future__ import annotations

import re
from pathlib import Path

PAGES = Path(__file__).parents[1]


def counts() -> str:
    """One sentence: pages, executed blocks, exercises, entries of the bug gallery."""
    texts = {path: path.read_text() for path in PAGES.rglob("*.md") if "hooks" not in path.parts}
    everything = "\n".join(texts.values())
    blocks = len(re.findall(r'^ *```python exec="1"', everything, re.M))
    exercises = len(re.findall(r"^\?\?\? question", everything, re.M))
    gallery = (PAGES / "chapters" / "13-testing.md").read_text()
    bugs = len(re.findall(r"^### ", gallery, re.M))
    return (
        f"This site has {len(texts)} pages with {blocks} executed blocks, {exercises} exercises "
        f"with answers, and {bugs} planted bugs."
    )
