"""Widgets with controls: static HTML that works without scripts, and the data of the script."""

from __future__ import annotations

import json
from typing import Any


def widget(kind: str, data: dict[str, Any], static: str, caption: str) -> str:
    """A figure that `assets/widgets/KIND.js` makes interactive; without scripts it stays static.

    >>> widget("cost", {"n": 4, "words": "</b>"}, "<p>4</p>", "Four.")[:35]
    '<figure class="widget" data-widget='
    >>> '"<\\\\/b>"' in widget("cost", {"n": 4, "words": "</b>"}, "<p>4</p>", "Four.")
    True
    """
    numbers = json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("</", "<\\/")
    return (
        f'<figure class="widget" data-widget="{kind}">'
        f'<script type="application/json">{numbers}</script>'
        f"{static}<figcaption>{caption}</figcaption></figure>"
    )
