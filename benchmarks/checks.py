"""First correct, then fast: what is timed is compared with plain formulas on sampled queries.

A check raises Wrong or returns the error that it found; nothing is timed before.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from benchmarks import cases
from benchmarks.cases import CONFIG, Inputs
from msa.ir import Selection, Sequences
from msa.triton_impl import select_fused
from msa.triton_impl.attention import LoopOrder, attend_selection

BOUND = 0.02
"""Largest error of outputs and log-sum-exps in bfloat16 on normal inputs."""
GROUP = cases.HEADS // cases.GROUPS
SCALE = cases.DIM**-0.5


class Wrong(Exception):
    """A result that is not what it should be, and is therefore not timed."""


def sampled(total: int, number: int = 24) -> list[int]:
    """Choose some queries: the first, the last, and others between.

    >>> sampled(100, 4)
    [0, 33, 66, 99]
    """
    return sorted({round(i * (total - 1) / (number - 1)) for i in range(number)})


def place(sequences: Sequences, query: int) -> tuple[slice, int]:
    """Find the keys of a query's sequence, and the query's position among them (R2)."""
    qs, ks = next((q, k) for q, k in sequences.spans() if q.start <= query < q.stop)
    return ks, query - qs.stop + ks.stop - ks.start


def past_scores(
    q_idx: Float[Tensor, "Tq Hkv D"], k_idx: Float[Tensor, "Tk D"], sequences: Sequences, query: int
) -> Float[Tensor, "Hkv own"]:
    """Compute float32 scores, unscaled, of the blocks before a query's own block (R4, R5)."""
    keys, position = place(sequences, query)
    own = position // CONFIG.block_size
    past = k_idx[keys.start : keys.start + own * CONFIG.block_size].float()
    scores = q_idx[query].float() @ past.T
    return scores.view(q_idx.shape[1], own, CONFIG.block_size).amax(2)


def check_select(sequences: Sequences) -> None:
    """Check that the fused selection equals a plain one on sampled queries of integer inputs."""
    random = torch.Generator("cuda").manual_seed(1)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=random, device="cuda").bfloat16()

    q_idx = integers(sequences.total_q, cases.GROUPS, cases.DIM)
    k_idx = integers(sequences.total_k, cases.DIM)
    chosen = select_fused(q_idx, k_idx, sequences, CONFIG).indices
    for i in sampled(sequences.total_q):
        scores = past_scores(q_idx, k_idx, sequences, i)
        order = torch.argsort(scores, dim=1, descending=True, stable=True)
        best = order[:, : CONFIG.top_k - 1].sort(1).values
        wanted = torch.full_like(chosen[i], -1)
        wanted[:, : best.shape[1]] = best
        wanted[:, best.shape[1]] = scores.shape[1]
        if not torch.equal(wanted, chosen[i]):
            raise Wrong(f"the selection of query {i} of {sequences} differs from the plain one")


def score_lost(x: Inputs, fine: Int[Tensor, "Tq Hkv k"], coarse: Int[Tensor, "Tq Hkv k"]) -> float:
    """Measure the share of block score that a coarser selection loses, on sampled queries.

    Scores are those of bfloat16 operands. Own blocks do not count, since both selections have them.
    """
    had = lost = 0.0
    for i in sampled(x.sequences.total_q):
        scores = past_scores(x.q_idx, x.k_idx, x.sequences, i).double()
        sums: list[float] = []
        for ids in (fine[i], coarse[i]):
            remote = (ids >= 0) & (ids < scores.shape[1])
            values = torch.nn.functional.pad(scores, (0, 1)).gather(
                1, torch.where(remote, ids, scores.shape[1]).long()
            )
            sums.append(float(values.sum()))
        had, lost = had + sums[0], lost + sums[0] - sums[1]
    return lost / had if had else 0.0


def exact(x: Inputs, query: int, r: int, tokens: Tensor | slice) -> tuple[Tensor, Tensor]:
    """Compute outputs and log-sum-exps of one query and group in float64, over the given tokens."""
    logits = x.q[query, r * GROUP : (r + 1) * GROUP].double() @ x.k[tokens, r].double().T * SCALE
    return logits.softmax(1) @ x.v[tokens, r].double(), logits.logsumexp(1)


def check_attention(x: Inputs, chosen: Selection, order: LoopOrder) -> float:
    """Return the largest error of sampled queries against float64.

    Raises:
        Wrong: if it is beyond the rounding of bfloat16.
    """
    result = attend_selection(x.q, x.k, x.v, chosen, SCALE, order)
    return check_output(x, chosen, result.out, result.lse, f"{order} attention")


def check_output(
    x: Inputs, chosen: Selection, out: Float[Tensor, "Tq Hq D"], lse: Float[Tensor, "Tq Hq"],
    what: str,
) -> float:  # fmt: skip
    """Return the same for results of any attention over the selection.

    Raises:
        Wrong: if it is beyond the rounding of bfloat16.
    """
    worst = 0.0
    for i in sampled(x.sequences.total_q):
        keys, position = place(x.sequences, i)
        for r in range(cases.GROUPS):
            ids = chosen.indices[i, r]
            tokens = ids[ids >= 0].long()[:, None] * CONFIG.block_size
            tokens = (tokens + torch.arange(CONFIG.block_size, device=ids.device)).flatten()
            wanted, wanted_lse = exact(x, i, r, tokens[tokens <= position] + keys.start)
            heads = slice(r * GROUP, (r + 1) * GROUP)
            worst = max(worst, float((out[i, heads].double() - wanted).abs().max()))
            worst = max(worst, float((lse[i, heads].double() - wanted_lse).abs().max()))
    if not worst < BOUND:
        raise Wrong(f"{what} of {x.sequences} is off by {worst}")
    return worst


def check_dense(x: Inputs, out: Float[Tensor, "Tq Hq D"], causal: bool) -> float:
    """Return the same for dense attention of one sequence, over visible or over all tokens."""
    worst = 0.0
    for i in sampled(x.sequences.total_q):
        tokens = slice(0, place(x.sequences, i)[1] + 1 if causal else None)
        for r in range(cases.GROUPS):
            wanted = exact(x, i, r, tokens)[0]
            found = out[i, r * GROUP : (r + 1) * GROUP].double()
            worst = max(worst, float((found - wanted).abs().max()))
    if not worst < BOUND:
        raise Wrong(f"dense attention is off by {worst}")
    return worst
