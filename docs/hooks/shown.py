"""What a notebook shows of code that prints HTML or Markdown for the site."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

CSS = Path(__file__).parents[1] / "assets" / "site.css"


def style() -> None:
    """Give a notebook the colours of the site's figures."""
    from IPython.display import HTML, display

    css = (
        CSS.read_text()
        .replace(".md-typeset ", "")
        .replace('[data-md-color-scheme="default"]', "body")
    )
    kept = [rule for rule in re.findall(r"[^{}]+\{[^{}]*\}", css)
            if re.search(r"(:root|\.d-|\.drawn|\.listing)", rule)]  # fmt: skip
    display(HTML(f"<style>{''.join(kept)}</style>"))


@contextmanager
def shown(kind: str) -> Iterator[None]:
    """Display what is printed inside as HTML or Markdown, in place of text."""
    from IPython.display import HTML, Markdown, display

    printed = io.StringIO()
    with redirect_stdout(printed):
        yield
    text = printed.getvalue()
    if kind == "html":
        display(HTML(f"<div>{text}</div>"))
    else:  # Jupyter has no admonitions: an exercise becomes prose
        text = re.sub(r'^\?\?\? \w+ "(.*)"$', r"**\1**", text, flags=re.M)
        display(Markdown(re.sub(r"^ {4}", "", text, flags=re.M)))
