"""The vision tower: patches, transformer layers with 3D RoPE, projection to the text's width.

A picture is a grid of patches: (frames, rows, columns). A patch is a row of values. The patches are
ordered by frame, and within a frame by squares of merge x merge patches, so that the patches that
become one token are neighbours. `cut` makes such rows from pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from msa.model.config import VisionConfig
from msa.model.norm_rope import Turns, picture_turns

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Pictures:
    """Images or videos in the form that the vision tower reads."""

    patches: Float[Tensor, "patches values"]
    """A patch has channels x frames x patch x patch values."""
    grids: Sequence[Grid]
    """The numbers of frames, rows and columns of patches of each picture."""


def cut(pixels: Float[Tensor, "n frames channels height width"], config: VisionConfig) -> Pictures:
    """Cut pictures of one size into patches.

    >>> config = VisionConfig(width=6, layers=1, heads=1, mlp_width=6, projector_width=6,
    ...                       channels=1, patch=1, frames=1, merge=2)
    >>> pictures = cut(torch.arange(8.0).view(1, 1, 1, 2, 4), config)
    >>> pictures.patches.flatten().int().tolist(), pictures.grids
    ([0, 1, 4, 5, 2, 3, 6, 7], [(1, 2, 4)])
    """
    n, frames, _, height, width = pixels.shape
    f, p, m = config.frames, config.patch, config.merge
    grid = frames // f, height // p, width // p
    x = pixels.unflatten(1, (grid[0], f))
    x = x.unflatten(5, (grid[2] // m, m, p)).unflatten(4, (grid[1] // m, m, p))
    # n, frame, inside frame, channel, row, inside square, inside patch, and the same for columns
    x = x.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)
    return Pictures(x.reshape(-1, config.patch_values), [grid] * n)


def patch_places(grids: Sequence[Grid], merge: int) -> Int[Tensor, "patches 3"]:
    """(frame, row, column) of each patch in its picture, in the order of the patches.

    >>> patch_places([(1, 2, 4)], merge=2)[:, 1:].tolist()
    [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
    """
    places = []
    for t, h, w in grids:
        grid = torch.stack(torch.meshgrid(*map(torch.arange, (t, h, w)), indexing="ij"), -1)
        squares = grid.view(t, h // merge, merge, w // merge, merge, 3).transpose(2, 3)
        places.append(squares.reshape(-1, 3))
    return torch.cat(places)


class VisionLayer(nn.Module):
    """Attention among the patches of a picture, then an MLP, as in CLIP."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        self.q, self.k, self.v, self.out = (nn.Linear(config.width, config.width) for _ in "qkvo")
        self.mlp_norm = nn.LayerNorm(config.width, config.norm_eps)
        self.up = nn.Linear(config.width, config.mlp_width)
        self.down = nn.Linear(config.mlp_width, config.width)

    def forward(
        self, x: Float[Tensor, "patches width"], turns: Turns, counts: list[int]
    ) -> Float[Tensor, "patches width"]:
        """`counts` has the number of patches of each picture."""
        normed = self.norm(x)
        q, k, v = (f(normed).unflatten(-1, (self.heads, -1)) for f in (self.q, self.k, self.v))
        x = x + self.out(attend_within(turns(q), turns(k), v, counts).flatten(1))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


def attend_within(
    q: Float[Tensor, "N H D"], k: Float[Tensor, "N H D"], v: Float[Tensor, "N H D"],
    counts: list[int],
) -> Float[Tensor, "N H D"]:  # fmt: skip
    """Attention of each patch to all patches of its own picture."""
    if len(set(counts)) > 1:
        parts = zip(*(x.split(counts) for x in (q, k, v)))
        return torch.cat([attend_within(q, k, v, [len(q)]) for q, k, v in parts])
    q, k, v = (x.unflatten(0, (len(counts), -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)


class VisionTower(nn.Module):
    """Turns pictures into tokens of the text's width."""

    def __init__(self, config: VisionConfig, text_width: int) -> None:
        super().__init__()
        self.config = config
        self.patches = nn.Linear(config.patch_values, config.width, bias=False)
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.layers))
        hidden, merged = config.projector_width, text_width * config.merge**2
        self.project = nn.Sequential(
            nn.Linear(config.width, hidden), nn.GELU(), nn.Linear(hidden, text_width)
        )
        self.merge = nn.Sequential(
            nn.Linear(merged, hidden), nn.GELU(), nn.Linear(hidden, text_width)
        )

    def forward(self, pictures: Pictures) -> Float[Tensor, "tokens text_width"]:
        """One token for each square of merge x merge patches.

        Raises:
            ValueError: patches that do not fit the grids or the tower.
        """
        config, patches = self.config, pictures.patches
        _check_pictures(pictures, config)
        places = patch_places(pictures.grids, config.merge).to(patches.device)
        turns = picture_turns(places, config.head_dim, config.rope_theta)
        counts = [t * h * w for t, h, w in pictures.grids]
        x = self.norm(self.patches(patches))
        for layer in self.layers:
            x = layer(x, turns, counts)
        return self.merge(self.project(x).unflatten(0, (-1, config.merge**2)).flatten(1))


def _check_pictures(pictures: Pictures, config: VisionConfig) -> None:
    """The patches have the tower's size and fill the grids, whose sides can be merged."""
    for grid in pictures.grids:
        if len(grid) != 3 or min(grid) < 1 or grid[1] % config.merge or grid[2] % config.merge:
            raise ValueError(
                f"pictures.grids must hold (frames, rows, columns), rows and columns being "
                f"multiples of merge = {config.merge}, got {tuple(grid)}"
            )
    wanted = [sum(t * h * w for t, h, w in pictures.grids), config.patch_values]
    if list(pictures.patches.shape) != wanted:
        raise ValueError(
            f"pictures.patches must have shape [patches, values] = {wanted}, "
            f"got {list(pictures.patches.shape)}"
        )
