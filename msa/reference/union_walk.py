"""The other loop order: a tile of queries walks its union of blocks with a running softmax (R9)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from msa.ir import Array, Output, TileUnion
from msa.reference.softmax import head_logits


def attend_union(
    q: Float[Array, "Tq Hq D"], k: Float[Array, "Tk Hkv D"], v: Float[Array, "Tk Hkv Dv"],
    tile_union: TileUnion, softmax_scale: float,
) -> Output:  # fmt: skip
    """One block after another; when the running maximum rises, sum and output are scaled down."""
    group, block = q.shape[1] // k.shape[1], tile_union.block_size
    positions = np.array(tile_union.sequences.positions(), np.int64)
    key_spans = [ks for qs, ks in tile_union.sequences.spans() for _ in range(qs.start, qs.stop)]
    out = np.full((*q.shape[:2], v.shape[-1]), np.nan)
    lse = np.full(q.shape[:2], np.nan)
    for t, (start, stop) in enumerate(zip(tile_union.starts.tolist(), tile_union.stops.tolist())):
        keys, rows = key_spans[start], np.arange(stop - start)
        for r in range(k.shape[1]):
            heads = slice(r * group, (r + 1) * group)
            top = np.full((len(rows), group, 1), -np.inf)
            total = np.zeros((len(rows), group, 1))
            mean = np.zeros((len(rows), group, v.shape[-1]))
            for b, bits in zip(
                tile_union.block_ids[t, r].tolist(), tile_union.row_masks[t, r].tolist()
            ):
                if b < 0:
                    break
                tokens = slice(keys.start + b * block, min(keys.start + (b + 1) * block, keys.stop))
                place = b * block + np.arange(tokens.stop - tokens.start)
                read = (bits >> rows & 1).astype(bool)[:, None] & (
                    place <= positions[start:stop, None]
                )
                logits = head_logits(q[start:stop, heads], k[tokens, r : r + 1], softmax_scale)
                logits = np.where(read[:, None], logits, -np.inf)
                new_top = np.maximum(top, logits.max(axis=-1, keepdims=True))
                anchor = np.where(
                    np.isfinite(new_top), new_top, 0.0
                )  # a row that reads nothing yet
                weights, fade = np.exp(logits - anchor), np.exp(top - anchor)
                total = total * fade + weights.sum(axis=-1, keepdims=True)
                mean = mean * fade + weights @ v[tokens, r].astype(np.float64)
                top = new_top
            out[start:stop, heads] = mean / total
            lse[start:stop, heads] = (top + np.log(total))[..., 0]
    return Output(out.astype(q.dtype), lse.astype(np.float32))
