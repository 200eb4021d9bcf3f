"""A check of the built site: every local link has its target, and no output says False.

The generator checks only the links that it makes. The code of the pages makes the links to source
lines.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

OUTPUT = r'</pre></div>\s*<div class="language-text highlight">.*?</div>'
"""The output stands directly after the code that printed it."""
SAYS_FALSE = r"(?<!got )(?<!=)\bFalse\b"
"""Only counterexamples ("got False") and messages about a setting ("=False") may say False."""


class Page(HTMLParser):
    """Names and links of one page, and what its code printed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.links: list[str] = []
        text = path.read_text()
        self.outputs = re.findall(OUTPUT, text, re.S)
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called for each tag."""
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.names.add(value)
            elif name in ("href", "src") and value:
                self.links.append(value)


@cache
def page(path: Path) -> Page:
    """A page, read once."""
    return Page(path)


def faults(site: Path) -> list[str]:
    """What is wrong with a built site, one line each."""
    found: list[str] = []
    for path in sorted(site.rglob("*.html")):
        here, name = page(path), path.relative_to(site)
        if name.name == "404.html":  # served for any address, so its links are absolute
            continue
        for link in here.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            if not target.exists():
                found.append(f"{name}: {link} leads nowhere")
            elif (
                parts.fragment
                and target.suffix == ".html"
                and unquote(parts.fragment) not in page(target).names | {"__skip"}
            ):
                found.append(f"{name}: {link} has no such place")
        found += [
            f"{name}: an output says False" for text in here.outputs if re.search(SAYS_FALSE, text)
        ]
    return found


if __name__ == "__main__":
    problems = faults(Path(__file__).parents[2] / "site")
    print("\n".join(problems) or "every local link has its target")
    sys.exit(bool(problems))
