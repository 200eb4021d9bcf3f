"""Texts of the repository's root as pages of the site, with their links turned to the site's own."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = {
    "DESIGN.md": "design.html",
    "CONTRIBUTING.md": "contributing.html",
    "CHANGELOG.md": "changelog.html",
    "README.md": "index.html",
}


def body(name: str) -> str:
    """A text without its title, which the page has itself.

    Raises:
        LookupError: if the text does not begin with a title.
    """
    title, _, rest = (ROOT / name).read_text().partition("\n")
    if not title.startswith("# "):
        raise LookupError(f"{name} must begin with a title, got {title!r}")
    return re.sub(r"\]\((?!https?:|#)([^)]+)\)", lambda link: f"]({on_the_site(link[1])})", rest)


def on_the_site(target: str) -> str:
    """Where the target of a link lies, seen from a page at the top of the site.

    Raises:
        LookupError: for a file that no page shows.

    >>> [on_the_site(target) for target in ("docs/spec.md", "docs/house.svg", "DESIGN.md")]
    ['spec.html', 'house.svg', 'design.html']
    """
    path, _, place = target.partition("#")
    if path in PAGES:
        page = PAGES[path]
    elif path.startswith("docs/"):
        page = re.sub(r"\.md$", ".html", path.removeprefix("docs/"))
    else:
        raise LookupError(f"a link must lead to a page of the site, got {target!r}")
    return f"{page}#{place}" if place else page
