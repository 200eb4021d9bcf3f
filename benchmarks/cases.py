"""The cases that benchmarks measure: lengths, selections of known agreement, real shapes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from msa.config import MSAConfig
from msa.ir import PagedKV, Selection, Sequences
from msa.paging import PagePool

HEADS, GROUPS, DIM = 64, 4, 128
CONFIG = MSAConfig()
CHUNK = 16384
LENGTHS = (4096, 8192, 32768, 131072)
MILLION = 2**20
PREFIXES = (0, 16, 32, 48, 63)  # which 16K-chunks of a million tokens are measured
PERSISTENCE = (0.0, 0.8, 0.95)
AGREEMENT = (0.0, 0.5, 0.8, 0.95, 0.99)  # the same and two more, for whole prompts

# (queries, keys, calls) of the single cases of MiniMax-AI/MSA, datas/inference (production prefill
# shapes, anonymised by their authors, MIT): 16 strata that stand for 10,434 of 14,805 calls.
PRODUCTION = (
    (171, 55339, 1325), (338, 74578, 1418), (347, 131547, 312), (182, 17718, 611),
    (9844, 48884, 110), (10295, 85815, 103), (8476, 153884, 14), (8897, 25537, 47),
    (1404, 46844, 492), (1626, 93146, 565), (1649, 135537, 180), (1623, 18007, 388),
    (16384, 47744, 2477), (16384, 84480, 1347), (16384, 173824, 35), (16384, 27136, 1010),
)  # fmt: skip
# Ragged batches of three from the same source: query lengths, key lengths.
RAGGED = (
    ((54, 233, 12621), (101942, 31209, 85197)),
    ((55, 312, 355), (104247, 112312, 89827)),
    ((55, 415, 3987), (72887, 97055, 124947)),
    ((59, 104, 723), (34747, 40680, 69203)),
)


@dataclass(frozen=True)
class Inputs:
    """The tensors of one problem, in bfloat16 on the GPU."""

    q: Float[Tensor, "Tq Hq D"]
    k: Float[Tensor, "Tk Hkv D"]
    v: Float[Tensor, "Tk Hkv D"]
    q_idx: Float[Tensor, "Tq Hkv D"]
    k_idx: Float[Tensor, "Tk D"]
    sequences: Sequences


def make_inputs(sequences: Sequences, seed: int = 0) -> Inputs:
    """Draw random normal tensors; their shape is the one that all figures of the project use."""
    random = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device="cuda", dtype=torch.bfloat16)

    n_q, n_k = sequences.total_q, sequences.total_k
    return Inputs(
        normal(n_q, HEADS, DIM), normal(n_k, GROUPS, DIM), normal(n_k, GROUPS, DIM),
        normal(n_q, GROUPS, DIM), normal(n_k, DIM), sequences,
    )  # fmt: skip


def make_cache(x: Inputs) -> tuple[PagedKV, Inputs]:
    """Round keys, values and index keys to a cache of 8 bits; also the inputs that it stands for.

    All factors are powers of two (`PagePool`), so the numbers are exact in bfloat16.
    """
    spans = [keys for _, keys in x.sequences.spans()]
    block = CONFIG.block_size
    blocks = sum(-(-(keys.stop - keys.start) // block) for keys in spans)
    pages = (
        torch.zeros((blocks, block, *y.shape[1:]), dtype=torch.float8_e4m3fn, device=y.device)
        for y in (x.k, x.v, x.k_idx)
    )
    pool = PagePool(*pages, batch=len(spans))
    for s, keys in enumerate(spans):
        pool.append(s, x.k[keys], x.v[keys], x.k_idx[keys])
    flat = zip(*(pool.cache.flat(s) for s in range(len(spans))))
    k, v, k_idx = (torch.cat([part.bfloat16() for part in parts]) for parts in flat)
    return pool.cache, replace(x, k=k, v=v, k_idx=k_idx)


def make_selection(
    sequences: Sequences,
    keep: float,
    every: int = 1,
    config: MSAConfig = CONFIG,
    groups: int = GROUPS,
    seed: int = 0,
    device: str = "cuda",
) -> Selection:
    """Draw a canonical selection whose neighbouring queries agree to a known degree.

    The first block and the own block are always in it. Each of the k - 2 other places keeps its
    block from one query to the next with chance `keep`, and is drawn anew otherwise (with
    every > 1: only at queries that are multiples of `every`). Place j draws among blocks j + 1,
    j + 1 + (k - 2), ..., so places never collide. Every visible block is equally likely, up to
    rounding.
    """
    random = torch.Generator(device).manual_seed(seed)
    places = config.top_k - 2
    parts: list[Tensor] = []
    for qs, ks in sequences.spans():
        n_q, n_k = qs.stop - qs.start, ks.stop - ks.start
        if n_q == 0:
            continue
        query = torch.arange(n_q, device=device)
        own = ((query + n_k - n_q) // config.block_size)[:, None, None]  # [n_q, 1, 1]
        place = torch.arange(places, device=device)
        choices = (own - 1 - place + places - 1).div(places, rounding_mode="floor").clamp(min=0)
        shape = (n_q, groups, places)
        draw = torch.rand(shape, generator=random, device=device)
        block = 1 + place + places * (draw * choices).long()
        anew = torch.rand(shape, generator=random, device=device) >= keep
        anew &= (query % every == 0)[:, None, None]
        anew[0] = True
        anew[1:] |= (choices[1:] > 0) & (choices[:-1] == 0)
        drawn_at = torch.where(anew, query[:, None, None], 0).cummax(0).values
        block = block.gather(0, drawn_at)
        there = choices.expand(shape).gather(0, drawn_at) > 0
        far = torch.where(there, block, 2**30)
        own = own.expand(n_q, groups, 1)
        first = torch.where(own > 0, 0, 2**30)
        ids = torch.cat([first, far, own], 2).sort(2).values
        parts.append(torch.where(ids < 2**30, ids, -1).int())
    empty = torch.empty((0, groups, config.top_k), dtype=torch.int32, device=device)
    return Selection(torch.cat([empty, *parts]), sequences, config.block_size)


def attention_flops(selection: Selection, heads: int = HEADS, dim: int = DIM) -> float:
    """Count useful operations of the attention stage: two products over the selected blocks."""
    per_group = heads // selection.indices.shape[1]
    edges = int((selection.indices >= 0).sum())
    return 4.0 * per_group * dim * edges * selection.block_size


def select_flops(sequences: Sequences, groups: int = GROUPS, dim: int = DIM) -> float:
    """Count operations of the index branch over visible tokens."""
    pairs = sum(
        (qs.stop - qs.start) * (ks.stop - ks.start) - (qs.stop - qs.start) ** 2 / 2
        for qs, ks in sequences.spans()
    )
    return 2.0 * groups * dim * pairs
