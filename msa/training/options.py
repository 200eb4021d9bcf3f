"""The options of `msa train`, and the preset that they describe."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from msa.checks import check_count, check_positive, check_seed
from msa.dispatch import BackendName
from msa.model.checkpoint import read_config
from msa.model.config import ModelConfig
from msa.training.presets import PRESETS, Preset, PresetName

Twin = Literal["msa", "dense", "window"]
"""How the layers of a model attend."""


@dataclass(frozen=True)
class TrainOptions:
    """Train a model to read documents and to find the pictures that are hidden in them.

    Writes model.safetensors, config.json, metrics.jsonl (one line per step) and state.pt. After an
    interruption the same command continues from state.pt.
    """

    preset: PresetName = "tiny"
    """tiny trains on two CPU cores in under five minutes. small needs a GPU."""
    out: Path = Path("trained")
    """The folder to write to. A run that is there already is continued."""
    seed: int = 0
    """Draws weights and documents."""
    steps: int | None = None
    """The number of steps. None: as in the preset."""
    minutes: float | None = None
    """In place of steps: take as many steps as fit into this time, by timing a few batches."""
    attention: Twin | None = None
    """dense: no index, every layer attends to all tokens. window: each query attends to the last
    top-k blocks; without warm-up and loss of the index, unless they are given. msa: as the paper
    says. None: as in the preset."""
    warm_up: float | None = None
    """The share of steps, at the start, with dense attention; the index is trained and not used.
    None: as in the preset."""
    kl: float | None = None
    """The weight of the loss of the index branches. None: as in the preset."""
    index_gradient: bool = False
    """Let that loss train the backbone as well: no stop-gradient at the index branch."""
    block_size: int | None = None
    """Tokens in a key block. None: as in the preset."""
    top_k: int | None = None
    """Blocks kept per query and group. None: as in the preset."""
    sink_blocks: int | None = None
    """The number of first blocks of the text that are always kept. None: as in the preset."""
    local_blocks: int | None = None
    """The number of last visible blocks that are always kept. None: as in the preset."""
    start: Path | None = None
    """The folder of a trained model. Training starts from its sizes and weights."""
    context_parallel: int = 1
    """The number of processes that read the same documents, each a part of the tokens. It divides
    the number of processes that torchrun starts; the others read other documents."""
    device: str | None = None
    """cpu or cuda. None: as in the preset."""
    backend: BackendName | None = None
    """The backend of the MSA layers, one with gradients. None: as in the preset."""


def given(options: Any, *names: str) -> dict[str, Any]:
    """Those of the named options that are not None.

    >>> given(TrainOptions(steps=5), "steps", "kl")
    {'steps': 5}
    """
    values = {name: getattr(options, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def read_preset(options: TrainOptions) -> Preset:
    """The preset, with the changes that the options ask for."""
    _check_options(options)
    preset = PRESETS[options.preset]
    twin: dict[str, Any] = {}
    if options.attention == "dense":
        twin = {"warm_up": 1.0}
    elif options.attention == "window":
        twin = {"warm_up": 0.0, "kl": 0.0}
    return replace(
        preset,
        model=read_model(options, preset.model),
        schedule=replace(preset.schedule, **twin | given(options, "steps", "warm_up", "kl")),
        device=options.device or preset.device,
        backend=options.backend or preset.backend,
    )


def read_model(options: TrainOptions, model: ModelConfig) -> ModelConfig:
    """The sizes of the preset or of the folder `start`, with the changes of the options."""
    if options.start is not None:
        model = read_config(options.start)
    blocks = ("block_size", "top_k", "sink_blocks", "local_blocks")
    msa, kinds = replace(model.msa, **given(options, *blocks)), model.attention
    if options.attention is not None:
        kinds = ("dense" if options.attention == "dense" else "msa",) * model.layers
    if options.attention == "window":
        msa = replace(msa, local_blocks=msa.top_k - msa.sink_blocks)
    return replace(model, attention=kinds, msa=msa, index_gradient=options.index_gradient)


def _check_options(options: TrainOptions) -> None:
    """The preset is known, numbers are in range, and no two options contradict each other."""
    if options.preset not in PRESETS:
        raise ValueError(f"preset must be {' or '.join(PRESETS)}, got {options.preset!r}")
    check_seed("seed", options.seed)
    check_count("context_parallel", options.context_parallel, 1)
    if options.backend == "reference":
        raise ValueError("backend must be one with gradients, torch or triton, got 'reference'")
    if options.steps is not None:
        check_count("steps", options.steps, 1)
    if options.minutes is not None:
        check_positive("minutes", options.minutes)
    if options.steps is not None and options.minutes is not None:
        raise ValueError(f"minutes must be None where steps are given, got {options.minutes}")
    if options.attention not in (None, "msa", "dense", "window"):
        raise ValueError(f"attention must be msa, dense or window, got {options.attention!r}")
    if options.attention == "window" and options.local_blocks is not None:
        raise ValueError(
            "local_blocks must be None where attention is window, which sets them, "
            f"got {options.local_blocks}"
        )
    if options.warm_up is not None and not 0 <= options.warm_up <= 1:
        raise ValueError(f"warm_up must be from 0 to 1, got {options.warm_up}")
    if options.kl is not None and not 0 <= options.kl < math.inf:
        raise ValueError(f"kl must be finite and at least 0, got {options.kl}")
    if options.start is not None and options.start.resolve() == options.out.resolve():
        raise ValueError(f"out must be another folder than start, got {options.out} for both")
