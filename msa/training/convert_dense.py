"""`msa convert FOLDER`: adds index branches to a model with dense layers (the paper's MSA-CPT)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from msa import files
from msa.checks import check_seed
from msa.config import MSAConfig
from msa.model import checkpoint
from msa.model.config import ModelConfig
from msa.model.model import Model
from msa.training.options import given


@dataclass(frozen=True)
class ConvertDenseOptions:
    """Add an index branch with random weights to every dense layer of a model of `msa train`.

    All other weights stay as they are. Then `msa train --start OUT` trains the new model: first the
    index (warm-up), then with sparse attention.
    """

    folder: Path
    """The folder of the model."""
    out: Path
    """The folder for the new model."""
    block_size: int | None = None
    """Tokens in a key block. None: as in the configuration of the model."""
    top_k: int | None = None
    """Blocks kept per query and group. None: as in the configuration of the model."""
    seed: int = 0
    """Draws the weights of the index branches."""


def run(options: ConvertDenseOptions) -> int:
    """Load the model, convert it, save it, and print its folder.

    Raises:
        ValueError: a folder without a model, or a model without a dense layer; an output folder
            that cannot be written, or that is the folder of the model.
    """
    check_seed("seed", options.seed)
    model = checkpoint.load(options.folder)
    checkpoint.check_finite(str(options.folder / checkpoint.WEIGHTS), model.state_dict())
    _check_has_dense(model.config)
    files.check_apart("out", options.out, folder=options.folder)
    files.check_folder("out", options.out)
    config = replace(model.config.msa, **given(options, "block_size", "top_k"))
    checkpoint.save(convert(model, config, options.seed), options.out)
    print(f"The model with index branches is in {options.out}.")
    return 0


def convert(model: Model, config: MSAConfig, seed: int = 0) -> Model:
    """A copy of the model in which the dense layers are MSA layers too.

    If top_k is at least the number of blocks, its results are those of the model (R11).

    Raises:
        ValueError: no dense layer.

    >>> from msa.training.presets import TINY
    >>> dense = Model(replace(TINY.model, attention=("dense",) * 3))
    >>> sparse, text = convert(dense, MSAConfig(block_size=16, top_k=4)), torch.arange(64)
    >>> bool(((sparse(text).logits - dense(text).logits).abs() < 1e-4).all())
    True
    """
    _check_has_dense(model.config)
    torch.manual_seed(seed)
    sizes = replace(model.config, attention=("msa",) * model.config.layers, msa=config)
    new = Model(sizes, backend=model.backend).to(model.embed.weight.device)
    new.load_state_dict(new.state_dict() | model.state_dict())
    return new.train(model.training)


def _check_has_dense(config: ModelConfig) -> None:
    """At least one layer is dense."""
    if "dense" not in config.attention:
        raise ValueError(f"attention must have a dense layer to convert, got {config.attention}")
