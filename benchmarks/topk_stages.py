"""The part of `msa bench prefill` that times the stand-alone top-k over rows of scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import cases, counts
from benchmarks.checks import Wrong
from benchmarks.timing import timed
from msa.config import MSAConfig
from msa.ir import Sequences
from msa.kernel_choice import choose, usual_call
from msa.triton_impl.block_topk import select_rows


def freshly(call: Callable[..., Any], *given: Any) -> Any:
    """Call with an empty cache of device memory before."""
    torch.cuda.empty_cache()
    return call(*given)


def topk_rows(n: int, blocks: int, k: int) -> dict[str, Any]:
    """Make n rows of scores, with all blocks visible."""
    scores = torch.randn(n, 1, blocks, device="cuda")
    scores[:, :, -1] = 100.0  # the forced block has the best score of every row, so both choose it
    positions = torch.full((n,), blocks * 128 - 1, device="cuda", dtype=torch.int32)
    config = MSAConfig(top_k=k)
    ours = select_rows(scores, positions, 128, config)
    if not torch.equal(ours[:, 0], scores[:, 0].topk(k).indices.sort(1).values.int()):
        raise Wrong("the stand-alone top-k differs from torch.topk")
    row: dict[str, Any] = {"rows": n, "blocks": blocks, "k": k}
    row |= {"gop": n * blocks / 1e9, "gb": counts.topk_bytes(n, blocks, k) / 1e9}
    row["torch"] = timed(lambda: scores.topk(k, dim=-1))
    row["ours"] = timed(lambda: select_rows(scores, positions, 128, config))
    if choose("auto", usual_call()) == "hopper":
        del scores, positions, ours
        row["hopper"] = freshly(topk_on_hopper, n, blocks, k)
    print(row, flush=True)
    return row


def topk_on_hopper(n: int, blocks: int, k: int) -> dict[str, float]:
    """Time the top-k of the hopper kernels over n rows of `blocks` scores.

    The scores lie as the score kernel writes them, [pieces, 256 rows, 8 blocks], with the maxima of
    pieces where these are wanted. The own block of a row, the last one, is not scored.
    """
    from msa.triton_impl.hopper.block_topk import select_scores
    from msa.triton_impl.hopper.plan import PIECE, ROWS, plan_scores

    config, tiles, queries = MSAConfig(top_k=k), n // ROWS, ROWS // cases.GROUPS
    device = torch.device("cuda", torch.cuda.current_device())
    keys = blocks * config.block_size + queries  # so many blocks lie before the first query
    sequences = Sequences.uniform(tiles, queries, keys)
    plan = plan_scores(sequences, config, cases.GROUPS, 2 * cases.DIM, 2**40, device)
    (part,) = plan.parts
    pieces = part.blocks // PIECE // tiles
    scores = torch.randn(tiles * pieces, ROWS, PIECE, device="cuda")
    by_tile = scores.view(tiles, pieces, ROWS, PIECE)
    by_tile[:, -1, :, blocks - (pieces - 1) * PIECE :] = -torch.inf  # no blocks, only whole pieces
    maxima = scores.amax(2) if part.long else None
    out = torch.empty((tiles * queries, cases.GROUPS, k), dtype=torch.int32, device="cuda")
    select_scores(scores, maxima, plan, part, config, out)
    best = by_tile[0].transpose(0, 1).reshape(ROWS, -1).topk(k - 1).indices.sort(1).values
    if not torch.equal(out[:queries].view(ROWS, k)[:, :-1], best.int()):
        raise Wrong("the top-k of the hopper kernels differs from torch.topk")
    return timed(lambda: select_scores(scores, maxima, plan, part, config, out))


def topk() -> list[dict[str, Any]]:
    """Time the stand-alone top-k over rows of scores, and torch.topk (the paper's Table 1)."""
    shapes = ((2**17, 1024, 16), (2**17, 2048, 32), (2**19, 4096, 16))
    return [freshly(topk_rows, *shape) for shape in shapes]
