"""`msa explain`: prints one panel per form, then the rules that choose loop order and kernels."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any

import numpy as np
from rich import box
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from msa import kernel_choice, loop_order
from msa.dispatch import BackendName
from msa.explain import (
    CONFIG,
    GROUPS,
    TOKENS,
    Step,
    choose_kernels,
    choose_orders,
    example,
    explain,
    trace_example,
)


@dataclass(frozen=True)
class ExplainOptions:
    """Print a 12-token example as it passes through every form of the lowering.

    Then print the rules by which the triton backend chooses a loop order and kernels.
    """

    backend: BackendName = "reference"
    """The backend that takes the steps: reference, torch or triton."""
    json: bool = False
    """Print every form as JSON."""


def run(options: ExplainOptions) -> int:
    """Print the example as panels or as JSON."""
    trace = trace_example(options.backend)
    steps, choice, kernels = explain(trace), choose_orders(trace), choose_kernels()
    if options.json:
        shown = {
            "backend": options.backend,
            "config": asdict(CONFIG),
            "inputs": {name: to_plain(array) for name, array in example().items()},
            "steps": [asdict(step) for step in steps],
            "loop_order": choice,
            "kernels": kernels,
            "trace": to_plain(trace),
        }
        print(json.dumps(shown))
        return 0
    print_steps(steps)
    print_choice(choice)
    print_kernels(kernels)
    return 0


def to_plain(thing: Any) -> Any:
    """Forms and arrays as dicts and lists; NaN and infinities as strings, since JSON has none."""
    if is_dataclass(thing) and not isinstance(thing, type):
        return {f.name: to_plain(getattr(thing, f.name)) for f in fields(thing)}
    if isinstance(thing, np.ndarray | np.generic):
        return to_plain(thing.tolist())
    if isinstance(thing, (list, tuple)):
        return [to_plain(x) for x in thing]
    if isinstance(thing, float) and not np.isfinite(thing):
        return str(thing)
    return thing


def narrow_console() -> Console:
    """A console of at most 100 columns, for lines of a length that reads well."""
    return Console(width=min(100, Console().width))


def print_steps(steps: list[Step]) -> None:
    """Print one panel per form, with the masks of the groups side by side."""
    console = narrow_console()
    console.print(
        f"[bold]The lowering of MSA[/] on {TOKENS} tokens, blocks of {CONFIG.block_size}, "
        f"k = {CONFIG.top_k}, {GROUPS} groups of one head. Rows are queries, columns keys.\n"
    )
    for number, step in enumerate(steps, 1):
        grids = Table.grid(padding=(0, 4))
        grids.add_row(*(f"[dim]      group {r}[/]" for r in range(len(step.pictures))))
        grids.add_row(*(Text(spaced(picture)) for picture in step.pictures))
        console.print(
            Panel(
                Group(
                    Text(step.changed),
                    Text(step.allowed, style="dim"),
                    "",
                    grids,
                    Text(step.legend, style="dim"),
                    *(Text(fact, style="cyan") for fact in step.facts),
                ),
                title=f"{number} {step.made_by} → [bold]{step.form}[/]",
                title_align="left",
                subtitle=step.checked or None,
                subtitle_align="right",
            )
        )


def print_choice(choice: dict[str, Any]) -> None:
    """Print the rule of loop_order="auto", and what it does with the tiles of the example."""
    table = Table("blocks in a tile's union", "the tile", box=box.SIMPLE_HEAD, pad_edge=False)
    for when, then in loop_order.rule():
        table.add_row(when, then)
    top_k, mean = choice["top_k"], choice["mean_union"]
    narrow_console().print(
        Panel(
            Group(
                Text(
                    "Both orders mean the same, so speed may decide. A walk costs all queries of a "
                    "tile the work of every block in their union; KV-outer costs a block's own "
                    "readers alone, but each leaves a partial result to write and to read again."
                ),
                Text(
                    'loop_order="auto" of the triton backend decides for each tile by the length '
                    "of its union, with numbers measured on an H100 (docs/ladder.md):",
                    style="dim",
                ),
                table,
                Text(
                    f"here k = {top_k}, a mean union is {mean:.2f} blocks = {mean / top_k:.2f}·k, "
                    f"a block has {choice['readers']:g} readers on average",
                    style="cyan",
                ),
                *(
                    Text(
                        f"queries {tile['queries'][0]}-{tile['queries'][1]}, group "
                        f"{tile['group']}: union of {tile['union']}, {tile['order']}",
                        style="cyan",
                    )
                    for tile in choice["tiles"]
                ),
            ),
            title="[bold]Which loop order?[/]",
            title_align="left",
        )
    )


def wanted_by(kernels: str, rule: list[tuple[str, str]]) -> Table:
    """A rule of `msa.kernel_choice` as a table."""
    table = Table("what", f"wanted by {kernels}", box=box.SIMPLE_HEAD, pad_edge=False)
    for name, wanted in rule:
        table.add_row(name, wanted)
    return table


def print_kernels(choice: dict[str, Any]) -> None:
    """Print the rule of kernels="auto", and what it takes on this machine."""
    table = wanted_by("the hopper kernels", kernel_choice.rule())
    walk = wanted_by("the hopper walk", kernel_choice.walk_rule())
    keys = wanted_by("the hopper kernel", kernel_choice.key_rule())
    loss = wanted_by("the hopper kernel", kernel_choice.loss_rule())
    pages = wanted_by("the scores of pages", kernel_choice.page_rule())
    wide = wanted_by("the widening", kernel_choice.wide_rule())
    reason = f": {choice['reason']}" if choice["reason"] else ""
    narrow_console().print(
        Panel(
            Group(
                Text(
                    "The triton backend has two sets of kernels that select blocks, that walk "
                    "along unions, and that score the blocks of a paged cache: portable ones in "
                    "Triton, and faster ones in Gluon for Hopper GPUs. Both select the same, and "
                    "their walks and the scores of pages differ by rounding."
                ),
                Text(
                    'kernels="auto" selects with the hopper kernels where all of this holds, and '
                    "with the portable kernels elsewhere:",
                    style="dim",
                ),
                table,
                Text(f"here, in bfloat16: {choice['chosen']}{reason}", style="cyan"),
                Text(
                    "It walks with the hopper kernel where all of this holds. Every tile then "
                    'walks its whole union, with loop_order="auto", too:',
                    style="dim",
                ),
                walk,
                Text(
                    "A prefill over a cache of 8 bits writes keys and values once in 16 bits where "
                    "all of this holds. Elsewhere its kernels convert them for each tile:",
                    style="dim",
                ),
                wide,
                Text(
                    "In training, it forms the gradients of keys and values with a hopper kernel "
                    "where all of this holds:",
                    style="dim",
                ),
                keys,
                Text(
                    "In training, it computes the alignment loss and its gradients with a hopper "
                    "kernel where all of this holds:",
                    style="dim",
                ),
                loss,
                Text("It decodes with the hopper scores where all of this holds:", style="dim"),
                pages,
            ),
            title="[bold]Which kernels?[/]",
            title_align="left",
        )
    )


def spaced(picture: list[str]) -> str:
    """Number the queries, and leave a gap between blocks."""
    size = CONFIG.block_size
    lines = []
    for i, row in enumerate(picture):
        if i and i % size == 0:
            lines.append("")
        lines.append(f"{i:>3}   " + "  ".join(row[j : j + size] for j in range(0, len(row), size)))
    return "\n".join(lines)
