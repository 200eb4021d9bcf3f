"""The 12-token example in three loop orders: which blocks are loaded when, and what is written.

Each order is computed from one form: from the selection query by query, from the schedule item by
item, from the union tile by tile. `assets/widgets/orders.js` steps through them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np

from docs.hooks.svg import Drawing
from docs.hooks.widgets import widget
from msa.explain import CONFIG, GROUPS, TOKENS, trace_example
from msa.pipeline import Trace
from msa.reference.denote import row_edges

BLOCKS = TOKENS // CONFIG.block_size
CELL, ROW, GAP, LEFT, TOP = 30, 19, 14, 24, 38


@dataclass(frozen=True)
class Load:
    """One load of a block's keys and values, and the queries for which it is loaded."""

    group: int
    block: int
    queries: list[int]
    """The queries that selected the block."""
    idle: list[int]
    """Queries of the tile that did not select it. They are multiplied too, and then masked."""
    partials: int
    """The number of partial results that are written to memory."""


@dataclass(frozen=True)
class Order:
    """All loads of one loop order, one after the other."""

    name: str
    form: str
    loads: list[Load]

    @property
    def partials(self) -> int:
        """The number of partial results of all loads."""
        return sum(load.partials for load in self.loads)

    @property
    def idle(self) -> int:
        """Rows that are multiplied and masked."""
        return sum(len(load.idle) for load in self.loads)


def query_by_query(trace: Trace) -> list[Load]:
    """Each query loads its own blocks and keeps a running softmax."""
    chosen = np.argwhere(trace.selection.indices >= 0).tolist()
    return [Load(r, int(trace.selection.indices[i, r, s]), [i], [], 0) for i, r, s in chosen]


def block_by_block(trace: Trace) -> list[Load]:
    """Each work item loads its block once and writes a partial result for each of its edges."""
    schedule = trace.schedule
    loads: list[Load] = []
    for row, start, stop in zip(
        schedule.rows.tolist(), schedule.starts.tolist(), schedule.stops.tolist()
    ):
        edges = row_edges(schedule.reverse_index, row, start, stop)
        _, group, block = edges[0]
        loads.append(Load(group, block, [i for i, _, _ in edges], [], len(edges)))
    return loads


def along_unions(trace: Trace) -> list[Load]:
    """Each tile of queries loads every block that one of them selected."""
    union = trace.tile_union
    loads: list[Load] = []
    for t, r, u in np.argwhere(union.block_ids >= 0).tolist():
        bits = int(union.row_masks[t, r, u])
        rows = range(int(union.starts[t]), int(union.stops[t]))
        reads = [i for i in rows if bits >> (i - rows.start) & 1]
        idle = [i for i in rows if i not in reads]
        loads.append(Load(r, int(union.block_ids[t, r, u]), reads, idle, 0))
    return loads


@lru_cache
def orders() -> tuple[Order, ...]:
    """The three loop orders, each from its form.

    >>> [(order.name, len(order.loads), order.partials, order.idle) for order in orders()]
    [('query by query', 40, 0, 0), ('block by block', 12, 40, 0), ('along the union', 12, 0, 8)]
    """
    trace = trace_example("reference")
    return (
        Order("query by query", "Selection", query_by_query(trace)),
        Order("block by block", "Schedule", block_by_block(trace)),
        Order("along the union", "TileUnion", along_unions(trace)),
    )


def grid(order: Order) -> str:
    """A grid of queries (down) and blocks (to the right); a number says which load a cell uses."""
    width = LEFT + GROUPS * BLOCKS * CELL + (GROUPS - 1) * GAP
    drawing = Drawing(width, TOP + TOKENS * ROW)
    for r in range(GROUPS):
        x0 = LEFT + r * (BLOCKS * CELL + GAP)
        drawing.text(x0 + BLOCKS * CELL / 2, 12, f"group {r}", "d-ink d-bold", 11, "middle")
        for b in range(BLOCKS):
            drawing.text(x0 + (b + 0.5) * CELL, 29, f"b{b}", "d-muted", 10, "middle")
    for i in range(TOKENS):
        drawing.text(LEFT - 6, TOP + i * ROW + 13, i, "d-muted", 10, "end")
    for n, load in enumerate(order.loads, 1):
        for i in sorted(load.queries + load.idle):
            x = LEFT + load.group * (BLOCKS * CELL + GAP) + load.block * CELL
            idle = i in load.idle
            drawing.parts.append(f'<g data-load="{n}">')
            drawing.rect(x, TOP + i * ROW, CELL - 3, ROW - 3, "d-dashed" if idle else "d-remote")
            middle = x + (CELL - 3) / 2
            drawing.text(
                middle, TOP + i * ROW + 12.5, n, "d-muted" if idle else "d-on d-bold", 10, "middle"
            )
            drawing.parts.append("</g>")
    alt = f"{order.name}: {len(order.loads)} loads of a block for twelve queries and two groups"
    return drawing.svg(alt)


def count(order: Order) -> str:
    """The counts after all loads; the script updates them for each step."""
    return (
        f'<b data-count="loads">{len(order.loads)}</b> blocks loaded<br>'
        f'<b data-count="partials">{order.partials}</b> partial results written<br>'
        f'<b data-count="idle">{order.idle}</b> rows multiplied and masked'
    )


def orders_widget(caption: str) -> str:
    """The widget of the page on the lowering."""
    panels = "".join(
        f'<section data-order="{n}"><h4>{order.name}</h4>{grid(order)}<p>{count(order)}</p>'
        f'<p class="w-now">from the {order.form}</p></section>'
        for n, order in enumerate(orders())
    )
    data = {"orders": [[asdict(load) for load in order.loads] for order in orders()]}
    return widget("orders", data, f'<div class="w-orders">{panels}</div>', caption)
