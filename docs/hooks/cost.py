"""The cost of attention, dense and MSA: operations, bytes and the floor of the time on an H100.

`assets/widgets/cost.js` has the same formulas for the sliders of chapter 1. It is given this
module's results for `CASES`, and the check of the built site in a browser compares the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass

from docs.hooks.widgets import widget

DIM, NUMBER, ID = 128, 2, 4
"""Numbers in a head of q, k, v or index vectors; bytes of such a number and of a block's id."""
TFLOPS, TBPS = 989.4, 3.35
"""Peaks of an H100 SXM: bfloat16 products without structured sparsity, and its memory (NVIDIA's
data sheet). No kernel is faster. The page of measurements has the speeds that copies and products reach."""


@dataclass(frozen=True)
class Layer:
    """One attention layer and the text it works on.

    >>> Layer().pairs  # the first 2048 queries read all before them, the others 2048 each
    266338304.0
    """

    tokens: int = 131_072
    block: int = 128
    top_k: int = 16
    heads: int = 64
    groups: int = 4

    @property
    def kept(self) -> int:
        """Keys that the last query reads in a group; its own block counts as a whole block."""
        return min(self.tokens, self.top_k * self.block)

    @property
    def pairs(self) -> float:
        """Pairs of query and key that are computed: a triangle for the first k blocks, then a strip."""
        return self.kept * (self.tokens - self.kept / 2)


@dataclass(frozen=True)
class Cost:
    """The cost of one stage. An operation is one multiplication or one addition."""

    operations: float
    bytes: float

    @property
    def seconds(self) -> float:
        """The floor of the time: the longer of the times of operations and bytes at peak speed."""
        return max(self.operations / TFLOPS, self.bytes / TBPS) / 1e12

    @property
    def bound(self) -> str:
        """Whether products or bytes determine the floor."""
        return "products" if self.operations / TFLOPS > self.bytes / TBPS else "bytes"


def prefill(x: Layer) -> dict[str, Cost]:
    """The costs of a whole prompt, if every number is moved once.

    >>> costs = prefill(Layer(tokens=1_048_576))
    >>> sparse = costs["index"].operations + costs["main"].operations
    >>> round(costs["dense"].operations / sparse, 1)  # the paper's 28.4
    28.4
    """
    n, pairs = x.tokens, x.tokens**2 / 2
    ids = n * x.groups * x.top_k * ID
    rows = n * (x.heads + x.groups) * 2 * DIM * NUMBER  # q and out; k and v
    return {
        "dense": Cost(4 * x.heads * DIM * pairs, rows),
        "index": Cost(2 * x.groups * DIM * pairs, n * (x.groups + 1) * DIM * NUMBER + ids),
        "main": Cost(4 * x.heads * DIM * x.pairs, rows + ids),
    }


def decode(x: Layer) -> dict[str, Cost]:
    """The costs of one new token after `tokens` cached ones.

    >>> costs = decode(Layer(tokens=1_048_576))
    >>> f"{costs['dense'].seconds * 1e3:.2f} ms, bound by {costs['dense'].bound}"
    '0.64 ms, bound by bytes'
    """
    ids = x.groups * x.top_k * ID
    row, pair = x.heads * 2 * DIM * NUMBER, x.groups * 2 * DIM * NUMBER  # q and out; a k and a v
    return {
        "dense": Cost(4 * x.heads * DIM * x.tokens, x.tokens * pair + row),
        "index": Cost(
            2 * x.groups * DIM * x.tokens, (x.tokens + x.groups) * DIM * NUMBER + ids
        ),
        "main": Cost(4 * x.heads * DIM * x.kept, x.kept * pair + row + ids),
    }  # fmt: skip


CASES = [
    Layer(),
    *(Layer(tokens=n) for n in (1024, 4096, 32_768, 1_048_576)),
    *(Layer(block=b, top_k=k) for b, k in ((16, 1), (64, 32), (256, 64))),
    *(Layer(heads=h, groups=g) for h, g in ((8, 8), (8, 1), (128, 8))),
    Layer(tokens=2048, block=16, top_k=5, heads=16, groups=2),
]
"""Positions of the sliders at which the script is compared with this module."""


def short(x: float, units: tuple[str, ...], step: float = 1000) -> str:
    """Three digits and a unit.

    >>> [short(x, ("", "K", "M")) for x in (0, 12, 999.7, 123_456)]
    ['0', '12', '1 K', '123 K']
    """
    unit = 0
    while float(f"{x:.3g}") >= step and unit + 1 < len(units):
        x, unit = x / step, unit + 1
    return f"{float(f'{x:.3g}'):g} {units[unit]}".strip()


