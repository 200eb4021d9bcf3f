"""How many of the blocks with the most dense attention a selection holds."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int

from msa import checks
from msa.ir import Array, Selection
from msa.layout import read_layout
from msa.selection import check_selection_for

CHUNK = 128  # queries whose dense probabilities are held at a time


@dataclass(frozen=True)
class Recall:
    """Means over the queries that see more than k blocks; 1 if there are none."""

    blocks: float
    """The share of the best k blocks that are selected, without the own block of each query."""
    score: float
    """The attention on selected blocks divided by that on the best k, own blocks included."""
    queries: int
    """How many pairs of a query and a group were measured."""


def measure(
    q: Float[Array, "Tq Hq D"], k: Float[Array, "Tk Hkv D"],
    selection: Selection, softmax_scale: float,
) -> Recall:  # fmt: skip
    """Compare a selection with the k blocks of most attention, among them each query's own block.

    The attention of a block is the sum of its tokens' probabilities under dense causal attention,
    the mean over the heads of a group, as in the teacher of the index (R17). Arguments are tensors;
    there is no gradient.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came (R20).

    >>> import torch
    >>> from msa.ir import Sequences
    >>> q, k = torch.ones(4, 1, 1), torch.tensor([0.0, 2, 1, 0]).view(4, 1, 1)
    >>> ids = torch.tensor([[0, -1], [0, 1], [1, 2], [0, 3]], dtype=torch.int32)[:, None]
    >>> selection = Selection(ids, Sequences.one(4, 4), block_size=1)
    >>> recall = measure(q, k, selection, 1.0)  # query 2 has the best two, query 3 misses block 1
    >>> recall.blocks, round(recall.score, 2), recall.queries
    (0.5, 0.67, 2)
    """
    import torch

    checks.check_type("selection", selection, Selection)
    for name, array in (("q", q), ("k", k)):
        checks.check_torch(name, array)
    read_layout({"q": q, "k": k}, sequences=selection.sequences)
    check_selection_for(selection, q, k)
    softmax_scale = checks.check_positive("softmax_scale", softmax_scale)
    checks.check_scale("softmax_scale", softmax_scale)
    width, block, groups = selection.top_k, selection.block_size, k.shape[1]
    blocks = selection.sequences.max_blocks(block)
    q, k = q.detach(), k.detach()
    found = torch.zeros(4, dtype=torch.float64, device=q.device)  # hits, places, mass, best mass
    judged = 0
    for queries, keys, part in selection.sequences.tiles(CHUNK):
        for qs, ks in part.spans():
            rows = slice(queries.start + qs.start, queries.start + qs.stop)
            columns = slice(keys.start + ks.start, keys.start + ks.stop)
            n_q, n_k = qs.stop - qs.start, ks.stop - ks.start
            mass = block_mass(q[rows], k[columns], softmax_scale, block, blocks)
            own = torch.arange(n_k - n_q, n_k, device=q.device) // block
            many = (own + 1 > width)[:, None].expand(n_q, groups)
            best = mass.scatter(2, own[:, None, None].expand(-1, groups, 1), torch.inf)
            best = places(best.topk(min(width, blocks), -1).indices, blocks)
            ids = selection.indices[rows].long()
            chosen = places(ids.where(ids >= 0, blocks), blocks)
            sums = (
                (best & chosen).sum(-1) - 1, best.sum(-1) - 1, (mass * chosen).sum(-1),
                (mass * best).sum(-1),
            )  # fmt: skip
            found += torch.stack([x[many].double().sum() for x in sums])
            judged += int(many.sum())
    hits, wanted, got, most = found.tolist()
    return Recall(hits / wanted if wanted else 1.0, got / most if most else 1.0, judged)


def block_mass(
    q: Float[Array, "n Hq D"], k: Float[Array, "m Hkv D"], scale: float, block: int, blocks: int
) -> Float[Array, "n Hkv NB"]:
    """The dense attention of each query and group to each block; queries are the last tokens."""
    import torch

    (n_q, heads, _), (n_k, groups, _) = q.shape, k.shape
    lanes = q.float().unflatten(1, (groups, heads // groups))
    logits = torch.einsum("qghd,kgd->qghk", lanes, k.float()) * scale
    own = torch.arange(n_k - n_q, n_k, device=q.device)
    hidden = torch.arange(n_k, device=q.device) > own[:, None]
    weights = logits.masked_fill(hidden[:, None, None], -torch.inf).softmax(-1).mean(2)
    full = torch.nn.functional.pad(weights, (0, blocks * block - n_k))
    return full.unflatten(-1, (blocks, block)).sum(-1)


def places(ids: Int[Array, "*shape"], blocks: int) -> Bool[Array, "*other"]:
    """A mask of the blocks whose ids are given; the id `blocks` stands for none."""
    import torch

    named = torch.zeros(*ids.shape[:-1], blocks + 1, dtype=torch.bool, device=ids.device)
    return named.scatter(-1, ids, True)[..., :blocks]
