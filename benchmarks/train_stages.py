"""The parts of `msa bench train`: a training step of one layer, its stages, the warm-up form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import cases
from benchmarks.cases import CONFIG, Inputs, make_inputs, make_selection
from benchmarks.checks import GROUP, SCALE, Wrong, place, sampled
from benchmarks.stages import freshly
from benchmarks.timing import timed
from msa import torch_impl
from msa.ir import Selection, Sequences
from msa.triton_impl import align_index, select_fused
from msa.triton_impl.attention import attend_selection, prepare_keys, prepare_queries
from msa.triton_impl.launch import positions_of
from msa.triton_impl.tile_union import split_tiles

BOUND = 0.01
"""Largest relative error of gradients in bfloat16, by Frobenius norm over what is sampled."""
LENGTHS = (8192, 32768, 131072)
Gradients = tuple[Tensor, ...]


def leaves(x: Inputs) -> Inputs:
    """Return the same tensors, which now require gradients."""
    names = ("q", "k", "v", "q_idx", "k_idx")
    return replace(x, **{name: getattr(x, name).detach().requires_grad_() for name in names})


def step(x: Inputs, chosen: Selection, d_out: Tensor) -> tuple[Tensor, Gradients]:
    """Selection, attention, alignment loss, and all gradients; the loss and the five gradients.

    The index tensors are random, so what they select is thrown away, and attention runs over a
    selection of known agreement.
    """
    select_fused(x.q_idx.detach(), x.k_idx.detach(), x.sequences, CONFIG)
    output = attend_selection(x.q, x.k, x.v, chosen, SCALE)
    kl = align_index(x.q, x.k, x.q_idx, x.k_idx, chosen, x.sequences, CONFIG, output.lse)
    wanted = (x.q, x.k, x.v, x.q_idx, x.k_idx)
    return kl.detach(), torch.autograd.grad([output.out, kl], wanted, [d_out, torch.ones_like(kl)])


def dense_step(x: Inputs, d_out: Tensor) -> Gradients:
    """Run dense attention by cuDNN, forward and backward."""
    q, k, v = (t.transpose(0, 1)[None] for t in (x.q, x.k, x.v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return torch.autograd.grad(out, (x.q, x.k, x.v), d_out.transpose(0, 1)[None])


# -- first correct --------------------------------------------------------------------------------
@torch.no_grad()
def check_query_gradients(x: Inputs, chosen: Selection, d_out: Tensor, got: Gradients) -> float:
    """Compare dQ and d q_idx of sampled queries with float64; return the larger relative error."""
    sums = {"q": [0.0, 0.0], "q_idx": [0.0, 0.0]}
    count = x.sequences.total_q * cases.GROUPS

    def add(name: str, found: Tensor, wanted: Tensor) -> None:
        sums[name][0] += float((found.double() - wanted).square().sum())
        sums[name][1] += float(wanted.square().sum())

    for i in sampled(x.sequences.total_q):
        keys, position = place(x.sequences, i)
        for r in range(cases.GROUPS):
            ids = chosen.indices[i, r]
            tokens = ids[ids >= 0].long()[:, None] * CONFIG.block_size
            tokens = (tokens + torch.arange(CONFIG.block_size, device=x.q.device)).flatten()
            tokens = tokens[tokens <= position] + keys.start
            heads = slice(r * GROUP, (r + 1) * GROUP)
            q, k, v = (t.double() for t in (x.q[i, heads], x.k[tokens, r], x.v[tokens, r]))
            p = (q @ k.T * SCALE).softmax(1)
            d_p = d_out[i, heads].double() @ v.T
            d_s = p * (d_p - (p * d_p).sum(1, keepdim=True))
            add("q", got[0][i, heads], d_s @ k * SCALE)
            k_idx = x.k_idx[tokens].double()
            student = (x.q_idx[i, r].double() @ k_idx.T * SCALE).softmax(0)
            add("q_idx", got[3][i, r], (student - p.mean(0)) @ k_idx * SCALE / count)
    worst = max((off / norm) ** 0.5 for off, norm in sums.values())
    if not worst < BOUND:
        raise Wrong(f"gradients of queries of {x.sequences} are off by {sums}")
    return worst


@torch.no_grad()
def check_key_gradients(x: Inputs, chosen: Selection, d_out: Tensor, got: Gradients) -> float:
    """Compare dK and dV of three blocks with float64, over all queries that read them."""
    off, norm = 0.0, 0.0
    block, n = CONFIG.block_size, x.sequences.total_q
    for r, b in ((0, 0), (1, n // block // 2), (3, n // block - 1)):
        tokens = slice(b * block, (b + 1) * block)
        k, v = x.k[tokens, r].double(), x.v[tokens, r].double()
        d_k, d_v = torch.zeros_like(k), torch.zeros_like(v)
        readers = (chosen.indices[:, r] == b).any(1).nonzero()[:, 0]
        output = attend_selection(x.q, x.k, x.v, chosen, SCALE)
        heads = slice(r * GROUP, (r + 1) * GROUP)
        for some in readers.split(2048):
            q, d_o, out = (t[some, heads].double() for t in (x.q, d_out, output.out))
            logits = torch.einsum("qhd,kd->qhk", q, k) * SCALE
            logits -= output.lse[some, heads, None]
            own = torch.arange(b * block, (b + 1) * block, device=x.q.device) <= some[:, None]
            p = logits.exp() * own[:, None]
            d_s = p * (torch.einsum("qhd,kd->qhk", d_o, v) - (d_o * out).sum(2, keepdim=True))
            d_v += torch.einsum("qhk,qhd->kd", p, d_o)
            d_k += torch.einsum("qhk,qhd->kd", d_s, q) * SCALE
        for found, wanted in ((got[1][tokens, r], d_k), (got[2][tokens, r], d_v)):
            off += float((found.double() - wanted).square().sum())
            norm += float(wanted.square().sum())
    if not (off / norm) ** 0.5 < BOUND:
        raise Wrong(f"gradients of keys of {x.sequences} are off by {(off / norm) ** 0.5}")
    return (off / norm) ** 0.5


def check_loss(x: Inputs, chosen: Selection, kl: Tensor) -> float:
    """Compare the loss with the torch backend in float32. It needs memory: for short prompts."""
    q, k, q_idx, k_idx = (t.detach().float() for t in (x.q, x.k, x.q_idx, x.k_idx))
    wanted = torch_impl.align_index(q, k, q_idx, k_idx, chosen, x.sequences, CONFIG)
    off = abs(float(kl) / float(wanted) - 1)
    if not off < 1e-4:
        raise Wrong(f"the loss of {x.sequences} must be {float(wanted)}, got {float(kl)}")
    return off


# -- then fast ------------------------------------------------------------------------------------
def peak(call: Callable[[], Any]) -> float:
    """Measure how many GiB a call needs at its peak, beside what is already allocated."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def stage_times(x: Inputs, chosen: Selection, d_out: Tensor) -> dict[str, Any]:
    """Time each stage alone; useful TFLOP/s count 2, 3, 4 and 1 products per selected block."""
    q, k, v, q_idx, k_idx = (t.detach() for t in (x.q, x.k, x.v, x.q_idx, x.k_idx))
    output = attend_selection(q, k, v, chosen, SCALE)
    out, lse = output.out, output.lse
    none = torch.zeros_like(lse)
    run_queries, union = prepare_queries(q, k, v, chosen, SCALE)
    run_keys, edges = prepare_keys(q, k, v, chosen, SCALE, union)
    asking = q_idx.clone().requires_grad_()
    calls: dict[str, tuple[float, Callable[[], Any]]] = {
        "select": (0, lambda: select_fused(q_idx, k_idx, x.sequences, CONFIG)),
        "forward": (2, lambda: attend_selection(q, k, v, chosen, SCALE)),
        "align": (1, lambda: align_index(
            q, k, asking, k_idx, chosen, x.sequences, CONFIG, lse)),
        "edges": (0, lambda: prepare_keys(
            q, k, v, chosen, SCALE, prepare_queries(q, k, v, chosen, SCALE)[1])),
        "queries": (3, lambda: run_queries(
            q, k, v, out, d_out, lse, none, union, chosen, SCALE)),
        "keys": (4, lambda: run_keys(q, k, v, d_out, lse, none, edges, SCALE)),
    }  # fmt: skip
    product = cases.attention_flops(chosen) / 2
    of_4 = split_tiles(chosen, positions_of(GROUP))
    found: dict[str, Any] = {"mean_union": float(of_4.counts.float().mean())}
    for name, (products, call) in calls.items():
        times = timed(call)
        rate = {"tflops": products * product / times["ms"] / 1e9} if products else {}
        found[name] = times | rate
    return found


