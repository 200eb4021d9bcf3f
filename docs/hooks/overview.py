"""The picture of the home page: one query's scores and weights, and what all queries read."""

from __future__ import annotations

import numpy as np

import msa
from docs.hooks.svg import Drawing
from msa.reference import mask_of
from msa.reference.index_scores import score_tokens
from msa.reference.softmax import head_logits, masked_softmax

TOKENS, BLOCK, TOP_K, QUERY = 120, 8, 4, 115
BAR, HEIGHT, WHOLE = 3.9, 92, 2.2


def smooth(rng: np.random.Generator, tokens: int, *shape: int) -> np.ndarray:
    """Features that change slowly along the tokens, as those of text do."""
    noise = rng.standard_normal((tokens + 4, *shape))
    return sum(noise[i : i + tokens] for i in range(5)) / 5**0.5


def overview_figure(caption: str) -> str:
    """A small MSA call of the spec, drawn: scores, weights and the blocks that all queries read."""
    rng = np.random.default_rng(11)
    features = smooth(rng, TOKENS, 1, 8)
    q_idx = features + 0.3 * rng.standard_normal(features.shape)
    config = msa.MSAConfig(block_size=BLOCK, top_k=TOP_K)
    selection = msa.select(q_idx, features[:, 0], config=config)
    chosen = selection.indices[QUERY, 0].tolist()
    scores = score_tokens(q_idx, features[:, 0], 8**-0.5)[QUERY, 0]
    mask = mask_of(selection)[:, 0]
    weights, _ = masked_softmax(head_logits(q_idx, features, 0.35)[QUERY, 0], mask[QUERY])

    def style(b: int) -> str:
        return "d-own" if b == QUERY // BLOCK else "d-remote" if b in chosen else "d-quiet"

    drawing = Drawing(790, 296)
    drawing.text(0, 12, f"Index branch: query {QUERY} scores every key", "d-ink d-bold", 12)
    shown = np.where(np.isfinite(scores), scores, np.nan)
    low, high = np.nanmin(shown) - 0.2, np.nanmax(shown)
    for j in range(QUERY + 1):
        h = (shown[j] - low) / (high - low) * HEIGHT
        drawing.rect(j * BAR, 22 + HEIGHT - h, BAR - 0.8, h, style(j // BLOCK), r=0.6)
    for b in range(TOKENS // BLOCK):
        best = np.nanmax(shown[b * BLOCK : (b + 1) * BLOCK])
        y = 22 + HEIGHT - (best - low) / (high - low) * HEIGHT - 2
        drawing.line((b * BLOCK * BAR, y), ((b + 1) * BLOCK * BAR - 2, y), style="d-rule")
        drawing.text((b + 0.5) * BLOCK * BAR, 128, b, "d-muted", 9.5, "middle")
    drawing.text(0, 166, f"Main branch: softmax over its {TOP_K} blocks only", "d-ink d-bold", 12)
    for j in range(QUERY + 1):
        h = weights[j] / weights.max() * HEIGHT
        if mask[QUERY, j]:
            drawing.rect(j * BAR, 176 + HEIGHT - h, BAR - 0.8, h, style(j // BLOCK), r=0.6)
    drawing.line((0, 176.5 + HEIGHT), (TOKENS * BAR, 176.5 + HEIGHT), style="d-thin")
    for b in range(TOKENS // BLOCK):
        drawing.text((b + 0.5) * BLOCK * BAR, 283, b, "d-muted", 9.5, "middle")
    x0 = 520
    share = mask.sum() / np.tril(np.ones((TOKENS, TOKENS))).sum()
    drawing.text(x0, 12, f"All queries read {share:.0%} of the triangle", "d-ink d-bold", 12)
    for i in range(TOKENS):
        for b in range(i // BLOCK + 1):
            stop = min((b + 1) * BLOCK, i + 1)
            own, read = b == i // BLOCK, b in selection.indices[i, 0]
            kind = "d-own" if own else "d-remote" if read else "d-faint"
            width = (stop - b * BLOCK) * WHOLE - 0.6
            drawing.rect(x0 + b * BLOCK * WHOLE, 22 + i * WHOLE, width, WHOLE - 0.3, kind, r=0)
    drawing.line(
        (x0 - 6, 22 + (QUERY + 0.5) * WHOLE), (x0 + 264, 22 + (QUERY + 0.5) * WHOLE), style="d-rule"
    )
    return drawing.figure(caption, "bars of scores, bars of weights, and a mostly empty triangle")
