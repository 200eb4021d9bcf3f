"""The other loop order: a tile of queries walks its union of blocks with a running softmax (R9)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from msa.ir import Output, TileUnion
from msa.torch_impl.key_blocks import to_rows
from msa.torch_impl.numerics import working_dtype
from msa.torch_impl.tiles import borders, owners, query_positions


@torch.no_grad()
def attend_union(
    q: Float[Tensor, "Tq Hq D"], k: Float[Tensor, "Tk Hkv D"], v: Float[Tensor, "Tk Hkv Dv"],
    tile_union: TileUnion, softmax_scale: float,
) -> Output:  # fmt: skip
    """Attention by a running softmax along each tile's union (R9, R10).

    Many tiles take a step together; the steps of a walk follow one another. Not recorded by
    autograd: the gradients of R18 are those of `attend_selection`.

    Returns:
        out [Tq, Hq, Dv] in q's dtype, lse float32 [Tq, Hq].

    >>> from msa.ir import Selection, Sequences
    >>> from msa.torch_impl import unite_tiles
    >>> ids = torch.tensor([[0, -1], [0, -1], [0, 1]], dtype=torch.int32)[:, None]
    >>> union = unite_tiles(Selection(ids, Sequences.one(3, 3), block_size=2), tile_size=2)
    >>> v = torch.tensor([1.0, 3.0, 8.0]).view(3, 1, 1)
    >>> attend_union(torch.zeros(3, 1, 1), v, v, union, 1.0).out.flatten()
    tensor([1., 2., 4.])
    """
    dtype, device = working_dtype(q, k, softmax_scale), q.device
    block = tile_union.block_size
    groups, group = k.shape[1], q.shape[1] // k.shape[1]
    lanes = q.to(dtype).reshape(q.shape[0], groups, group, q.shape[2])
    keys, values = (to_rows(x.to(dtype), tile_union.sequences, block) for x in (k, v))
    positions = query_positions(tile_union.sequences, device)
    rows = key_rows(tile_union)
    out = q.new_empty((q.shape[0], groups, group, v.shape[2]), dtype=dtype)
    lse = q.new_empty((q.shape[0], groups, group), dtype=dtype)
    cost = groups * group * tile_union.tile_size * block
    together = max(1, (2**19 if device.type == "cpu" else 2**25) // cost)
    for start in range(0, len(tile_union.starts), together):
        part = slice(start, start + together)
        queries = tile_union.starts[part, None] + torch.arange(tile_union.tile_size, device=device)
        real = queries < tile_union.stops[part, None]
        queries = queries.clamp(max=q.shape[0] - 1).long()
        state = Walk.begin(lanes[queries].transpose(1, 2), v.shape[2])
        ids, masks = tile_union.block_ids[part], tile_union.row_masks[part]
        for step in range(int((ids >= 0).sum(-1).max())):
            read = reading(ids[..., step], masks[..., step], positions[queries], block)
            row = rows[part, :, step]
            state.step(keys[row], values[row], read, softmax_scale)
        tile_out, tile_lse = state.end()
        out[queries[real]] = tile_out.transpose(1, 2)[real]
        lse[queries[real]] = tile_lse.transpose(1, 2)[real]
    return Output(out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2).float())


def key_rows(tile_union: TileUnion) -> Int[Tensor, "tiles Hkv U"]:
    """The row of each entry among all groups' blocks.

    A place without an entry gets the row of the walk's first entry. Its weights are 0, but 0 times
    NaN is NaN, so the row must not be that of another sequence or group (R9).
    """
    ids, device = tile_union.block_ids, tile_union.block_ids.device
    sequences = tile_union.sequences
    cu_blocks = sequences.cu_blocks(tile_union.block_size)
    sequence = owners(sequences.cu_seqlens_q, device)[tile_union.starts.long()]
    first = borders(cu_blocks, device)[sequence][:, None, None]
    group = torch.arange(ids.shape[1], device=device)[:, None]
    return group * cu_blocks[-1] + first + torch.where(ids >= 0, ids, ids[..., :1])


def reading(
    ids: Int[Tensor, "W Hkv"], masks: Int[Tensor, "W Hkv"], positions: Int[Tensor, "W T"],
    block_size: int,
) -> Bool[Tensor, "W Hkv T Bk"]:  # fmt: skip
    """Which query of a tile reads which token of the block: chosen, and not in the future (R3)."""
    bit = torch.arange(positions.shape[1], device=ids.device)
    chosen = (masks[..., None] >> bit & 1).bool()
    tokens = ids[..., None, None] * block_size + torch.arange(block_size, device=ids.device)
    return chosen[..., None] & (tokens <= positions[:, None, :, None])


@dataclass
class Walk:
    """A running softmax: highest logit so far, sum of weights, weighted sum of values."""

    queries: Float[Tensor, "W Hkv T G D"]
    top: Float[Tensor, "W Hkv T G 1"]
    total: Float[Tensor, "W Hkv T G 1"]
    mean: Float[Tensor, "W Hkv T G Dv"]

    @classmethod
    def begin(cls, queries: Float[Tensor, "W Hkv T G D"], width: int) -> Walk:
        """The state before any block is read."""
        shape = queries.shape[:-1]
        return cls(
            queries,
            queries.new_full((*shape, 1), -torch.inf),
            queries.new_zeros(*shape, 1),
            queries.new_zeros(*shape, width),
        )

    def step(
        self,
        keys: Float[Tensor, "W Hkv Bk D"], values: Float[Tensor, "W Hkv Bk Dv"],
        read: Bool[Tensor, "W Hkv T Bk"], scale: float,
    ) -> None:  # fmt: skip
        """Read one block; when the maximum rises, earlier sums are scaled down."""
        logits = self.queries.flatten(2, 3) @ keys.mT * scale
        logits = logits.unflatten(2, self.queries.shape[2:4])
        logits = torch.where(read[..., None, :], logits, -torch.inf)
        top = torch.maximum(self.top, logits.amax(-1, keepdim=True))
        anchor = torch.where(top.isneginf(), 0.0, top)  # for a query that has read nothing yet
        weights, fade = (logits - anchor).exp(), (self.top - anchor).exp()
        gathered = (weights.flatten(2, 3) @ values).view_as(self.mean)
        self.mean = self.mean * fade + gathered
        self.total = self.total * fade + weights.sum(-1, keepdim=True)
        self.top = top

    def end(self) -> tuple[Float[Tensor, "W Hkv T G Dv"], Float[Tensor, "W Hkv T G"]]:
        """The output and its LSE."""
        return self.mean / self.total, (self.top + self.total.log())[..., 0]