def sparse_row(x: Inputs, keep: float, d_out: Tensor) -> dict[str, Any]:
    """Time a whole step at one persistence."""
    chosen = make_selection(x.sequences, keep)
    kl, got = step(x, chosen, d_out)
    row: dict[str, Any] = {
        "keep": keep,
        "kl": float(kl),
        "query_error": check_query_gradients(x, chosen, d_out, got),
        "key_error": check_key_gradients(x, chosen, d_out, got),
    }
    again = step(x, chosen, d_out)
    if not all(torch.equal(a, b) for a, b in zip((kl, *got), (again[0], *again[1]))):
        raise Wrong(f"two steps on {x.sequences} differ")
    if x.sequences.total_q <= 8192:
        row["kl_error"] = check_loss(x, chosen, kl)
    del got, again
    row["extra_gib"] = peak(lambda: step(x, chosen, d_out))
    row["step"] = timed(lambda: step(x, chosen, d_out))
    row["stages"] = stage_times(x, chosen, d_out)
    print(f"  keep {keep}: step {row['step']['ms']:.2f} ms, off by {row['query_error']:.4f} and "
          f"{row['key_error']:.4f}, {row['extra_gib']:.1f} GiB;",
          {k: round(v["ms"], 2) for k, v in row["stages"].items() if k != "mean_union"},
          flush=True)  # fmt: skip
    return row


