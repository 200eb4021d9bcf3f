"""Draws docs/overview.svg, the picture in the README, from a real selection made by the spec.

python -m docs.overview
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np

import msa
from docs.hooks.overview import smooth
from msa.reference import mask_of
from msa.reference.index_scores import score_tokens
from msa.reference.softmax import head_logits, masked_softmax

TOKENS, BLOCK, TOP_K, QUERY = 160, 8, 4, 155
INK, QUIET, REMOTE, OWN = "#22252b", "#d5d8dd", "#0072b2", "#e69f00"


def main() -> None:
    """Compute one small MSA call and draw what it did."""
    rng = np.random.default_rng(11)
    features = smooth(rng, TOKENS, 1, 8)
    k_idx = features[:, 0]
    q_idx = features + 0.3 * rng.standard_normal(features.shape)
    config = msa.MSAConfig(block_size=BLOCK, top_k=TOP_K)
    selection = msa.select(q_idx, k_idx, config=config)
    chosen = selection.indices[QUERY, 0].tolist()
    scores = score_tokens(q_idx, k_idx, 8**-0.5)[QUERY, 0]
    mask = mask_of(selection)[:, 0]
    weights, _ = masked_softmax(head_logits(q_idx, features, 0.25)[QUERY, 0], mask[QUERY])

    plt.rcParams |= {"svg.hashsalt": "msa", "font.family": "DejaVu Sans", "font.size": 9,
                     "text.color": INK, "axes.labelcolor": INK}  # fmt: skip
    figure = plt.figure(figsize=(10, 4.3), facecolor="white")
    grid = figure.add_gridspec(
        2, 2, width_ratios=[1.75, 1], hspace=0.75, wspace=0.07,
        left=0.02, right=0.985, top=0.82, bottom=0.1,
    )  # fmt: skip
    color = [
        OWN if b == QUERY // BLOCK else REMOTE if b in chosen else QUIET
        for b in range(TOKENS // BLOCK)
    ]

    index = figure.add_subplot(grid[0, 0])
    shown = np.where(np.isfinite(scores), scores, np.nan)
    floor = np.nanmin(shown) - 0.3
    index.bar(
        np.arange(TOKENS), shown - floor, bottom=floor, width=0.72,
        color=[color[j // BLOCK] for j in range(TOKENS)],
    )  # fmt: skip
    for b in range(TOKENS // BLOCK):
        best = np.nanmax(shown[b * BLOCK : (b + 1) * BLOCK])
        index.plot([b * BLOCK - 0.4, (b + 1) * BLOCK - 0.6], [best, best], color=INK, lw=1.3)
    index.set_title(
        f"1  Index branch: score every key for query {QUERY}; a block counts by its best",
        loc="left", fontsize=10, fontweight="bold",
    )  # fmt: skip

    main_branch = figure.add_subplot(grid[1, 0])
    main_branch.bar(
        np.arange(TOKENS), np.where(mask[QUERY], weights, 0), width=0.72,
        color=[color[j // BLOCK] for j in range(TOKENS)],
    )  # fmt: skip
    main_branch.set_title(
        f"2  Main branch: exact softmax over {TOP_K} blocks alone, the best three and its own",
        loc="left", fontsize=10, fontweight="bold",
    )  # fmt: skip
    for axis in (index, main_branch):
        axis.set_xlim(-1, TOKENS)
        axis.set_xticks(np.arange(BLOCK / 2 - 0.5, TOKENS, BLOCK), range(TOKENS // BLOCK))
        axis.set_yticks([])
        axis.tick_params(length=0, colors=INK)
        axis.set_xlabel("block of keys", fontsize=8, labelpad=1)
        for side in ("left", "right", "top"):
            axis.spines[side].set_visible(False)

    whole = figure.add_subplot(grid[:, 1])
    picture = np.ones((TOKENS, TOKENS, 3))
    picture[np.tril(np.ones((TOKENS, TOKENS), bool))] = matplotlib.colors.to_rgb(QUIET)
    picture[mask] = matplotlib.colors.to_rgb(REMOTE)
    own = np.arange(TOKENS) // BLOCK == (np.arange(TOKENS) // BLOCK)[:, None]
    picture[own & mask] = matplotlib.colors.to_rgb(OWN)
    whole.imshow(picture, interpolation="nearest")
    whole.axhline(QUERY, color=INK, lw=0.8)
    whole.set_xticks([])
    whole.set_yticks([])
    for side in whole.spines.values():
        side.set_visible(False)
    share = mask.sum() / np.tril(np.ones((TOKENS, TOKENS))).sum()
    whole.set_title(
        f"3  All queries read {share:.0%} of the triangle",
        loc="left", fontsize=10, fontweight="bold",
    )  # fmt: skip
    whole.text(TOKENS * 0.52, 14, "rows: queries, columns: keys", fontsize=8)
    whole.text(TOKENS * 0.52, 42, "grey: never read\nblue: chosen by score\norange: own block",
               fontsize=8.5, linespacing=1.6)  # fmt: skip
    figure.text(0.02, 0.94, "MiniMax Sparse Attention", fontsize=13, fontweight="bold")
    target = Path(__file__).with_suffix(".svg")
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    main()
