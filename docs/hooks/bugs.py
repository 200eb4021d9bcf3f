"""The bug gallery: a planted bug, the search for it, and the smallest input that shows it."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

from hypothesis import Phase, settings

from msa.conformance import Domain, Subject, all_properties, as_module
from msa.conformance.cases import Fill
from msa.conformance.search import Tally, search

DOMAIN = Domain(("float64", "float32"), missing=frozenset({"api", "backward"}))
PHASES = (Phase.generate, Phase.shrink)


class NotFound(Exception):
    """A planted bug passed the property that should have found it."""


def hunt(name: str, examples: int = 200, **functions: Callable[..., Any]) -> str:
    """Try one property on the spec with some of its functions replaced.

    Args:
        name: the property, such as "r7_ties_go_to_the_lower_id".
        examples: how many cases Hypothesis may draw; the same ones every time.
        functions: the functions with the bug, by the name of the step that they replace.

    Raises:
        NotFound: if no counterexample was found; the build of the page then fails.
    """
    (prop,) = (p for p in all_properties() if p.name == name)
    subject, tally = Subject("planted", as_module(functions), "numpy", DOMAIN), Tally()
    options = settings(max_examples=examples, derandomize=True, database=None, phases=PHASES,
        report_multiple_bugs=False,
    )  # fmt: skip
    try:
        search(prop, subject, options, tally)
    except Exception:
        if tally.error is None:
            raise
    if tally.error is None:
        raise NotFound(f"{name} let {', '.join(functions)} pass in {tally.tried} cases")
    said = textwrap.fill(str(tally.error).partition("\n")[0], 88, subsequent_indent="  ")
    return (
        f"{prop.rule}: {prop.statement}.\n\nFound in {tally.tried} cases; the smallest input:\n"
        f"{textwrap.indent(brief(tally.counterexample), '  ')}\n{said}"
    )


def brief(case: Any) -> str:
    """A counterexample in words: lengths, sizes, and how tensors are filled if not with zeros."""
    inner = getattr(case, "case", case)
    config, seq = inner.config, inner.sequences
    lengths = [f"{q.stop - q.start} of {k.stop - k.start}" for q, k in seq.spans()]
    sizes = [f"blocks of {config.block_size}", f"k = {config.top_k}", some(inner.groups, "group")]
    if hasattr(inner, "group"):
        sizes.append(some(inner.group, "head") + " in each")
    options = {"sink": config.sink_blocks, "local": config.local_blocks - 1}
    sizes += [f"{name} blocks {n}" for name, n in options.items() if n]
    fills = [
        f"{name}: {value.kind}" + "".join(f", {x} at {at}" for at, x in value.planted)
        for name, value in vars(inner).items()
        if isinstance(value, Fill) and value != Fill()
    ]
    lines = [f"queries of keys: {', '.join(lengths) or 'none'}", ", ".join(sizes)]
    if hasattr(inner, "chunk_size") and inner.chunk_size > 1:
        lines.append(f"items of at most {inner.chunk_size} edges")
    return "\n".join([*lines, "; ".join(fills) or "all tensors zero"])


def some(number: int, thing: str) -> str:
    """A number of things.

    >>> some(1, "head"), some(2, "head")
    ('1 head', '2 heads')
    """
    return f"{number} {thing}{'s' * (number > 1)}"
