"""Decoding over a cache whose pages are dealt out to ranks (R4-R8, R16).

    rank r of P holds the blocks b with b % P == r, of every sequence

    each rank:  scores of its blocks that are not forced, all heads and queries
                its best candidates, as (score, id)
    exchange    k candidates of each rank
    each rank:  the best of all candidates, by score, then by id (R7); forced blocks beside them
                attention over those of the selected blocks that it holds
    exchange    out and LSE of each rank, weighted by their LSE (R16)

A block is among the best of all only if it is among the best of its rank, so the selection is that
of one process. Each rank reads 1 / P of the index keys, which is where a step at a long context
spends its time. It pays for two exchanges of a few KiB with their latency.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from msa import cache_checks, checks
from msa.config import MSAConfig
from msa.dispatch import BackendName, load_backend, resolve
from msa.entry import Entry
from msa.ir import PagedKV
from msa.parallel.agreement import exchange
from msa.parallel.gathering import all_gather
from msa.parallel.groups import Group, process_group

NOWHERE = 2**31 - 1
"""The id of a place without a candidate: behind all others."""


@torch.no_grad()
def context_parallel_decode(
    q: Float[Tensor, "B n Hq D"], q_idx: Float[Tensor, "B n Hkv Di"], cache: PagedKV,
    lengths: Int[Tensor, " B"], *, group: Group | None = None, config: MSAConfig = MSAConfig(),
    backend: BackendName = "auto", check: bool = True,
) -> tuple[
    Float[Tensor, "B n Hq Dv"], Float[Tensor, "B n Hq"], Int[Tensor, "B n Hkv k"]
]:  # fmt: skip
    """MSA for the last n tokens of each sequence; every rank has a part of the pages.

    Every rank calls it with the same queries. Column j of the rank's page table is block
    j * P + rank of the sequence, for P ranks. cache.lengths is not read.

    Args:
        q, q_idx: the new queries, the same on every rank.
        cache: this rank's pages; new tokens are in them already, on the rank that holds their
            block.
        lengths: tokens of each whole sequence, the same on every rank; 0 for an empty slot.
        group, config, backend: as in `context_parallel_attention`; the backends are torch, triton.
        check: check the contents of tables and lengths, which waits for the device, and exchange
            sizes, lengths and options between the hosts, so that ranks that differ raise. False for
            steps whose tables are known to be right: this takes about a millisecond.

    Returns:
        out in q's dtype and lse float32, as `msa.decode` gives them, and the selected block ids in
        R8's form, int32; all the same on every rank. 0, -inf and -1 for an empty slot. The parts of
        the ranks are weighted by a float32 LSE, so float64 has an error of about 1e-7.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came (R20); also where
            ranks differ. RuntimeError: another rank's arguments were refused.
    """
    ranks = process_group(group)
    if check:
        exchange(ranks, lambda: checked_step(q, q_idx, cache, lengths, config, backend, ranks))
    rank, count, n = ranks.rank(), ranks.size(), q.shape[1]
    cache = cache_checks.with_index_dtypes(cache)
    new = torch.arange(n, device=q.device) - n
    positions = lengths.long()[:, None] + new  # [B, n], negative in an empty slot
    name = resolve(backend, q)
    scores = block_scores(q_idx, cache, positions, config, rank, count, name)
    ids = merge(scores, positions, config, rank, ranks)
    mine = torch.where((ids >= 0) & (ids % count == rank), ids // count, -1)
    mine = in_order(mine)
    visible = visible_tokens(positions, config.block_size, rank, count)
    out, lse = attend_rows(q, cache, mine, visible, config, name)
    out, lse = weigh(out, lse, ranks)
    unknown = (lse == -torch.inf) & (positions >= 0)[..., None]  # all products are -inf (R9)
    return out.masked_fill(unknown[..., None], torch.nan).to(q.dtype), lse, ids.int()


def block_scores(
    q_idx: Float[Tensor, "B n Hkv Di"], cache: PagedKV, positions: Int[Tensor, "B n"],
    config: MSAConfig, rank: int, count: int, backend: str,
) -> Float[Tensor, "B n Hkv table"]:  # fmt: skip
    """The score of each of this rank's blocks that is not forced, else -inf (R4-R6).

    A block that is not forced lies before the query's own block, so all of its tokens are visible.
    """
    columns = torch.arange(cache.page_table.shape[1], device=q_idx.device)
    blocks = columns * count + rank
    recent = (positions // config.block_size - config.local_blocks + 1)[..., None]
    free = (blocks >= config.sink_blocks) & (blocks < recent)  # [B, n, table]
    if not len(columns) or not len(cache.k_idx_pages):  # this rank holds nothing
        return torch.full((*q_idx.shape[:3], len(columns)), -torch.inf, device=q_idx.device,
                          dtype=wide(q_idx))  # fmt: skip
    if backend == "triton":
        scores = kernel_scores(q_idx, cache, (free.any(1) * (columns + 1)).amax(1), config)
    else:
        used = torch.where(free.any(1), cache.page_table.long(), 0)
        keys = cache.read("k_idx", (used,)).to(wide(q_idx))  # [B, table, Bk, Di]
        scores = torch.einsum("bngd,btkd->bngtk", q_idx.to(keys.dtype), keys)
        scores = scores * config.index_scale_for(q_idx.shape[-1])
        scores = scores.masked_fill(scores.isnan(), -torch.inf).amax(-1)
    return scores.masked_fill(~free[:, :, None] | scores.isnan(), -torch.inf)


def kernel_scores(
    q_idx: Float[Tensor, "B n Hkv Di"], cache: PagedKV, columns: Int[Tensor, " B"],
    config: MSAConfig,
) -> Float[Tensor, "B n Hkv table"]:  # fmt: skip
    """The scores by the kernels of decoding: this rank's blocks as if they were a whole sequence.

    `columns` of the table are scored, up to the last block that is not forced. A token behind them
    stands for the query's own block.
    """
    from msa.triton_impl import decode as kernels

    block = cache.k_idx_pages.shape[1]
    as_whole = PagedKV(
        cache.k_pages, cache.v_pages, cache.k_idx_pages, cache.page_table,
        (columns * block + 1).int(), cache.k_scales, cache.v_scales, cache.k_idx_scales,
    )  # fmt: skip
    plain = MSAConfig(block, 1, index_scale=config.index_scale_for(q_idx.shape[-1]))
    arrivals = torch.empty((len(q_idx), 1), dtype=torch.int32, device=q_idx.device)
    chosen = kernels.kernel_choice.choose("auto", kernels.score_call(q_idx, as_whole))
    scores = kernels.score_step(q_idx.contiguous(), as_whole, plain, arrivals, chosen)
    return scores[..., : cache.page_table.shape[1]]


def merge(
    scores: Float[Tensor, "B n Hkv table"], positions: Int[Tensor, "B n"], config: MSAConfig,
    rank: int, group: dist.ProcessGroup,
) -> Int[Tensor, "B n Hkv k"]:  # fmt: skip
    """The selected ids, from the best candidates of every rank (R6-R8).

    Sorting is stable, and candidates come in the order of their ids: equal scores go to the lower
    id (R7). A visible block with a score of -inf comes before a place without a candidate.
    """
    count = group.size()
    places, columns = config.top_k - config.forced_blocks, scores.shape[-1]
    blocks = torch.arange(columns, device=scores.device) * count + rank
    recent = (positions // config.block_size - config.local_blocks + 1)[..., None]
    free = (blocks >= config.sink_blocks) & (blocks < recent)
    ids = torch.where(free, blocks, NOWHERE)[:, :, None].expand_as(scores)
    # those that may be chosen first, in the order of their ids: the others lie at both ends
    order = ids.sort(dim=-1, stable=True).indices
    scores, ids = best(scores.gather(-1, order), ids.gather(-1, order), places)
    scores, ids = (gathered(x, group) for x in (scores, ids))  # [..., P * places]
    order = ids.sort(dim=-1, stable=True).indices
    _, ids = best(scores.gather(-1, order), ids.gather(-1, order), places)
    chosen = torch.where(ids == NOWHERE, -1, ids)
    return in_order(torch.cat([forced(positions, config, scores.shape[2]), chosen], -1))


def best(
    scores: Float[Tensor, "*rows n"], ids: Int[Tensor, "*rows n"], places: int
) -> tuple[Float[Tensor, "*rows places"], Int[Tensor, "*rows places"]]:
    """The `places` largest scores and their ids; the first ones of those that are equal."""
    short = max(0, places - scores.shape[-1])
    scores = torch.nn.functional.pad(scores, (0, short), value=-torch.inf)
    ids = torch.nn.functional.pad(ids, (0, short), value=NOWHERE)
    scores, order = scores.sort(dim=-1, descending=True, stable=True)
    return scores[..., :places], ids.gather(-1, order)[..., :places]


def forced(
    positions: Int[Tensor, "B n"], config: MSAConfig, groups: int
) -> Int[Tensor, "B n Hkv forced"]:
    """The first and the recent blocks of each query; -1 where there are fewer."""
    own = (positions // config.block_size)[..., None]
    first = torch.arange(config.sink_blocks, device=positions.device)
    recent = own - torch.arange(config.local_blocks, device=positions.device)
    first = torch.where(first <= own, first, -1)
    recent = torch.where(recent >= config.sink_blocks, recent, -1)
    ids = torch.where(positions[..., None] < 0, -1, torch.cat([first, recent], -1))
    return ids[:, :, None].expand(-1, -1, groups, -1)


def in_order(ids: Int[Tensor, "*rows k"]) -> Int[Tensor, "*rows k"]:
    """Ascending ids, then -1 (R8)."""
    ids = torch.where(ids < 0, NOWHERE, ids).sort(dim=-1).values
    return torch.where(ids == NOWHERE, -1, ids)


def visible_tokens(
    positions: Int[Tensor, "B n"], block: int, rank: int, count: int
) -> Int[Tensor, "B n"]:
    """How many tokens of this rank's blocks each query sees.

    >>> visible_tokens(torch.tensor([[9]]), block=2, rank=0, count=2)  # blocks 0, 2 and 4: 4 is own
    tensor([[6]])
    """
    own = positions // block
    blocks = torch.where(own < rank, 0, (own - rank) // count + 1)
    missing = torch.where(own % count == rank, block - 1 - positions % block, 0)
    return torch.where(positions < 0, 0, blocks * block - missing)


def attend_rows(
    q: Float[Tensor, "B n Hq D"], cache: PagedKV, ids: Int[Tensor, "B n Hkv k"],
    visible: Int[Tensor, "B n"], config: MSAConfig, backend: str,
) -> tuple[Float[Tensor, "B n Hq Dv"], Float[Tensor, "B n Hq"]]:  # fmt: skip
    """out in float32 and lse over this rank's selected blocks; 0 and -inf where nothing has weight.

    Each query is a sequence of its own here, since this rank's part of it has its own length.
    """
    (batch, n), table = q.shape[:2], cache.page_table
    rows = PagedKV(
        cache.k_pages, cache.v_pages, cache.k_idx_pages, table.repeat_interleave(n, 0),
        visible.flatten().int(), cache.k_scales, cache.v_scales, cache.k_idx_scales,
    )  # fmt: skip
    module: Any = load_backend("triton" if backend == "triton" else "torch")
    found = module.decode_step(
        q.flatten(0, 1)[:, None], None, rows, config, ids.flatten(0, 1)[:, None].int()
    )
    out, lse = (x.view(batch, n, *x.shape[2:]) for x in (found.out, found.lse))
    nothing = lse == -torch.inf
    return out.to(wide(q)).masked_fill(nothing[..., None], 0.0), lse


def weigh(
    out: Float[Tensor, "B n Hq Dv"], lse: Float[Tensor, "B n Hq"], group: dist.ProcessGroup
) -> tuple[Float[Tensor, "B n Hq Dv"], Float[Tensor, "B n Hq"]]:
    """The results of all ranks, weighted by their LSE (R16)."""
    outs = gathered(out[..., None], group)  # [..., Dv, P]
    lses = gathered(lse[..., None], group)
    lse = lses.logsumexp(-1)
    shares = (lses - lse[..., None].nan_to_num(neginf=0.0, posinf=torch.inf)).exp()
    return (outs * shares[..., None, :]).sum(-1), lse


def gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tensors of all ranks, side by side in the last dim, rank after rank."""
    whole = x.new_empty(group.size() * len(x), *x.shape[1:])
    all_gather(whole, x.contiguous(), group=group)
    return whole.unflatten(0, (group.size(), len(x))).movedim(0, -2).flatten(-2)


