"""A model on disk: `model.safetensors` for the weights, `config.json` beside it for the sizes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from msa import files
from msa.dispatch import BackendName
from msa.model import checks
from msa.model.config import ModelConfig
from msa.model.model import Model

WEIGHTS, CONFIG = "model.safetensors", "config.json"
TRAINED = Path(__file__).parent / "trained"
"""The models that come with the package, each in a folder that `msa train` wrote."""


def save(model: Model, folder: Path | str, half: bool = False) -> None:
    """Write both files; each is whole or as it was before, see `files.write`.

    With half, parameters are rounded to bfloat16: as a model that computes in it reads them anyway.
    Buffers stay as they are: rounding a router's bias would move tokens to other experts.

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
        weights |= {name: weights[name].bfloat16() for name, _ in model.named_parameters()}
    text = json.dumps(model.config.to_dict(), indent=2) + "\n"
    files.write(folder / CONFIG, text.encode())
    files.write(folder / WEIGHTS, to_bytes(weights))


def load(
    folder: Path | str,
    *,
    device: torch.device | str = "cpu",
    backend: BackendName = "auto",
) -> Model:
    """The model that `save` wrote, in evaluation mode.

    Raises:
        ValueError: a file that is not there, cut short or of another kind; weights that are
            missing, not known, of another shape or no floating point numbers, each by its name.
    """
    folder = Path(folder)
    config, weights = read_config(folder), read_weights(folder / WEIGHTS)
    check_sizes(folder, config, weights)
    model = Model(config, backend=backend)
    model.load_state_dict(weights)
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
        values: Any = json.loads(path.read_text(encoding="utf-8"))
        return ModelConfig.from_dict(values)
    except FileNotFoundError:
        raise ValueError(f"{path} must be the configuration of a model, got no such file") from None
    except OSError as error:
        raise ValueError(
            f"{path} must be the configuration of a model, got no readable file: {files.why(error)}"
        ) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be the configuration of a model: {error}") from error


def check_sizes(folder: Path, config: ModelConfig, weights: dict[str, Tensor]) -> None:
    """Compare the weights with the sizes before a model of these sizes takes any memory."""
    path, vision = folder / WEIGHTS, config.vision
    checks.check_layers(str(path), 0 if vision is None else vision.layers, len(weights))
    try:
        with torch.device("meta"):
            wanted = Model(config, backend="torch").state_dict()
    except (RuntimeError, OverflowError, TypeError) as error:  # more bytes than torch can count
        raise ValueError(
            f"{folder / CONFIG} must have the sizes of {path}, got far larger ones"
        ) from error
    checks.check_weights(str(path), wanted, weights)


def load_weights(model: Model, folder: Path) -> str:
    """Give a model the weights that lie there; returns the SHA-256 of their file.

    Raises:
        ValueError: see `load`; or weights that are not finite.
    """
    path = folder / WEIGHTS
    weights = read_weights(path)
    checks.check_weights(str(path), model.state_dict(), weights)
    checks.check_finite(str(path), weights)
    model.load_state_dict(weights)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_weights(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path} must be a safetensors file, got no such file") from None
    except OSError as error:
        raise ValueError(
            f"{path} must be a safetensors file, got no readable file: {files.why(error)}"
        ) from None
    except SafetensorError as error:
        raise ValueError(f"{path} must be a whole safetensors file: {error}") from error
