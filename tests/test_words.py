"""The words of the site: the glossary has the terms of the pages, and all its terms are used.

Spelling is checked by codespell, with the style (`make lint`).
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
GLOSSARY = DOCS / "reference" / "glossary.md"
PAGES = [p for p in sorted(DOCS.rglob("*.md")) if "hooks" not in p.parts and p != GLOSSARY]
TEACHING = [p for p in PAGES if p.parent.name in ("chapters", "lowering")]
LISTINGS = r"^( *)```.*?^\1```"
STRESSED = {
    "all", "derived", "differ", "equal", "far", "first", "is", "last", "mean", "near", "other",
    "queries that read it", "read", "strictly beat", "used",
}  # fmt: skip
"""Words that pages stress without introducing a term."""
ENDINGS = (("s$", ""), ("es$", ""), ("s$", "ing"))
"""Endings of plurals and actions, and their replacements in the glossary."""


def terms() -> list[str]:
    """Every name of every entry, in lower case."""
    heads = re.findall(r"^(.+)\n:   ", GLOSSARY.read_text(), re.M)
    return [term.strip().lower() for head in heads for term in head.split(",")]


def prose(path: Path) -> str:
    """A page without its listings and code, in lower case, on one line."""
    text = re.sub(LISTINGS, "", path.read_text(), flags=re.S | re.M)
    return re.sub(r"\s+", " ", re.sub(r"`[^`]*`", "", text)).lower()


def introduced(path: Path) -> list[str]:
    """The words that a page sets in italics."""
    return re.findall(r"(?<![*\w])\*([a-z][a-z ,/-]+)\*(?![*\w])", prose(path))


def known(word: str) -> bool:
    """Whether the glossary has a word, its singular, or the verb form of it."""
    forms = {word, f"{word} block", *(re.sub(end, new, word) for end, new in ENDINGS)}
    return bool(forms & {*terms(), *STRESSED})


@pytest.mark.parametrize("path", TEACHING, ids=lambda p: p.stem)
def test_what_a_page_introduces_is_in_the_glossary(path):
    assert [word for word in introduced(path) if not known(word)] == []


def test_every_term_of_the_glossary_is_used_on_a_page():
    text = " ".join(map(prose, PAGES))
    unused = [t for t in terms() if not re.search(rf"\b{re.escape(t)}", text)]
    assert unused == []


def test_no_term_is_told_twice():
    assert len(set(terms())) == len(terms()) > 50