def steps() -> list[dict[str, Any]]:
    """Measure prompts of 8K to 128K tokens, dense and sparse."""
    return [freshly(one_length, n) for n in LENGTHS]


def one_length(n: int) -> dict[str, Any]:
    """Measure one prompt of n tokens."""
    x = leaves(make_inputs(Sequences.one(n, n)))
    d_out = torch.randn_like(x.q).detach()
    row: dict[str, Any] = {"n": n, "dense_extra_gib": peak(lambda: dense_step(x, d_out))}
    row["dense"] = timed(lambda: dense_step(x, d_out))
    print(f"{n} tokens: dense {row['dense']['ms']:.2f} ms, {row['dense_extra_gib']:.1f} GiB")
    row["sparse"] = [sparse_row(x, keep, d_out) for keep in cases.PERSISTENCE]
    return row


@torch.no_grad()
def dense_lse(x: Inputs) -> Float[Tensor, "Tq Hq"]:
    """Compute the dense log-sum-exp, which a user's own dense attention would already have."""
    lse = torch.empty(x.q.shape[:2], device=x.q.device)
    positions = torch.arange(x.sequences.total_k, device=x.q.device)
    for h in range(cases.HEADS):
        for some in positions.split(4096):
            logits = (x.q[some, h] @ x.k[:, h // GROUP].T).float() * SCALE
            lse[some, h] = logits.masked_fill(positions > some[:, None], -torch.inf).logsumexp(1)
    return lse


def warm_up() -> dict[str, Any]:
    """Time dense attention by cuDNN with the alignment loss over all visible tokens, at 32K."""
    n = 32768
    x = leaves(make_inputs(Sequences.one(n, n)))
    d_out, lse = torch.randn_like(x.q).detach(), dense_lse(x)
    wanted = (x.q_idx, x.k_idx)

    def align(known: Tensor | None) -> Gradients:
        kl = align_index(x.q, x.k, *wanted, None, x.sequences, CONFIG, known)
        return torch.autograd.grad(kl, wanted)

    row: dict[str, Any] = {"n": n, "dense": timed(lambda: dense_step(x, d_out))}
    row["extra_gib"] = peak(lambda: align(lse))
    row["align"] = timed(lambda: align(lse))
    row["align_without_lse"] = timed(lambda: align(None))
    row["both"] = timed(lambda: (dense_step(x, d_out), align(lse)))
    print("warm-up:", {k: v["ms"] for k, v in row.items() if isinstance(v, dict)}, flush=True)
    return row


PARTS = {"steps": steps, "warm_up": lambda: freshly(warm_up)}
