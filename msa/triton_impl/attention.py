"""The whole path: select, then attend to the selected blocks in the cheaper order (R4-R12).

    union     every block of a tile's union is walked by the whole tile: no partials, but the whole
              tile computes a block even if only one of its queries selected it
    kv_outer  every block is read by exactly the queries that selected it: nothing is computed
              needlessly, but each (query, block) pair writes a partial result that is read again
    auto      chooses for each tile. A tile whose union is short walks it. If the union is long, the
              blocks that only one query selected (if it is very long, one or two queries) go
              KV-outer, and their partials are added at the end

The lowering that `msa.lower` shows has either the forms of kv_outer (Selection, ReverseIndex,
Schedule, Partials) or the TileUnion of union. auto, the default, has both at once: its SplitUnion
(tile_union.py) is a TileUnion of the shared blocks, and a Selection of the others, `remote`, which
is lowered KV-outer. The gradients and the alignment loss use TileEdges (tile_reverse_index.py).

The rule of auto compares costs: a walk computes a block for every row of the tile, KV-outer only
for the rows that selected it, but at a lower rate. The size of the tile's union decides
(msa/loop_order.py), on the device, so the host does not wait. If blocks have too few readers for
KV-outer (fewer than MIN_EDGES on average), or queries have very many blocks (LARGEST_SPLIT), auto
means union.

`msa.kernel_choice` says which kernels run, portable or hopper. Where hopper ones do, auto means
union for short sequences (LONGEST_WHOLE). In longer ones, a tile walks the blocks that two queries
of a consumer share (SHARED), and `combine.py` adds what the walk and KV-outer found.

Backward (R18): dQ by a walk over unions, dK and dV KV-outer by tiles of queries.

Both take super-tiles of queries one after another, so that their memory beside the results is
bounded:

    forward     PARTIAL_BYTES (msa/triton_impl/tuning.py) for partial results and marks; 64 bytes
                for each edge of a super-tile
    backward    PARTIAL_BYTES for the sums of items and marks; 4 * Tk * Hkv * (D + Dv) bytes
                for one item of each block and group, as much again for sums over more than one
                super-tile; 32 bytes for each edge of a super-tile's unions

In the usual shape (64 heads in 4 groups, D = 128, k = 16) a backward of up to 140K tokens is one
super-tile. The sums of several are added in float32 and in order, so the bits stay the same (R19).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from msa import chips
from msa.autograd import differentiable_once
from msa.config import MSAConfig
from msa.ir import Array, Output, Selection, Sequences
from msa.kernel_choice import (
    Kernels,
    WalkCall,
    backward_call_of,
    chunks_of,
    obstacle,
    order_on_hopper,
    runs_on_hopper,
    walk_call_of,
)
from msa.kernel_choice import choose as choose_kernels
from msa.loop_order import LARGEST_SPLIT, MIN_EDGES, SHARED, limits
from msa.triton_impl import alignment, tuning
from msa.triton_impl.combine import Slots, weigh_slots
from msa.triton_impl.key_gradients import key_gradients
from msa.triton_impl.launch import positions_of, require_kernels
from msa.triton_impl.paged_keys import Pages, page_matrix
from msa.triton_impl.partials import fill_slots
from msa.triton_impl.places import on_its_device
from msa.triton_impl.query_gradients import query_gradients
from msa.triton_impl.reverse_index import mark_bytes, reverse_edges
from msa.triton_impl.schedule import schedule_edges
from msa.triton_impl.selection import select_fused
from msa.triton_impl.step_sequences import StepSequences
from msa.triton_impl.tile_reverse_index import reverse_union, tile_sequences
from msa.triton_impl.tile_union import SplitUnion, split_tiles, union_width
from msa.triton_impl.union_walk import walk

LoopOrder = Literal["auto", "kv_outer", "union"]


def super_tiles(sequences: Sequences, size: int) -> tuple[tuple[slice, slice, Sequences], ...]:
    """`Sequences.tiles`, kept for shapes that come again, or with the step."""
    if isinstance(sequences, StepSequences):
        return sequences.table(StepSequences.parts, size)
    return kept_tiles(sequences, size)


@lru_cache(maxsize=64)
def kept_tiles(sequences: Sequences, size: int) -> tuple[tuple[slice, slice, Sequences], ...]:
    """`Sequences.tiles`, kept."""
    return tuple(sequences.tiles(size))


def choose_order(selection: Selection, group: int) -> str:
    """What "auto" does with this selection: "split" or "union" (see above)."""
    n_q, _, top_k = selection.indices.shape
    blocks = max(1, selection.sequences.cu_blocks(selection.block_size)[-1])
    dense = n_q * top_k >= MIN_EDGES * blocks
    return "split" if dense and positions_of(group) > 2 and top_k <= LARGEST_SPLIT else "union"


def attend_part(
    q: Float[Tensor, "Tq Hq D"], k: Float[Tensor, "*where Hkv D"],
    v: Float[Tensor, "*where Hkv Dv"],
    selection: Selection, softmax_scale: float, order: str, into: Output, walker: str = "portable",
    chunks: str = "portable", pages: Pages | None = None,
) -> None:  # fmt: skip
    """Attend one super-tile in one order; nothing here waits for the device.

    With `pages`, k and v are pages.
    """

    def kv_outer(chosen: Selection) -> Slots:
        schedule = schedule_edges(reverse_edges(chosen), tuning.CHUNK_EDGES)
        if chunks == "hopper":
            # imported here, because older releases of triton have no Gluon
            from msa.triton_impl.hopper import partials as hopper

            return hopper.fill_slots(q, k, v, schedule, softmax_scale, pages=pages)
        return fill_slots(q, k, v, schedule, softmax_scale, pages=pages)

    if order == "kv_outer":
        weigh_slots(kv_outer(selection), softmax_scale, into)
        return
    group = q.shape[1] // k.shape[-2]
    if walker == "hopper":
        walk_on_hopper(q, k, v, selection, softmax_scale, order, into, kv_outer, pages)
        return
    tile_size = positions_of(group)
    rate = chips.current().family.operations_per_byte
    split = limits(selection.top_k, rate) if order == "split" else None
    union = split_tiles(selection, tile_size, split)
    walk(
        q, k, v, selection.sequences, selection.block_size, union.block_ids, union.row_masks,
        union.counts, tile_size, softmax_scale, into=into, pages=pages,
        slots=None if union.remote is None else kv_outer(union.remote),
    )  # fmt: skip


def walk_on_hopper(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection, scale: float, order: str, into: Output,
    kv_outer: Callable[[Selection], Slots], pages: Pages | None = None,
) -> None:  # fmt: skip
    """The hopper walk along unions; with order "split" its result is one more slot."""
    from msa.triton_impl.hopper import union_walk as hopper  # older releases have no Gluon

    tile_size = hopper.tile_size_of(q.shape[1] // k.shape[-2])
    limit = SHARED if order == "split" else None
    union = split_tiles(selection, tile_size, limit, tile_size // hopper.CONSUMERS)
    blocks = union.block_ids, union.row_masks, union.counts
    if union.remote is None:
        hopper.walk(q, k, v, selection.sequences, *blocks, scale, into, pages=pages)
        return
    walked = torch.empty_like(into.lse), torch.empty_like(into.lse)
    hopper.walk(q, k, v, selection.sequences, *blocks, scale, into, walked, pages)
    weigh_slots(kv_outer(union.remote), scale, into, walked)


@on_its_device
def attend_selection(
    q: Float[Array, "Tq Hq D"], k: Float[Array, "Tk Hkv D"], v: Float[Array, "Tk Hkv Dv"],
    selection: Selection, softmax_scale: float, loop_order: LoopOrder = "auto",
    kernels: Kernels = "auto",
) -> Output:  # fmt: skip
    """Softmax attention over the visible tokens of the selected blocks (eq. 8, R9-R12).

    Differentiable in q, k and v with the selection held fixed (R18), lse included.

    Args:
        loop_order: "auto", "kv_outer" or "union"; the result is the same up to rounding (R16).
        kernels: which kernels attend: "portable", "hopper", or "auto", which chooses by
            `msa.kernel_choice`. The gradients of "hopper" run on these kernels where they can.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came (R20).
    """
    require_kernels(selection.block_size, selection.top_k, q=q, k=k, v=v)
    return attend_checked(q, k, v, selection, softmax_scale, loop_order, kernels)


def attend_checked(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection, scale: float, loop_order: LoopOrder,
    kernels: Kernels,
) -> Output:  # fmt: skip
    """The same for arguments that are checked."""
    selection = replace(selection, indices=selection.indices.contiguous())
    out, lse = SelectedAttention.apply(q, k, v, selection, scale, loop_order, kernels)
    return Output(out, lse, selection)


class SelectedAttention(torch.autograd.Function):
    """Keeps q, k, v, out and lse; the backward recomputes every probability."""

    @staticmethod
    @on_its_device
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, selection: Selection, scale: float,
        loop_order: LoopOrder, kernels: Kernels,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Keep what the backward needs."""
        out, lse = attend_super_tiles(q, k, v, selection, scale, loop_order, kernels)
        ctx.save_for_backward(q, k, v, out, lse, selection.indices)  # refuses ids written since
        ctx.selection, ctx.scale, ctx.kernels = selection, scale, kernels
        return out, lse

    @staticmethod
    @differentiable_once
    @on_its_device
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        """dQ by a walk over unions, dK and dV KV-outer; none for the selection (R18)."""
        q, k, v, out, lse, _ = ctx.saved_tensors
        fixed = ctx.selection, ctx.scale, ctx.kernels
        grads = gradients(d_out, d_lse, q, k, v, out, lse, *fixed)
        return *grads, None, None, None, None