def wide(x: Tensor) -> torch.dtype:
    """The dtype of sums: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def checked_step(
    q: Tensor, q_idx: Tensor, cache: PagedKV, lengths: Tensor, config: MSAConfig,
    backend: BackendName, group: dist.ProcessGroup,
) -> dict[str, Any]:  # fmt: skip
    """What has to be the same on every rank; raises if this rank's arguments do not fit.

    This rank's pages are checked as those of `msa.decode` are: they have to hold its blocks.
    """
    checks.check_type("config", config, MSAConfig)
    checks.check_type("cache", cache, PagedKV)
    for name, x in (("q", q), ("q_idx", q_idx)):
        checks.check_array(name, x)
        checks.check_torch(name, x)
    if backend == "reference":
        raise ValueError("backend must be auto, torch or triton, got 'reference'")
    Entry(backend, q).check_kernels(config.block_size, config.top_k, {"q": q, "q_idx": q_idx})
    sizes: dict[str, int] = {"Bk": config.block_size}
    checks.check_shape("q", q, "B n Hq D", sizes)
    checks.check_count("n", sizes["n"], 1)
    cache_checks.check_cache(cache, sizes)
    checks.check_shape("q_idx", q_idx, "B n Hkv Di", sizes)
    checks.check_heads(sizes["Hq"], sizes["Hkv"])
    cache_checks.check_queries(cache, q, q_idx)
    checks.check_integers("lengths", lengths)
    checks.check_torch("lengths", lengths)
    checks.check_shape("lengths", lengths, "B", sizes)
    whole = [int(length) for length in lengths.tolist()]
    for s, length in enumerate(whole):
        if length < 0 or 0 < length < sizes["n"]:
            raise ValueError(
                f"lengths[{s}] must be 0 or at least n = {sizes['n']}, the new tokens, got {length}"
            )
    last = torch.tensor(whole, dtype=torch.int64)[:, None] - 1
    own = visible_tokens(last, config.block_size, group.rank(), group.size())[:, 0]
    held = replace(cache_checks.with_index_dtypes(cache), lengths=own.to(cache.lengths.device))
    cache_checks.check_contents(held, sizes | {"n": 0})
    arrays = {"q": q, "q_idx": q_idx, "cache.v_pages": cache.v_pages[0:0]}
    arrays |= {"cache.k_pages": cache.k_pages[0:0], "cache.k_idx_pages": cache.k_idx_pages[0:0]}
    facts: dict[str, Any] = {n: (tuple(x.shape), str(x.dtype)) for n, x in arrays.items()}
    return facts | {"config": config, "backend": backend, "lengths": whole}
