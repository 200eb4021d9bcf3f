"""Packed tokens in pages or rows, as other projects keep them, with rubbish in unused places.

The rubbish is finite, like memory that was used before. A kernel may load it, mask its score and
multiply its value by a weight of 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from msa.ir import Sequences

if TYPE_CHECKING:
    from torch import Tensor

RUBBISH = 999.0
"""The size of rubbish. Its sign alternates over the tokens, so some of it always scores highest."""


def rubbish(like: Tensor, *shape: int) -> Tensor:
    """A tensor [rows, tokens, ...] full of rubbish.

    >>> import torch
    >>> rubbish(torch.zeros(1), 1, 3, 1).flatten()
    tensor([ 999., -999.,  999.])
    """
    filled = like.new_full(shape, RUBBISH)
    filled[:, 1::2] *= -1
    return filled


def in_pages(tokens: Tensor, sequences: Sequences, block: int) -> tuple[Tensor, Tensor]:
    """Keys, values or index keys [Tk, ...] in shuffled pages [pages, block, ...], and the table.

    One page belongs to no sequence; unused entries of the table [batch, any] point to this page.
    The order of the pages depends only on the lengths, so k, v and k_idx share one table.

    >>> import torch
    >>> pages, table = in_pages(torch.arange(3.0), Sequences.one(1, 3), block=2)
    >>> pages[table[0, :2].long()].flatten()
    tensor([   0.,    1.,    2., -999.])
    """
    import torch

    counts = [-(-(ks.stop - ks.start) // block) for _, ks in sequences.spans()]
    total = sum(counts) + 1
    shuffled = torch.randperm(total, generator=torch.Generator().manual_seed(total))
    order = shuffled.to(tokens.device, torch.int32)
    table = order[-1].repeat(len(counts), max(counts, default=0) + 1)
    pages = rubbish(tokens, total, block, *tokens.shape[1:])
    first = 0
    for s, (_, keys) in enumerate(sequences.spans()):
        own = order[first : first + counts[s]]
        table[s, : len(own)] = own
        for page, start in zip(own.tolist(), range(keys.start, keys.stop, block)):
            part = tokens[start : min(start + block, keys.stop)]
            pages[page, : len(part)] = part
        first += counts[s]
    return pages, table


def in_rows(tokens: Tensor, spans: Iterable[slice], left: int = 0) -> Tensor:
    """Packed tokens [T, ...] as a batch [B, left + longest, ...], padded with rubbish.

    >>> import torch
    >>> in_rows(torch.tensor([1.0, 2, 3]), [slice(0, 1), slice(1, 3)])
    tensor([[   1., -999.],
            [   2.,    3.]])
    """
    spans = list(spans)
    longest = max((span.stop - span.start for span in spans), default=0)
    rows = rubbish(tokens, len(spans), left + longest, *tokens.shape[1:])
    for row, span in zip(rows, spans):
        row[left : left + span.stop - span.start] = tokens[span]
    return rows


def from_rows(rows: Tensor, spans: Iterable[slice]) -> Tensor:
    """Rows back to packed tokens, for rows without padding on the left.

    >>> import torch
    >>> from_rows(torch.tensor([[1.0, -999], [2, 3]]), [slice(0, 1), slice(1, 3)])
    tensor([1., 2., 3.])
    """
    import torch

    return torch.cat([row[: span.stop - span.start] for row, span in zip(rows, spans)])
