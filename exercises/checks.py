"""The checks of the exercises without kernels."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from hypothesis import Phase, settings

from exercises.run import Check, Wrong, close

RNG = np.random.default_rng


def cost(my: Any) -> None:
    """Chapter 1: pairs of short texts, counted one by one."""
    for n, block, k in ((7, 2, 2), (40, 4, 3), (5, 4, 3)):
        index = sum(2 * my.GROUPS * my.DIM * 0.5 for _ in range(n * n))
        reads = sum(min(i + 0.5, k * block) for i in range(n))  # a query sees half of itself
        wanted = index + 4 * my.HEADS * my.DIM * reads
        close(f"sparse({n}, block={block}, k={k})", my.sparse(n, block, k), wanted)
    n = 1_048_576
    close("dense / sparse at a million tokens", my.dense(n) / my.sparse(n), 28.4, 2e-3)


def online_softmax(my: Any) -> None:
    """Chapter 2: rising scores, large scores, and an uneven last piece."""
    for name, scores in (
        ("equal scores", np.zeros(7)), ("rising scores", np.arange(7.0)),
        ("scores near 800", 800 - np.arange(7.0)), ("random scores", RNG(0).normal(size=7) * 9),
    ):  # fmt: skip
        values = np.arange(7.0)
        e = np.exp(scores - scores.max())
        got = my.attend_in_pieces(scores, values, 3)
        close(f"{name}, 3 at a time", got, e @ values / e.sum())


def block_maximum(my: Any) -> None:
    """Chapter 3: raw maxima of visible tokens, and rules R6 to R8."""
    keys = np.array([[1.0], [9], [2], [2], [3], [0], [7], [8]])
    got = my.block_scores(np.ones(1), keys, position=5, block=2)
    close("block_scores of query 5", got, [9, 2, 3, -np.inf])
    for words, scores, own, k, wanted in (
        ("the own block is always in", [5, 4, 1], 2, 2, [0, 2]),
        ("equal scores go to the lower id", [4, 4, 4, 0], 3, 2, [0, 3]),
        ("later blocks are never read", [1, 2, 9, 9], 1, 2, [0, 1]),
        ("too few blocks, then -1", [1, 2, -np.inf], 1, 3, [0, 1, -1]),
    ):
        close(f"choose, {words}", my.choose(np.array(scores, float), own, k), wanted)


def causality(my: Any) -> None:
    """Chapter 4: no token behind the query changes its output, and no block is -1."""
    rng = RNG(0)
    q, k, v = rng.normal(size=2), rng.normal(size=(12, 2)), rng.normal(size=(12, 1))
    out = my.attend(q, k, v, [0, 2], 9, 4)
    for token in (10, 11):
        other = v.copy()
        other[token] = 99
        if not np.array_equal(my.attend(q, k, other, [0, 2], 9, 4), out):
            raise Wrong(f"query 9 read token {token}, which comes after it")
    w = np.exp(k[[0, 1, 2, 3, 8, 9]] @ q * 2**-0.5)
    close("query 9 over blocks 0 and 2", out, w @ v[[0, 1, 2, 3, 8, 9]] / w.sum())
    alone = my.attend(q, k, v, [0, -1], 2, 4)
    w = np.exp(k[:3] @ q * 2**-0.5)
    close("query 2 over block 0 and an empty place", alone, w @ v[:3] / w.sum())


def teacher(my: Any) -> None:
    """Chapter 5: the KL of mean probabilities, and its gradient by differences."""
    logits = np.array([[4.0, -4, 0], [-4, 4, 0]])
    scores = np.array([0.3, -0.2, 0.5])
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    s = np.exp(scores) / np.exp(scores).sum()
    kl = (p.mean(0) * np.log(p.mean(0) / s)).sum()
    loss, gradient = my.loss_and_gradient(logits, scores)
    close("the loss for two heads that disagree", loss, kl)
    steps = np.eye(3) * 1e-6
    wanted = [(my.loss_and_gradient(logits, scores + d)[0] - loss) / 1e-6 for d in steps]
    close("the gradient, by differences of your loss", gradient, wanted, 1e-4)


def gather(my: Any) -> None:
    """Chapter 6: equal to the mask, with no tensor as large as T times T."""
    torch.manual_seed(0)
    T, block = 64, 4
    q, k, v = torch.randn(T, 2, 8), torch.randn(T, 8), torch.randn(T, 8)
    own = torch.arange(T) // block
    ids = torch.stack([torch.where(own > 0, own // 2, -1), own], 1)
    mask = (torch.arange(T // block) == ids[..., None]).any(1).repeat_interleave(block, 1).tril()
    scores = torch.einsum("thd,sd->ths", q, k) * 8**-0.5
    wanted = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1) @ v
    largest: list[int] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = f(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.dtype == torch.float32 and made.ndim > 1:
                largest.append(made.shape[-1] if made.shape[0] == T else 0)
            return made

    with Watch():
        got = my.by_gather(q, k, v, ids, block)
    close("by_gather", got, wanted, 1e-5)
    if max(largest) >= T:
        raise Wrong(f"a tensor had {max(largest)} scores for each of {T} queries; gather first")


def ties(my: Any) -> None:
    """Chapter 7: ties, NaN and order."""
    inf, nan = float("inf"), float("nan")
    for words, row, wanted in (
        ("ids ascend", [1.0, 9, 5, 7], [1, 3]), ("ties go to the lower id", [3.0] * 300, [0, 1]),
        ("NaN is the lowest", [nan, 1, nan, 2], [1, 3]),
        ("infinity is the highest", [5.0, -inf, inf, 0], [0, 2]),
    ):  # fmt: skip
        close(words, my.best(torch.tensor([row]), 2), [wanted])


class Buffer(list[tuple[float, int]]):
    """A buffer that knows how full it was and how often it was cut."""

    most = writes = 0

    def append(self, item: tuple[float, int]) -> None:
        """Add a candidate."""
        super().append(item)
        self.writes, self.most = self.writes + 1, max(self.most, len(self))

    def cut(self, kept: list[tuple[float, int]]) -> None:
        """Replace the content."""
        self[:] = kept


def threshold(my: Any) -> None:
    """Chapter 10: right, within the room, and few writes."""
    some = RNG(0).normal(size=4000)
    for words, scores in (
        ("random scores", some), ("equal scores", np.zeros(4000)),
        ("ascending scores", np.sort(some)), ("many ties", some.round(1)),
    ):  # fmt: skip
        buffer = Buffer()
        got = my.keep_best(scores.tolist(), 15, 64, buffer)
        if buffer.most > 64:
            raise Wrong(f"{words}: the buffer held {buffer.most} candidates; it has room for 64")
        close(words, got, np.sort(np.lexsort((np.arange(4000), -scores))[:15]))
        if words == "equal scores" and buffer.writes > 100:
            raise Wrong(f"{words}: {buffer.writes} candidates were written; 64 suffice")


def key_gradients(my: Any) -> None:
    """Chapter 11: against autograd."""
    torch.manual_seed(0)
    q, k, v, d_out = (torch.randn(12, 3).double().requires_grad_() for _ in range(4))
    scale, own = 0.5, torch.arange(12) // 4
    mask = ((torch.arange(12) // 4 == own[:, None]) | (torch.arange(12) < 4)).tril()
    scores = (scale * q @ k.T).masked_fill(~mask, -torch.inf)
    out, lse = scores.softmax(-1) @ v, scores.logsumexp(-1)
    (out * d_out.detach()).sum().backward()
    n = [x.detach().numpy() for x in (q, k, v, d_out, lse, (d_out * out).sum(-1))]
    for b, readers in ((0, range(12)), (2, range(8, 12))):
        part = slice(4 * b, 4 * b + 4)
        d_k, d_v = my.block_gradients(
            n[0], n[1][part], n[2][part], n[3], n[4], n[5], readers, 4 * b, scale
        )
        close(f"dV of block {b}", d_v, v.grad.numpy()[part])
        close(f"dK of block {b}", d_k, k.grad.numpy()[part])


class Ring:
    """Runs a producer and a consumer in a random order, and sees what they do to the stages."""

    def __init__(self, my: Any, stages: int, tiles: int, seed: int) -> None:
        self.phase = {(n, s): 0 for n in ("full", "empty") for s in range(stages)}
        self.tile: dict[int, int] = {}
        self.read: set[int] = set()
        self.threads = {
            "producer": my.producer(tiles, stages), "consumer": my.consumer(tiles, stages),
        }  # fmt: skip
        self.turn, self.waits = random.Random(seed), dict.fromkeys(self.threads)

    def go(self) -> None:
        """Take turns until both have ended.

        Raises:
            Wrong: a deadlock, a race, or a product with the wrong tile.
        """
        while self.threads:
            ready = [n for n in self.threads if self.passes(self.waits[n])]
            if not ready:
                told = [f"the {n} waits for {w[0]} of stage {w[1]}" for n, w in self.waits.items()
                        if w and n in self.threads]  # fmt: skip
                raise Wrong(f"a deadlock: {' and '.join(told)}")
            name = self.turn.choice(ready)
            self.waits[name] = None
            action = next(self.threads[name], None)
            if action is None:
                del self.threads[name]
            else:
                self.act(name, *action)

    def passes(self, wait: Any) -> bool:
        """Whether a thread can go on."""
        return wait is None or self.phase[wait[0], wait[1]] != wait[2]

    def act(self, name: str, what: str, *more: Any) -> None:
        """One action of a thread."""
        if what == "wait":
            self.waits[name] = more
        elif what == "copy":
            stage, tile = more
            if stage in self.read:
                raise Wrong(
                    f"a race: tile {tile} overwrites stage {stage} while a product reads it"
                )
            self.tile[stage] = tile
            self.phase["full", stage] ^= 1
        elif what == "start product":
            stage, tile = more
            if self.tile.get(stage) != tile:
                raise Wrong(f"stage {stage} holds tile {self.tile.get(stage)}, not tile {tile}")
            self.read.add(stage)
        elif what == "finish product":
            self.read.discard(more[0])
        elif what == "signal":
            self.phase[more[0], more[1]] ^= 1
        else:
            raise Wrong(f"there is no action {what!r}")


def ring(my: Any) -> None:
    """Chapter 12: many orders, several rings."""
    for stages in (1, 2, 3):
        for seed in range(40):
            Ring(my, stages, 7, seed).go()


def predict(my: Any) -> None:
    """Chapter 13: against the committed run."""
    from benchmarks.reading import at
    from docs.hooks import measured

    rows = {row["n"]: row for row in measured.read("prefill")["lengths"]}

    def times(n: int) -> tuple[float, float, float]:
        stage = at(rows[n], 0.95)
        return rows[n]["select"]["bf16"]["ms"], stage["auto"]["ms"], rows[n]["cudnn"]["ms"]

    names = "selection", "attention over the selection", "dense attention"
    for name, guess, truth in zip(names, my.predict(*times(32768)), times(131072)):
        if abs(guess / truth - 1) > 1 / 3:
            raise Wrong(f"{name}: {guess:.3g} ms were predicted, {truth:.3g} ms were measured")


def pages(my: Any) -> None:
    """Chapter 14: only the sequence's own tokens."""
    held = np.full((6, 4, 2), np.nan)
    tokens = RNG(0).normal(size=(9, 2))
    held[4], held[1], held[3, :1] = tokens[:4], tokens[4:8], tokens[8:]
    table = np.array([4, 1, 3, -1, -1])
    for length in (9, 8, 3, 0):
        got = my.flat(held, table, length)
        if np.isnan(got).any():
            raise Wrong(f"a sequence of {length} tokens read old numbers behind its last token")
        close(f"a sequence of {length} tokens", got, tokens[:length])


