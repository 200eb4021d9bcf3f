"""`msa convert FOLDER`: a model with dense layers gains index branches (the paper's MSA-CPT)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from msa import checks as values
from msa import files
from msa.config import MSAConfig
from msa.model import checks
from msa.model.plain import given

if TYPE_CHECKING:
    from msa.model.model import Model


@dataclass(frozen=True)
class FolderOptions:
    """Give every dense layer of a model that `msa train` wrote an index branch, drawn at random.

    All other weights stay as they are. `msa train --start OUT` goes on from there: the index warms
    up, then attention is sparse.
    """

    folder: Path
    """The model."""
    out: Path
    """Where to write the new one."""
    block_size: int | None = None
    """Tokens in a key block; None: as the model's configuration says."""
    top_k: int | None = None
    """Blocks kept per query and group; None: as the model's configuration says."""
    seed: int = 0
    """Draws the projections."""


def run(options: FolderOptions) -> int:
    """Load, convert, save, say where.

    Raises:
        ValueError: a folder without a model, or one whose layers have an index already; a place
            where nothing can be written, or the model's own.
    """
    from msa.model import checkpoint

    values.check_seed("seed", options.seed)
    model = checkpoint.load(options.folder)
    checks.check_finite(str(options.folder / checkpoint.WEIGHTS), model.state_dict())
    checks.check_has_dense(model.config)
    files.check_apart("out", options.out, folder=options.folder)
    files.check_folder("out", options.out)
    config = replace(model.config.msa, **given(options, "block_size", "top_k"))
    checkpoint.save(convert(model, config, options.seed), options.out)
    print(f"The model with index branches lies in {options.out}.")
    return 0


def convert(model: Model, config: MSAConfig, seed: int = 0) -> Model:
    """A copy of the model whose dense layers are MSA layers; those that were MSA stay as they are.

    With k >= all blocks it computes what the model did (R11).

    Raises:
        ValueError: no dense layer.

    >>> import torch
    >>> from msa.model.model import Model
    >>> from msa.model.presets import TINY
    >>> dense = Model(replace(TINY.model, attention=("dense",) * 3))
    >>> sparse, text = convert(dense, MSAConfig(block_size=16, top_k=4)), torch.arange(64)
    >>> bool(((sparse(text).logits - dense(text).logits).abs() < 1e-4).all())
    True
    """
    import torch

    from msa.model.model import Model

    checks.check_has_dense(model.config)
    torch.manual_seed(seed)
    sizes = replace(model.config, attention=("msa",) * model.config.layers, msa=config)
    new = Model(sizes, backend=model.backend).to(model.embed.weight.device)
    new.load_state_dict(new.state_dict() | model.state_dict())
    return new.train(model.training)
