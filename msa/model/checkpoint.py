"""A model on disk: `model.safetensors` for the weights, `config.json` beside it for the sizes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from msa.dispatch import BackendName
from msa.model import checks
from msa.model.config import ModelConfig
from msa.model.model import Model

WEIGHTS, CONFIG = "model.safetensors", "config.json"
TRAINED = Path(__file__).parent / "trained"
"""The models that come with the package, each in a folder that `msa train` wrote."""


def save(model: Model, folder: Path | str, half: bool = False) -> None:
    """Write both files; each is whole or as it was before, also if the power fails.

    With half, weights are rounded to bfloat16: as a model that computes in it reads them anyway.

    >>> import tempfile
    >>> from msa.model.presets import PRESETS
    >>> model = Model(PRESETS["tiny"].model)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(model, folder)
    ...     same = load(folder)
    >>> same.config == model.config, bool((same.embed.weight == model.embed.weight).all())
    (True, True)
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.detach().contiguous() for name, weight in model.state_dict().items()}
    if half:
        weights = {n: w.bfloat16() if w.is_floating_point() else w for n, w in weights.items()}
    text = json.dumps(model.config.to_dict(), indent=2) + "\n"
    write(folder / CONFIG, lambda path: path.write_text(text))
    write(folder / WEIGHTS, lambda path: save_file(weights, path))


def load(
    folder: Path | str,
    *,
    device: torch.device | str = "cpu",
    backend: BackendName = "auto",
) -> Model:
    """The model that `save` wrote, in evaluation mode.

    Raises:
        ValueError: a file that is not there, cut short or of another kind; weights that are
            missing, not known or of another shape, each by its name.
    """
    folder = Path(folder)
    model = Model(read_config(folder), backend=backend)
    load_weights(model, folder)
    return model.to(device).eval()


def load_trained(
    name: str = "tiny", *, device: torch.device | str = "cpu", backend: BackendName = "auto"
) -> Model:
    """A model that comes with the package, trained by `msa train --preset name`.

    Raises:
        ValueError: a name that is none of theirs.

    >>> load_trained("tiny").config.layers
    3
    """
    folders = shipped()
    checks.check_trained(name, sorted(folders))
    return load(folders[name], device=device, backend=backend)


def shipped() -> dict[str, Path]:
    """The folders of the models that come with the package, by their names."""
    return {folder.name: folder for folder in TRAINED.iterdir()}


def read_config(folder: Path) -> ModelConfig:
    """The sizes beside the weights."""
    path = folder / CONFIG
    try:
        values: Any = json.loads(path.read_text())
        return ModelConfig.from_dict(values)
    except FileNotFoundError:
        raise ValueError(f"{path} must be the configuration of a model, got no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} must be the configuration of a model: {error}") from error


def load_weights(model: Model, folder: Path) -> str:
    """Give a model the weights that lie there; returns the SHA-256 of their file."""
    path = folder / WEIGHTS
    weights = read_weights(path)
    checks.check_weights(str(path), model.state_dict(), weights)
    model.load_state_dict(weights)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_weights(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path} must be a safetensors file, got no such file") from None
    except SafetensorError as error:
        raise ValueError(f"{path} must be a whole safetensors file: {error}") from error


def write(path: Path, fill: Callable[[Path], object]) -> None:
    """Fill a file under another name, then give it its own: nobody ever sees half of it."""
    part = path.with_name(path.name + ".part")
    fill(part)
    os.replace(part, path)