def prop(my: Any) -> None:
    """Chapter 15: holds for the right function, and is broken by each wrong one."""

    def right(outs: Any, lses: Any) -> tuple[float, float]:
        lse = np.logaddexp.reduce(lses)
        return sum(np.exp(e - lse) * o for o, e in zip(outs, lses) if e > -np.inf), lse

    def plain_mean(outs: Any, lses: Any) -> tuple[float, float]:
        return float(np.mean(outs)), right(outs, lses)[1]

    def without_the_last(outs: Any, lses: Any) -> tuple[float, float]:
        return right(outs[:-1], lses[:-1]) if len(outs) > 3 else right(outs, lses)

    def overflowing(outs: Any, lses: Any) -> tuple[float, float]:
        weights = np.exp(np.array(lses))
        return float(weights @ np.array(outs) / weights.sum()), float(np.log(weights.sum()))

    def base_two(outs: Any, lses: Any) -> tuple[float, float]:
        out, lse = right(outs, lses)
        return out, lse / np.log(2)

    options = settings(max_examples=200, derandomize=True, database=None, deadline=None,
                       phases=(Phase.generate,), print_blob=False)  # fmt: skip
    try:
        options(my.holds(right))()
    except AssertionError as error:
        raise Wrong("the property does not hold for a function that is right") from error
    missed = [f.__name__.replace("_", " ") for f in
              (plain_mean, without_the_last, overflowing, base_two)
              if passes(options(my.holds(f)))]  # fmt: skip
    if missed:
        raise Wrong(f"the property does not find these bugs: {', '.join(missed)}")


