"""Compile every kernel that a layer of an engine will need, before the first request.

Triton compiles a kernel for each set of compile-time parameters that it meets, one to four seconds
each. Which ones a step needs depends on its batch: in decodes the number of programs that share a
row, in prefills the loop order and the number of candidates. So steps of all these kinds run once,
over pages of the engine, of which they read the first alone.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from msa.config import MSAConfig
from msa.serving.step import (
    DecodePart,
    IndexPages,
    KVPages,
    PrefillPart,
    attend_scored,
    attend_selected,
    score,
    select,
)
from msa.warming import PROMPTS


@torch.no_grad()
def warm_up_layer(
    pages: KVPages, index: IndexPages, table: Tensor, heads: int, config: MSAConfig,
    dtypes: tuple[torch.dtype, torch.dtype], *, batches: Iterable[int] = (),
    queries: Iterable[int] = (1,),
    prompts: Iterable[tuple[int, int]] = PROMPTS, rows: bool = False,
) -> int:  # fmt: skip
    """Run decodes and prefills of these sizes over the first page; how many steps ran.

    Args:
        pages, index: those of any layer; they are read alone. They should be finite.
        table: one of the engine's; only its width, its dtype and its strides matter.
        heads: query heads.
        dtypes: of queries and of index queries.
        batches: how many sequences decode at a time.
        queries: how many new tokens each of them has.
        prompts: new tokens, and tokens before them. Longer ones than the table has room for are
            left out.
        rows: decodes name the rows of the table.
    """
    (_, block, groups, dim), index_dim = pages.k.shape, index.k_idx.shape[-1]
    device, ran = pages.k.device, 0

    def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    def first_pages(batch: int) -> Tensor:
        made = torch.empty_strided((batch, table.shape[1]), table.stride(), dtype=table.dtype,
                                   device=device)  # fmt: skip
        return made.zero_()

    for batch in batches:
        for n in queries:
            lengths = torch.full((batch,), n, dtype=torch.int32, device=device)
            names = torch.zeros_like(lengths) if rows else None
            part = DecodePart(first_pages(batch), lengths, n, names)
            q_idx = zeros(batch, n, groups, index_dim, dtype=dtypes[1])
            scores = score(q_idx, index, part, config, heads)
            q = zeros(batch, n, heads, dim, dtype=dtypes[0])
            attend_scored(q, pages, part, config, scores)
            ran += 1
    for new, before in prompts:
        if new + before > table.shape[1] * block:
            continue
        lengths = torch.full((1,), new + before, dtype=torch.int32, device=device)
        step = PrefillPart.of(first_pages(1), lengths, (0, new), (new + before,))
        chosen = select(zeros(new, groups, index_dim, dtype=dtypes[1]), index, step, config)
        scale = config.softmax_scale_for(dim)
        attend_selected(zeros(new, heads, dim, dtype=dtypes[0]), pages, step, chosen, scale)
        ran += 1
    return ran