@on_its_device
@torch.no_grad()
def attend_selection_forward(
    q: Float[Tensor, "Tq Hq D"], k: Float[Tensor, "Tk Hkv D"], v: Float[Tensor, "Tk Hkv Dv"],
    selection: Selection, softmax_scale: float,
) -> tuple[Float[Tensor, "Tq Hq Dv"], Float[Tensor, "Tq Hq"]]:  # fmt: skip
    """`attend_selection` for callers with an autograd of their own: out in q's dtype, lse float32.

    Raises:
        TypeError, ValueError: see `require_kernels`.
    """
    require_kernels(selection.block_size, selection.top_k, q=q, k=k, v=v)
    selection = replace(selection, indices=selection.indices.contiguous())
    return attend_super_tiles(q, k, v, selection, softmax_scale, "auto", "auto")


def paged_call(call: WalkCall, k: Tensor, v: Tensor, pages: Pages) -> WalkCall:
    """The same call, where k and v are pages."""
    readable = page_matrix(k) is not None and page_matrix(v) is not None
    return replace(call, readable=readable, scaled=pages.k_scales is not None)


def attend_super_tiles(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection, scale: float, loop_order: str,
    kernels: Kernels, pages: Pages | None = None, out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Super-tile by super-tile, each in the order that pays. With `pages`, k and v are pages.

    `out` is contiguous memory for the result; None makes it.
    """
    (n_q, heads, _), groups, dim_v = q.shape, k.shape[-2], v.shape[-1]
    call = walk_call_of(q, k, v, selection, scale, loop_order)
    if pages is not None:
        call = paged_call(call, k, v, pages)
    walker = choose_kernels(kernels, call)
    chunks = chunks_of(walker, call)
    if walker == "hopper":
        loop_order = order_on_hopper(call)
    if out is None:
        out = torch.empty((n_q, heads, dim_v), dtype=q.dtype, device=q.device)
    lse = torch.empty((n_q, heads), dtype=torch.float32, device=q.device)
    per_query = heads * selection.top_k * (dim_v * q.element_size() + 8)
    per_query += mark_bytes(selection.sequences, selection.block_size, groups)
    runs = 1 if loop_order == "union" else -(-n_q * per_query // tuning.PARTIAL_BYTES)
    size = max(1, -(-n_q // max(1, runs)))
    for queries, keys, sequences in super_tiles(selection.sequences, size):
        part = Selection(selection.indices[queries], sequences, selection.block_size)
        order = choose_order(part, heads // groups) if loop_order == "auto" else loop_order
        into = Output(out[queries], lse[queries])
        if pages is None:
            attend_part(q[queries], k[keys], v[keys], part, scale, order, into, walker, chunks)
            continue
        first = bisect_right(selection.sequences.cu_seqlens_q, queries.start) - 1
        here = pages.after(first)
        attend_part(q[queries], k, v, part, scale, order, into, walker, chunks, here)
    return out, lse


Three = tuple[Tensor, Tensor, Tensor]


@on_its_device
@torch.no_grad()
def attend_selection_backward(
    d_out: Float[Tensor, "Tq Hq Dv"], d_lse: Float[Tensor, "Tq Hq"],
    q: Float[Tensor, "Tq Hq D"], k: Float[Tensor, "Tk Hkv D"], v: Float[Tensor, "Tk Hkv Dv"],
    out: Float[Tensor, "Tq Hq Dv"], lse: Float[Tensor, "Tq Hq"],
    selection: Selection, softmax_scale: float,
) -> Three:  # fmt: skip
    """dQ by a walk over unions, dK and dV KV-outer, each in its input's dtype (R18)."""
    return gradients(d_out, d_lse, q, k, v, out, lse, selection, softmax_scale, "auto")


def gradients(
    d_out: Tensor, d_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    selection: Selection, softmax_scale: float, kernels: Kernels,
) -> Three:  # fmt: skip
    """The same by the kernels that are named, super-tile by super-tile."""
    d_out, d_lse = d_out.contiguous(), d_lse.contiguous()
    size = gradient_tile(selection, q.shape[1], k.shape[1], k.shape[2] + v.shape[2])
    if size >= len(q):
        tensors = q, k, v, out, d_out, lse, d_lse
        return gradients_of_part(tensors, selection, softmax_scale, kernels=kernels)
    d_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    d_k, d_v = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
    for queries, keys, sequences in super_tiles(selection.sequences, size):
        part = Selection(selection.indices[queries], sequences, selection.block_size)
        tensors = q[queries], k[keys], v[keys], *(x[queries] for x in (out, d_out, lse, d_lse))
        into = d_q[queries], d_k[keys], d_v[keys]
        gradients_of_part(tensors, part, softmax_scale, into, kernels)
    return d_q, d_k.to(k.dtype), d_v.to(v.dtype)


def gradient_tile(selection: Selection, heads: int, groups: int, dims: int) -> int:
    """Queries of a super-tile of the backward, whose items and marks keep below PARTIAL_BYTES.

    dims: D + Dv. One item of each block and group is not counted: no super-tile has fewer.

    >>> ids = torch.empty((2**18, 4, 16), dtype=torch.int32, device="meta")
    >>> chosen = Selection(ids, Sequences.one(2**18, 2**18), 128)
    >>> gradient_tile(chosen, heads=64, groups=4, dims=256)
    131072
    """
    positions, block = positions_of(heads // groups), selection.block_size
    per_tile = 4 * block * dims * groups * union_width(selection, positions) // tuning.KEY_TILES
    per_tile += mark_bytes(selection.sequences, block, groups)
    size = selection.sequences.total_q
    while size > 1 and any(
        tile_sequences(part, positions).total_q * per_tile > tuning.PARTIAL_BYTES
        for _, _, part in super_tiles(selection.sequences, size)
    ):
        size = -(-size // 2)
    return size


def gradients_of_part(
    tensors: tuple[Tensor, ...], selection: Selection, scale: float, into: Three | None = None,
    kernels: Kernels = "auto",
) -> Three:  # fmt: skip
    """One super-tile: its dQ, dK and dV; `into` is written, added and added to instead."""
    q, k, v, out, d_out, lse, d_lse = tensors
    d_q, add_to = (None, None) if into is None else (into[0], into[1:])
    run, union = prepare_queries(q, k, v, selection, scale, kernels)
    d_q, delta = run(q, k, v, out, d_out, lse, d_lse, union, selection, scale, into=d_q)
    run, edges = prepare_keys(q, k, v, selection, scale, union, kernels)
    return d_q, *run(q, k, v, d_out, lse, delta, edges, scale, add_to=add_to)


def prepare_queries(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection, scale: float, kernels: Kernels = "auto"
) -> tuple[Callable[..., Any], SplitUnion]:
    """The function that computes dQ, and the unions along which it walks."""
    group = q.shape[1] // k.shape[1]
    if runs_on_hopper(kernels, backward_call_of(q, k, v, selection, scale, "queries")):
        # imported here, because older releases of triton have no Gluon
        from msa.triton_impl.hopper import query_gradients as hopper

        return hopper.query_gradients, split_tiles(selection, hopper.tile_size_of(group))
    return query_gradients, split_tiles(selection, positions_of(group))


def prepare_keys(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection, scale: float, union: SplitUnion,
    kernels: Kernels = "auto",
) -> tuple[Callable[..., Any], Any]:  # fmt: skip
    """The function that computes dK and dV, and its edges; `union` is used if it fits."""
    positions = positions_of(q.shape[1] // k.shape[1])
    if runs_on_hopper(kernels, backward_call_of(q, k, v, selection, scale, "keys")):
        from msa.triton_impl.hopper import key_gradients as hopper
        from msa.triton_impl.hopper.edge_shares import share_edges

        return hopper.key_gradients, share_edges(selection, hopper.programs_of(q.device))
    if union.tile_size != positions:
        union = split_tiles(selection, positions)
    return key_gradients, reverse_union(union, selection, tuning.KEY_TILES)


@on_its_device
def attend(
    q: Float[Array, "Tq Hq D"], k: Float[Array, "Tk Hkv D"], v: Float[Array, "Tk Hkv Dv"],
    q_idx: Float[Array, "Tq Hkv Di"], k_idx: Float[Array, "Tk Di"],
    sequences: Sequences, config: MSAConfig, align: bool = False, loop_order: LoopOrder = "auto",
    index_dtype: str | None = None, kernels: Kernels = "auto",
) -> Output:  # fmt: skip
    """MSA: the index branch selects, the main branch attends (R4-R12).

    align=True adds the alignment loss, which uses the LSE of this call (R17). index_dtype and
    kernels are those of `select_fused`, and say which kernels attend. If "hopper" is named, the
    selection has to run on these kernels, and attention runs on them where it can.
    """
    require_kernels(config.block_size, config.top_k, q=q, k=k, v=v)  # q_idx, k_idx: select_fused
    selection = select_fused(q_idx, k_idx, sequences, config, index_dtype, kernels)
    scale = config.softmax_scale_for(q.shape[-1])
    call = walk_call_of(q, k, v, selection, scale, loop_order)
    if kernels == "hopper" and obstacle(call) is not None:
        kernels = "portable"
    output = attend_checked(q, k, v, selection, scale, loop_order, kernels)
    if not align:
        return output
    by = "portable" if kernels == "portable" else "auto"
    kl = alignment.align(q, k, q_idx, k_idx, selection, sequences, config, output.lse, by)
    return replace(output, kl=kl)
