"""How long a chapter takes: from its words, its code and its exercises, never typed by guess.

`python -m docs.hooks.heads` writes the minutes into the heads of all chapters.
"""

from __future__ import annotations

import re
from pathlib import Path

LISTINGS = r"^( *)```.*?^\1```"
WORDS, LINES, EXERCISE = 180, 12, 8
"""Words and lines of code that a careful reader takes in in a minute; minutes of an exercise that is
done."""


def minutes(page: str) -> int:
    """Minutes for a page's Markdown, as a multiple of five.

    >>> minutes("word " * 1800)
    20
    """
    listings = [found[0] for found in re.finditer(LISTINGS, page, re.S | re.M)]
    shown = [text for text in listings if 'source="above"' in text or "exec" not in text]
    code = sum(text.count("\n") - 1 for text in shown)
    words = len(re.sub(LISTINGS, "", page, flags=re.S | re.M).split())
    return max(5, 5 * round((words / WORDS + code / LINES + EXERCISE) / 5))


def renewed(page: str) -> str:
    """A page whose head says how long it takes now.

    >>> renewed("Takes **Time** 90 minutes.")
    'Takes **Time** 10 minutes.'
    """
    return re.sub(r"(\*\*Time\*\*\s+)\d+(\s+minutes)", rf"\g<1>{minutes(page)}\2", page)


if __name__ == "__main__":
    for path in sorted((Path(__file__).parents[1] / "chapters").glob("*.md")):
        path.write_text(renewed(path.read_text()))
