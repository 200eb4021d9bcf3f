"""Who waits for whom: a simulation of one multiprocessor in counted cycles, and its picture.

The tensor cores do one product at a time. A consumer is a list of actions; the producer copies
tiles ahead, as far as the ring has room, and is never what the others wait for here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from docs.hooks.svg import Drawing

ROWS, KEYS, DIM = 64, 128, 128
FLOP_PER_CYCLE = 4096
"""Of the tensor cores of one multiprocessor of a Hopper GPU, for 16-bit numbers (NVIDIA's white paper)."""
PRODUCT = 2 * ROWS * KEYS * DIM // FLOP_PER_CYCLE
"""Cycles of one product of a consumer's rows with a tile of keys, or of its weights with values."""
EXPONENTIALS = ROWS * KEYS // 16
"""Cycles of the exponentials: a multiprocessor computes 16 in each cycle."""
OTHERS = 6 * ROWS * KEYS // 128
"""Cycles of about six other operations for each score, 128 in each cycle."""
SOFTMAX = EXPONENTIALS + OTHERS


@dataclass
class Bar:
    """Something that took from one cycle to another."""

    lane: str
    start: int
    stop: int
    words: str
    style: str


@dataclass
class Multiprocessor:
    """Tensor cores that do one product after the other, and what was done when."""

    free: int = 0
    bars: list[Bar] = field(default_factory=list)

    def product(self, ready: int, lane: str, words: str) -> int:
        """Do a product when the tensor cores are free; return when it ends."""
        start = max(ready, self.free)
        self.free = start + PRODUCT
        self.bars.append(Bar("tensor cores", start, self.free, words, style_of(lane)))
        return self.free

    def softmax(self, ready: int, lane: str, words: str) -> int:
        """Do a softmax in a consumer's own registers; return when it ends."""
        self.bars.append(Bar(lane, ready, ready + SOFTMAX, words, style_of(lane)))
        return ready + SOFTMAX

    def busy(self, start: int, stop: int) -> float:
        """The share of a span of time in which the tensor cores multiply."""
        inside = (
            max(0, min(b.stop, stop) - max(b.start, start))
            for b in self.bars if b.lane == "tensor cores"
        )  # fmt: skip
        return sum(inside) / (stop - start)


def style_of(lane: str) -> str:
    """The colour of a consumer."""
    return "d-own" if lane.endswith("0") else "d-remote"


def run(consumers: int, overlapped: bool, blocks: int) -> Multiprocessor:
    """Let consumers compute blocks: scores, softmax, weights times values.

    A consumer that is not overlapped waits for each product. An overlapped one starts the scores of
    the next block together with the product of its weights, and computes a softmax while that runs.

    >>> one, two = run(1, False, 8), run(2, False, 8)
    >>> one.busy(0, one.free) < two.busy(0, two.free) <= 1
    True
    """
    chip = Multiprocessor()
    now = [0] * consumers
    scores = [0] * consumers
    for block in range(blocks):
        for c in range(consumers):
            name = f"consumer {c}"
            if not overlapped or block == 0:
                scores[c] = chip.product(now[c], name, f"S{block}")
        for c in range(consumers):
            name = f"consumer {c}"
            weights = chip.softmax(scores[c] if not overlapped else max(scores[c], now[c]), name,
                                   f"softmax {block}")  # fmt: skip
            if overlapped:
                if block + 1 < blocks:
                    scores[c] = chip.product(weights, name, f"S{block + 1}")
                chip.product(weights, name, f"O{block}")
                now[c] = weights
            else:
                now[c] = chip.product(weights, name, f"O{block}")
    return chip


VERSIONS = {
    "one consumer that waits": (1, False),
    "two consumers, each waits for its own products": (2, False),
    "two consumers, each also starts its next scores early": (2, True),
}


def shares(blocks: int = 40) -> dict[str, float]:
    """How busy the tensor cores are in each version, by counting."""
    found = {}
    for name, (consumers, overlapped) in VERSIONS.items():
        chip = run(consumers, overlapped, blocks)
        found[name] = chip.busy(chip.free // 4, 3 * chip.free // 4)
    return found


def figure(blocks: int = 4, cycles: int = 6400) -> str:
    """The three versions as time lines."""
    width, left = 720, 96
    drawing, y = Drawing(width, 292), 4
    scale = (width - left - 4) / cycles
    for name, (consumers, overlapped) in VERSIONS.items():
        chip = run(consumers, overlapped, blocks + 6)
        drawing.text(0, y + 11, name, "d-ink d-bold", 12)
        lanes = ["tensor cores", *(f"consumer {c}" for c in range(consumers))]
        for i, lane in enumerate(lanes):
            top = y + 20 + 22 * i
            drawing.text(0, top + 13, lane, "d-muted", 10.5)
            drawing.rect(left, top, width - left - 4, 17, "d-faint", r=1)
            for bar in chip.bars:
                if bar.lane == lane and bar.start < cycles:
                    w = (min(bar.stop, cycles) - bar.start) * scale
                    drawing.rect(left + bar.start * scale, top, max(w - 1, 1), 17, bar.style, r=1)
                    if w > 24:
                        words = bar.words if w > 60 else bar.words.replace("softmax ", "")
                        drawing.text(left + bar.start * scale + w / 2, top + 12.5, words,
                                     "d-on d-bold", 9.5, "middle")  # fmt: skip
        y += 20 + 22 * len(lanes) + 14
    drawing.text(left, y + 6, f"{cycles:,} cycles", "d-muted", 10.5)
    return drawing.figure(
        "Counted, not measured: S0 is the product that gives the scores of block 0, O0 its weights times the "
        "values. Grey is idle. Memory is fast enough here, so the producer is not drawn.",
        "time lines of tensor cores and consumers; the gaps of the tensor cores get smaller",
    )
