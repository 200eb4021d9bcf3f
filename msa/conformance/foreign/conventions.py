"""All conventions whose functions can be tested, and a table of their signatures.

>>> CONVENTIONS["vllm"].order
'own block first'
"""

from __future__ import annotations

from msa.conformance.foreign.like_msa import MSA
from msa.conformance.foreign.like_official import OFFICIAL
from msa.conformance.foreign.like_transformers import TRANSFORMERS
from msa.conformance.foreign.like_vllm import VLLM

CONVENTIONS = {c.name: c for c in (MSA, TRANSFORMERS, VLLM, OFFICIAL)}


def table() -> str:
    """A Markdown table of all conventions, with one row per function.

    >>> print(table().partition(" | it")[0])
    | convention | kind
    """
    lines = ["| convention | kind | it is given | it gives | ids |", "|---|---|---|---|---|"]
    for convention in CONVENTIONS.values():
        for kind, signature in convention.signatures.items():
            order = "any order" if kind == "select" else convention.order
            cells = f"`{signature.takes}` | `{signature.gives}` | {order}"
            lines.append(f"| `{convention.name}` | `{kind}` | {cells} |")
    return "\n".join(lines)
