"""Keys of all ranks in order, and their gradients summed over the ranks.

    forward     rows of each rank -> all-gather -> the prefix of keys that a half reads
    backward    gradients of both halves, added in float32 -> reduce-scatter -> rows of each rank

Collectives run in the same order on every rank, forward and backward, also on a rank without a
query: otherwise a message would meet another one. So one autograd function carries all keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from msa.autograd import differentiable_once
from msa.parallel.shards import Shards

# torch 2.13 renames both collectives; older releases have the second name only
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Gathered:
    """A gather that was started: rows of all ranks [P * most, ...], where most is the most rows."""

    rows: Tensor
    work: Any

    def take(self, places: Tensor) -> Tensor:
        """Rows in another order, after the gather has ended. On a GPU only the stream waits."""
        if self.work is not None:
            self.work.wait()
        return self.rows.index_select(0, places)


def start_gather(x: Tensor, shards: Shards, group: dist.ProcessGroup) -> Gathered:
    """Start to collect every rank's rows of x; `take` waits for them."""
    most = max(shards.rows(rank) for rank in range(shards.ranks))
    own = x.detach()
    if len(own) < most:
        own = torch.cat([own, own.new_zeros(most - len(own), *x.shape[1:])])
    whole = own.new_empty(shards.ranks * most, *x.shape[1:])
    work = all_gather(whole, own.contiguous(), group=group, async_op=True)
    return Gathered(whole, work)


class Rows(torch.autograd.Function):
    """Rows of the whole, in the orders that `places` say, of arguments whose gathers were started.

    Returns, for each argument, one tensor for each order. An order names no row twice.
    """

    @staticmethod
    def forward(
        ctx: Any, gathers: list[Gathered], places: list[Tensor], shards: Shards,
        group: dist.ProcessGroup, *own: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Wait for the gathers, and put the rows in order."""
        ctx.places, ctx.shards, ctx.group = places, shards, group
        ctx.dtypes, ctx.shapes = [x.dtype for x in own], [gather.rows.shape for gather in gathers]
        ctx.set_materialize_grads(False)
        return tuple(gather.take(order) for gather in gathers for order in places)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Add the gradients of all orders, then those of all ranks, in float32 or float64.

        A gradient is rounded to the dtype of its argument once, at the end.
        """
        shards, places = ctx.shards, ctx.places
        found: list[Tensor | None] = []
        for i, (dtype, shape) in enumerate(zip(ctx.dtypes, ctx.shapes)):
            if not ctx.needs_input_grad[4 + i]:
                found.append(None)
                continue
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            whole = torch.zeros(shape, dtype=wide, device=places[0].device)
            for order, gradient in zip(places, gradients[len(places) * i :]):
                if gradient is not None:
                    whole.index_add_(0, order, gradient.to(wide))
            own = whole.new_empty(shape[0] // shards.ranks, *shape[1:])
            reduce_scatter(own, whole, group=ctx.group)
            found.append(own[: shards.rows(ctx.group.rank())].to(dtype))
        return None, None, None, None, *found


class Attached(torch.autograd.Function):
    """The first argument, such that its backward reaches the others, with gradients of zero.

    A rank without queries has an output that depends on nothing. Its backward has to take part in
    the collectives of `Rows` all the same, and its arguments get gradients as on other ranks.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        """x itself."""
        ctx.shapes = [(other.shape, other.dtype) for other in others]
        return x.view_as(x)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        """The gradient of x, and zeros that take no memory."""
        zeros = (gradient.new_zeros((), dtype=dtype).expand(shape) for shape, dtype in ctx.shapes)
        return gradient, *zeros


class SumOverRanks(torch.autograd.Function):
    """The sum of a number over the ranks, which every rank puts into its loss once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        """The sum, the same on every rank."""
        total = x.detach().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Each rank differentiates its own part of the sum."""
        return gradient, None