def passes(prop: Any) -> bool:
    """Whether Hypothesis finds no case that breaks a property."""
    try:
        prop()
    except Exception:
        return False
    return True


def router(my: Any) -> None:
    """Chapter 16: the bias chooses, and only that."""
    scores = torch.tensor([[0.6, 0.5, 0.1, 0.3], [0.2, 0.9, 0.4, 0.1]])
    bias = torch.tensor([0.0, 0.0, 1.0, 0.0])
    ids, weights = my.route(scores, bias, 2)
    for t, wanted in ((0, {0: 0.6 / 0.7, 2: 0.1 / 0.7}), (1, {1: 0.9 / 1.3, 2: 0.4 / 1.3})):
        got = {int(i): float(w) for i, w in zip(ids[t], weights[t])}
        if set(got) != set(wanted):
            raise Wrong(f"token {t} passes experts {sorted(got)}, {sorted(wanted)} is right")
        for expert, weight in wanted.items():
            close(f"token {t}: weight of expert {expert}", got[expert], weight, 1e-5)
    load = torch.tensor([100.0, 4, 4, 4])
    close("balance", my.balance(torch.zeros(4), load, 0.1), [-0.1, 0.1, 0.1, 0.1])


def cannot_tell(my: Any) -> None:
    """Chapter 17: small differences of few questions say nothing."""
    for case, wanted in (
        ((30, 32, 28, 32), "cannot tell"), ((30, 32, 12, 32), "a"), ((300, 640, 400, 640), "b"),
        ((86, 100, 82, 100), "cannot tell"), ((8600, 10000, 8200, 10000), "a"),
    ):  # fmt: skip
        got = my.verdict(*case)
        if got != wanted:
            a, n, b, m = case
            raise Wrong(f"{a} of {n} against {b} of {m}: {wanted!r} is right, got {got!r}")


CHECKS: dict[int, Check] = {
    1: cost, 2: online_softmax, 3: block_maximum, 4: causality, 5: teacher, 6: gather, 7: ties,
    10: threshold, 11: key_gradients, 12: ring, 13: predict, 14: pages, 15: prop, 16: router,
    17: cannot_tell,
}  # fmt: skip
"""The check of each chapter."""
