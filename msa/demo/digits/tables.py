"""What `msa demo digits` prints: two tables, and sentences about them."""

from __future__ import annotations

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from msa.demo.digits.experiment import Outcome
from msa.demo.digits.stream import Stream


def show(
    console: Console, stream: Stream, outcomes: list[Outcome], agreement: list[Outcome]
) -> None:
    """Print the tables and the sentences."""
    of = {(o.method, o.top_k): o for o in outcomes}
    dense = next(o for o in outcomes if o.method == "dense")
    tenth = at_a_tenth(stream, outcomes)
    console.print(
        f"\n[bold]{stream.known:,} known images[/] in blocks of {stream.block_size}, "
        f"[bold]{len(stream.q)} held-out images[/] as queries; {stream.k.shape[1]} groups of "
        f"{stream.q.shape[1] // stream.k.shape[1]} heads; index of {stream.k_idx.shape[-1]} PCA "
        f"features; sharpness {stream.sharpness:g}, chosen by leave-one-out."
    )
    table = Table(box=box.SIMPLE_HEAD, title="Accuracy, by the keys that a query reads")
    for name in ("k", "keys\nread", "of\ndense", "\nMSA", "\nwindow", "\nrandom"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("block\nrecall", "score\nrecall", "MSA\ntime"):
        table.add_column(name, justify="right", style="dim", no_wrap=True)
    for k in sorted({o.top_k for o in outcomes if o.method == "MSA"}):
        m, window, random = (of[method, k] for method in ("MSA", "window", "random"))
        table.add_row(
            str(k),
            f"{m.keys:,.1f}",
            f"{m.keys / dense.keys:.1%}",
            *(f"{o.accuracy:.2%}" for o in (m, window, random)),
            f"{m.block_recall:.3f}",
            f"{m.score_recall:.3f}",
            f"{m.seconds:.2f} s",
            style="bold" if k == tenth.top_k else None,
        )
    table.caption = (
        f"dense attention (MSA with all blocks, R11): {dense.accuracy:.2%}, "
        f"{dense.keys:,.0f} keys, {dense.seconds:.2f} s"
    )
    console.print(table)
    console.print(compare(tenth, agreement))
    console.print(
        f"Reading {tenth.keys / dense.keys:.1%} of the keys, MSA is right for "
        f"[bold]{tenth.accuracy:.2%}[/] of the images, dense attention for "
        f"[bold]{dense.accuracy:.2%}[/]; one image is {1 / len(stream.q):.2%}. A query's own block "
        f"has held-out images alone. It helps no query, but it counts in k and in the keys read.\n"
    )


def at_a_tenth(stream: Stream, outcomes: list[Outcome]) -> Outcome:
    """MSA at its largest budget of at most a tenth of the known keys, with the own block."""
    candidates = [o for o in outcomes if o.method == "MSA"]
    small = [o for o in candidates if 10 * o.top_k * stream.block_size <= stream.known]
    return max(small or candidates[:1], key=lambda o: o.top_k)


def compare(first: Outcome, others: list[Outcome]) -> Table:
    """A table of how well the backends agree with the first one, at the same k and stream."""
    table = Table(box=box.SIMPLE_HEAD, title=f"The backends side by side, MSA at k = {first.top_k}")
    table.add_column("backend")
    for name in ("accuracy", "blocks", "predictions", "max difference", "time"):
        table.add_column(name, justify="right")
    for o in others:
        blocks = np.array_equal(o.selection.indices, first.selection.indices)
        same = (o.distribution.argmax(-1) == first.distribution.argmax(-1)).mean()
        table.add_row(
            o.backend,
            f"{o.accuracy:.2%}",
            "identical" if blocks else "[red]differ[/]",
            "identical" if same == 1 else f"[red]{same:.2%} equal[/]",
            f"{np.abs(o.distribution - first.distribution).max():.1e}" if o is not first else "-",
            f"{o.seconds:.2f} s",
        )
    return table