def operations(x: float) -> str:
    """Of one stage."""
    return short(x, ("", "K", "M", "G", "T", "P"))


def amount(x: float) -> str:
    """Bytes."""
    return short(x, ("B", "KB", "MB", "GB", "TB"))


def duration(x: float) -> str:
    """Seconds."""
    return short(x * 1e9, ("ns", "µs", "ms", "s"))


def cells(x: Layer) -> Iterator[tuple[str, str]]:
    """The cells of the table: a name such as "decode.main.bytes", and its text."""
    for name, costs in (("prefill", prefill(x)), ("decode", decode(x))):
        for stage, cost in costs.items():
            yield f"{name}.{stage}.operations", operations(cost.operations)
            yield f"{name}.{stage}.bytes", amount(cost.bytes)
            yield f"{name}.{stage}.seconds", f"{duration(cost.seconds)}, {cost.bound}"
        dense, index, main = costs.values()
        pairs = (
            ("operations", dense.operations / (index.operations + main.operations)),
            ("bytes", dense.bytes / (index.bytes + main.bytes)),
            ("floor", dense.seconds / (index.seconds + main.seconds)),
        )
        yield f"{name}.gain", ", ".join(f"{what} {ratio:.1f}×" for what, ratio in pairs)
        yield f"{name}.both", duration(index.seconds + main.seconds)


def bars(x: Layer) -> Iterator[tuple[str, float]]:
    """The length of each bar, in percent of the longer one of its panel."""
    for name, costs in (("prefill", prefill(x)), ("decode", decode(x))):
        dense, index, main = (cost.seconds for cost in costs.values())
        for stage, seconds in (("dense", dense), ("index", index), ("main", main)):
            yield f"{name}.{stage}", 100 * seconds / max(dense, index + main)


def controls() -> list[dict[str, object]]:
    """The sliders, each with its possible values."""
    powers = [2**n for n in range(21)]
    return [
        {"name": "tokens", "label": "tokens N", "values": powers[10:]},
        {"name": "block", "label": "block size Bk", "values": powers[4:9]},
        {"name": "top_k", "label": "blocks kept k", "values": list(range(1, 65))},
        {"name": "heads", "label": "query heads Hq", "values": powers[3:8]},
        {"name": "groups", "label": "key/value heads Hkv", "values": powers[:4]},
    ]


def panel(name: str, title: str, words: dict[str, str], lengths: dict[str, float]) -> str:
    """Bars and table of a prompt or of one new token."""

    def bar(*stages: str) -> str:
        return "".join(
            f'<i class="w-{s}" data-bar="{name}.{s}" style="width:{lengths[f"{name}.{s}"]:.2f}%"></i>'
            for s in stages
        )

    def cell(place: str) -> str:
        return f'<td data-cell="{name}.{place}">{words[f"{name}.{place}"]}</td>'

    rows = "".join(
        f'<tr><th><i class="w-key w-{stage}"></i> {stage}</th>'
        f"{''.join(cell(f'{stage}.{what}') for what in ('operations', 'bytes', 'seconds'))}</tr>"
        for stage in ("dense", "index", "main")
    )
    return (
        f'<section><h4>{title}</h4><div class="w-bars">'
        f"<span>dense</span><b>{bar('dense')}</b><span>MSA</span><b>{bar('index', 'main')}</b></div>"
        f'<table class="w-table"><thead><tr><th></th><th>operations</th><th>bytes</th><th>floor, set by</th>'
        f"</tr></thead><tbody>{rows}</tbody></table>"
        f'<p>MSA: at least <b data-cell="{name}.both">{words[f"{name}.both"]}</b>. Dense over MSA: '
        f'<b data-cell="{name}.gain">{words[f"{name}.gain"]}</b></p></section>'
    )


def cost_widget(caption: str) -> str:
    """The widget of chapter 1, with the sliders at `Layer()`."""
    words, lengths = dict(cells(Layer())), dict(bars(Layer()))
    static = (
        '<div class="w-panels" aria-live="polite">'
        f"{panel('prefill', 'A prompt of N tokens at once', words, lengths)}"
        f"{panel('decode', 'One new token after N', words, lengths)}</div>"
    )
    data = {
        "constants": {"dim": DIM, "number": NUMBER, "id": ID, "tflops": TFLOPS, "tbps": TBPS},
        "controls": controls(),
        "start": asdict(Layer()),
        "checks": [
            {
                "layer": asdict(x),
                "costs": {
                    name: {stage: [*astuple(c), c.seconds, c.bound] for stage, c in costs.items()}
                    for name, costs in (("prefill", prefill(x)), ("decode", decode(x)))
                },
                "words": dict(cells(x)),
            }
            for x in CASES
        ],
    }
    return widget("cost", data, static, caption)
